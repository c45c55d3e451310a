"""float64 references of the merge methods: one loop per step, on flat lists of numbers.

Each returns the merged values and the sum of absolute terms behind each, for rounding bounds.
"""

import hashlib
import math


def trim(x, density):
    keep = min(len(x), max(1, math.floor(density * len(x))))
    kept = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[:keep]
    return [x[i] if i in kept else 0.0 for i in range(len(x))]


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def random_mask(n, density, seed, name, model):
    digest = hashlib.blake2b(f"{seed}\0{name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    mask = []
    for i in range(n):
        j = i // 8
        word = philox((j & 0xFFFFFFFF, j >> 32, model, 0), key)[i % 8 // 2]
        uniform = word >> 16 if i % 2 else word & 0xFFFF
        mask.append(uniform < round(density * 65536))
    return mask


def norm(x, kind):
    if kind == "l1":
        return sum(abs(v) for v in x)
    if kind == "l2":
        return math.sqrt(sum(v * v for v in x))
    return max((abs(v) for v in x), default=0.0)


def rescaled(x, thinned, density, rescale):
    if rescale == "none" or density == 1:
        return thinned
    if rescale == "inverse_prob":
        return [v / density for v in thinned]
    whole, kept = norm(x, rescale), norm(thinned, rescale)
    if whole < 1e-7 or kept < 1e-7:
        return thinned
    return [v * whole / kept for v in thinned]


def combine(base, deltas, weights, elect, normalize, lam):
    out, size = [], []
    for i in range(len(base)):
        v = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        if elect == "none":
            agreeing = list(range(len(v)))
        else:
            vote = sum(v) if elect == "sum" else sum((a > 0) - (a < 0) for a in v)
            sign = 1 if vote >= 0 else -1
            agreeing = [m for m, a in enumerate(v) if (a > 0) - (a < 0) == sign]
        mix = sum(v[m] for m in agreeing)
        total = sum(abs(v[m]) for m in agreeing)
        if normalize:
            divisor = sum(weights[m] for m in agreeing)
            if elect == "none":
                divisor = 1.0 if abs(divisor) < 1e-8 else divisor
            else:
                divisor = 1.0 if divisor == 0 else divisor
            mix, total = mix / divisor, total / abs(divisor)
        out.append(base[i] + lam * mix)
        size.append(abs(base[i]) + abs(lam) * total)
    return out, size


def task_vectors(base, tensors):
    return [[a - b for a, b in zip(t, base, strict=True)] for t in tensors]


def linear(tensors, weights, normalize):
    total = sum(weights) if normalize else 1.0
    columns = list(zip(*tensors, strict=True))
    out = [sum(w * a for w, a in zip(weights, c, strict=True)) / total for c in columns]
    size = [sum(abs(w * a) for w, a in zip(weights, c, strict=True)) / abs(total) for c in columns]
    return out, size


def ties(base, tensors, weights, density, *, rescale="none", elect="sum", normalize=True, lam=1.0):
    thinned = [
        rescaled(x, trim(x, p), p, rescale)
        for x, p in zip(task_vectors(base, tensors), density, strict=True)
    ]
    return combine(base, thinned, weights, elect, normalize, lam)


def dare(
    base,
    tensors,
    weights,
    density,
    *,
    seed,
    name,
    rescale="l1",
    elect="none",
    normalize=False,
    lam=1.0,
):
    thinned = []
    for m, (x, p) in enumerate(zip(task_vectors(base, tensors), density, strict=True)):
        mask = random_mask(len(x), p, seed, name, m)
        y = [v if keep else 0.0 for v, keep in zip(x, mask, strict=True)]
        thinned.append(rescaled(x, y, p, rescale))
    return combine(base, thinned, weights, elect, normalize, lam)
