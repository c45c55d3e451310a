"""float64 references of the methods that mask and select: loops on flat lists of numbers.

Each returns the merged values and the sum of absolute terms behind each, for rounding bounds.
"""

import hashlib
import math

from python_tests.references.drop_by_rank import probabilities
from python_tests.references.merge_methods import combine, norm, rescaled, task_vectors
from python_tests.references.philox import uniforms


def band(x, density, gamma):
    if density == 1:
        return list(x)
    n = len(x)
    keep = max(1, math.floor(density * n))
    top = min(math.floor(gamma * n), n - keep)
    order = sorted(range(n), key=lambda i: (-abs(x[i]), i))
    kept = order[top : top + keep]
    return [x[i] if i in kept else 0.0 for i in range(n)]


def breadcrumbs(
    base,
    tensors,
    weights,
    density,
    gamma,
    *,
    rescale="none",
    elect="none",
    normalize=False,
    lam=1.0,
):
    thinned = [
        rescaled(x, band(x, p, g), p, rescale)
        for x, p, g in zip(task_vectors(base, tensors), density, gamma, strict=True)
    ]
    return combine(base, thinned, weights, elect, normalize, lam)


def decisions(n, seed, name, model):
    """The 16-bit number behind each element's keeping."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode()).digest()
    return uniforms(int.from_bytes(digest[:8], "little"), model, range(n)).tolist()


def drop_ranked(x, length, density, epsilon, seed, name, model, rescale):
    if density == 1:
        return list(x)
    bits, out = decisions(len(x), seed, name, model), []
    for start in range(0, len(x), max(1, length)):
        row = x[start : start + length]
        q = probabilities(row, density - epsilon, density + epsilon)
        for i, v in enumerate(row):
            kept = v if bits[start + i] < round(q[i] * 65536) else 0.0
            out.append(kept / q[i] if rescale == "inverse_prob" else kept)
    if rescale in ("none", "inverse_prob"):
        return out
    whole, kept = norm(x, rescale), norm(out, rescale)
    return out if whole < 1e-7 or kept < 1e-7 else [v * whole / kept for v in out]


def della(
    base,
    tensors,
    length,
    weights,
    density,
    epsilon,
    *,
    seed,
    name,
    rescale="l1",
    elect="sum",
    normalize=True,
    lam=1.0,
):
    deltas = task_vectors(base, tensors)
    thinned = [
        drop_ranked(x, length, p, e, seed, name, m, rescale)
        for m, (x, p, e) in enumerate(zip(deltas, density, epsilon, strict=True))
    ]
    return combine(base, thinned, weights, elect, normalize, lam)


def sce(base, tensors, tau=1.0, *, relative=False):
    deltas = task_vectors(base, tensors)
    n, models = len(base), len(deltas)
    if tau < 1:
        columns = [[d[i] for d in deltas] for i in range(n)]
        # Shifted by the first value, so that equal ones vary by zero.
        variance = []
        for column in columns:
            shifted = [v - column[0] for v in column]
            mean = sum(shifted) / models
            variance.append(sum((v - mean) ** 2 for v in shifted) / models)
        keep = math.floor(tau * sum(v != 0 for v in variance))
        kept = sorted(range(n), key=lambda i: (-variance[i], i))[:keep]
        deltas = [[d[i] if i in kept else 0.0 for i in range(n)] for d in deltas]
    squares = [sum(v * v for v in d) / max(1, n) for d in deltas]
    total = sum(squares)
    floor = 1e-12 * sum(v * v for v in base) / max(1, n) if relative else 1e-6
    uniform = total < floor or total == 0
    weights = [1 / models if uniform else s / total for s in squares]
    out, size = [], []
    for i in range(n):
        sign = 1 if sum(d[i] for d in deltas) >= 0 else -1
        agree = [m for m in range(models) if deltas[m][i] * sign > 0]
        divisor = sum(weights[m] for m in agree) or 1.0
        mix = sum(weights[m] * deltas[m][i] for m in agree) / divisor
        out.append(base[i] + mix)
        size.append(abs(base[i]) + abs(mix))
    return out, size


def arcee_fusion(base, tensor, length):
    """The values, and the importances."""
    scores = []
    for start in range(0, len(base), length):
        x, y = base[start : start + length], tensor[start : start + length]
        q, p = ([math.exp(v - max(row)) for v in row] for row in (x, y))
        q, p = ([v / sum(row) + 1e-8 for v in row] for row in (q, p))
        divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        scores += [abs(b - a) * divergence for a, b in zip(x, y, strict=True)]
    order = sorted(scores)
    first, median, third = (order[math.floor(f * (len(order) - 1))] for f in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    taken = [b if s >= threshold else a for a, b, s in zip(base, tensor, scores, strict=True)]
    return taken, scores, threshold


def nearswap(base, tensor, t):
    out, size = [], []
    for a, c in zip(base, tensor, strict=True):
        g = min(max(t / max(abs(a - c), 1e-6), 0.0), 1.0)
        out.append(g * c + (1 - g) * a)
        size.append(abs(g * c) + abs((1 - g) * a) + (abs(a) + abs(c)) * g)
    return out, size


def ram(base, tensors, epsilon=1e-5, r=0.0, alpha=0.0):
    """RAM+ with r and alpha."""
    deltas = task_vectors(base, tensors)
    active = [[abs(v) > epsilon for v in d] for d in deltas]
    count = [sum(a[i] for a in active) for i in range(len(base))]
    scales = []
    for a in active:
        unique = sum(on and c == 1 for on, c in zip(a, count, strict=True))
        shared = sum(on and c > 1 for on, c in zip(a, count, strict=True))
        rho = shared / max(unique, epsilon) if unique else 0.0  # without unique ones, never used
        scales.append(1 + r * min(max(rho, 0.0), alpha))
    out, size = [], []
    for i, b in enumerate(base):
        terms = [
            d[i] * (scale if count[i] == 1 else 1 / count[i])
            for a, d, scale in zip(active, deltas, scales, strict=True)
            if a[i]
        ]
        out.append(b + sum(terms))
        size.append(abs(b) + sum(abs(v) for v in terms))
    return out, size
