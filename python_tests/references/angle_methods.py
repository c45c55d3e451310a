"""float64 references of the methods that work with angles: the cards' formulas on lists of numbers.

Each returns the merged values and the sum of absolute terms behind each, for rounding bounds.
They iterate on whole vectors, as the formulas are written.
"""

import math


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def norm(x):
    return math.sqrt(dot(x, x))


def mix(weights, vectors, base=None):
    """base + sum of weights * vectors, and the absolute terms."""
    out, size = [], []
    for i in range(len(vectors[0])):
        start = 0.0 if base is None else base[i]
        out.append(start + math.fsum(w * v[i] for w, v in zip(weights, vectors, strict=True)))
        terms = [
            abs(w) * (abs(v[i]) + 2 * abs(start)) for w, v in zip(weights, vectors, strict=True)
        ]
        size.append(abs(start) + math.fsum(terms))
    return out, size


def arc(x, y, t, smallest_norm, largest_cosine=1.0, smallest_sine=1e-8):
    nx, ny = max(norm(x), smallest_norm), max(norm(y), smallest_norm)
    cosine = max(-1.0, min(1.0, dot(x, y) / (nx * ny)))
    angle = math.acos(cosine)
    if abs(cosine) > largest_cosine or abs(math.sin(angle)) < smallest_sine:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(base, tensor, t):
    return mix(arc(base, tensor, t, 1e-8, largest_cosine=0.9995), [base, tensor])


def split(x, shape, axis):
    """Pairs of the places of a vector's elements and the elements."""
    rows, length = shape
    if axis == "all":
        places = [range(rows * length)]
    elif axis == "row":
        places = [range(r * length, (r + 1) * length) for r in range(rows)]
    else:
        places = [range(c, rows * length, length) for c in range(length)]
    return [(p, [x[i] for i in p]) for p in places]


def by_axis(function, base, tensors, shape, axis):
    """Apply a function of (base, tensors) to each vector of the tensors by itself."""
    out, size = [0.0] * len(tensors[0]), [0.0] * len(tensors[0])
    parts = [split(t, shape, axis) for t in tensors]
    bases = [None] * len(parts[0]) if base is None else [b for _, b in split(base, shape, axis)]
    for number, part in enumerate(zip(*parts, strict=True)):
        places = part[0][0]
        values, sizes = function(bases[number], [x for _, x in part])
        for i, value, s in zip(places, values, sizes, strict=True):
            out[i], size[i] = value, s
    return out, size


def deltas(base, tensors):
    if base is None:
        return tensors
    return [[a - b for a, b in zip(t, base, strict=True)] for t in tensors]


def nuslerp(base, tensors, weights, shape, axis):
    total = sum(weights)
    t = weights[1] / total if abs(total) >= 1e-6 else 0.5

    def one(base, tensors):
        x, y = deltas(base, tensors)
        return mix(arc(x, y, t, 1e-7), [x, y], base)

    return by_axis(one, base, tensors, shape, axis)


def multislerp(base, tensors, weights, normalize=True, eps=1e-8):
    xs = deltas(base, tensors)
    total = sum(weights) if normalize else 1.0
    w = [v / total for v in weights]
    norms = [norm(x) for x in xs]
    units = [[v / (n + eps) for v in x] for x, n in zip(xs, norms, strict=True)]
    mean, _ = mix(w, units)
    m = [v / norm(mean) for v in mean]
    tangents = [[a - dot(u, m) * b for a, b in zip(u, m, strict=True)] for u in units]
    g, _ = mix(w, tangents)
    a = norm(g) + eps
    length = sum(v * n for v, n in zip(w, norms, strict=True))
    out = [(x * math.cos(a) + y * math.sin(a) / a) * length for x, y in zip(m, g, strict=True)]
    factors = [v / (n + eps) * length / norm(mean) for v, n in zip(w, norms, strict=True)]
    _, size = mix(factors, xs, base)
    if base is not None:
        out = [b + o for b, o in zip(base, out, strict=True)]
    return out, size


def model_stock(base, tensors, shape, axis="all", clamp=False):
    def one(base, tensors):
        ds, count = deltas(base, tensors), len(tensors)
        cosines = []
        for j in range(count):
            for i in range(j):
                product = max(norm(ds[i]) * norm(ds[j]), 1e-6)
                cosines.append(max(-1.0, min(1.0, dot(ds[i], ds[j]) / product)))
        c = sum(cosines) / len(cosines)
        t = count * c / (1 + (count - 1) * c)
        if clamp:
            t = max(0.0, min(1.0, t))
        return mix([t / count] * count, ds, base)

    return by_axis(one, base, tensors, shape, axis)


def karcher(tensors, weights, max_iter=10, tol=1e-5):
    total = sum(weights)
    length = sum(w / total * norm(x) for w, x in zip(weights, tensors, strict=True))
    kept = [(w, x) for w, x in zip(weights, tensors, strict=True) if norm(x) > tol and w > 0]
    total = sum(w for w, _ in kept)
    a = [w / total for w, _ in kept]
    units = [[v / norm(x) for v in x] for _, x in kept]
    start, _ = mix(a, units)
    u = [v / norm(start) for v in start] if norm(start) >= tol else units[0]
    for _ in range(max_iter):
        force = [0.0] * len(u)
        for weight, unit in zip(a, units, strict=True):
            cosine = max(-1.0, min(1.0, dot(u, unit)))
            angle = math.acos(cosine)
            if angle < tol:
                continue
            factor = weight * angle / math.sin(angle)
            force = [f + factor * (v - cosine * o) for f, v, o in zip(force, unit, u, strict=True)]
        step = norm(force)
        if step < tol:
            break
        u = [math.cos(step) * o + math.sin(step) / step * f for o, f in zip(u, force, strict=True)]
        u = [o / norm(u) for o in u]
    out = [o * length for o in u]
    size = [
        length * math.fsum(abs(x[i]) for x in units) + abs(out[i]) for i in range(len(tensors[0]))
    ]
    return out, size
