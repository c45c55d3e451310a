"""Models of several tensors, merged as the engine merges them: survey, then chunk by chunk."""

import json

import torch

from mergeme_ext.merging import get
from mergeme_ext.merging.registry import Visit

SHAPES = {
    "embed": (7, 12),
    "layer.0": (12, 12),
    "norm": (12,),
    "layer.1": (5, 12),
    "empty": (0, 12),
}


def make_model(dtype, models=3, seed=0, shapes=SHAPES):
    """From tensor name to (base, tuned weights); about a third of the elements are unchanged."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        base = torch.randn(shape, generator=g, dtype=torch.float64)
        tuned = []
        for _ in range(models):
            delta = torch.randn(shape, generator=g, dtype=torch.float64)
            tuned.append(base + 0.3 * delta * (torch.rand(shape, generator=g) < 0.7))
        out[name] = base.to(dtype), [t.to(dtype) for t in tuned]
    return out


def split_model(base, tensors, sizes):
    """Cut flat vectors into a model of several tensors."""
    parts = zip(base.split(sizes), *(t.split(sizes) for t in tensors), strict=True)
    return {f"t{i}": (first, list(rest)) for i, (first, *rest) in enumerate(parts)}


def joined(model):
    """The base and the models as one float64 vector each."""
    count = len(next(iter(model.values()))[1])
    base = torch.cat([b.flatten().double() for b, _ in model.values()])
    return base, [
        torch.cat([t[m].flatten().double() for _, t in model.values()]) for m in range(count)
    ]


def survey_model(method, model, parameters, statistics=None):
    """The survey, as it comes back from a file; and the number of rounds that it took."""
    rounds = 0

    def visits():
        nonlocal rounds
        rounds += 1
        for name, (base, tensors) in model.items():
            yield Visit(name, base, tensors, (statistics or {}).get(name))

    bound = get(method).bind(len(next(iter(model.values()))[1]), parameters)
    survey = None if get(method).survey is None else get(method).survey(visits, bound)
    return json.loads(json.dumps(survey)), rounds


def merge_model(method, model, *, chunk=10**9, statistics=None, notes=None, **parameters):
    """The merged tensors by name."""
    method = get(method)
    bound = method.bind(len(next(iter(model.values()))[1]), parameters)
    survey, _ = survey_model(method.name, model, parameters, statistics)
    out = {}
    for name, (base, tensors) in model.items():
        combine = method.prepare(
            base,
            tensors,
            bound,
            tensor_name=name,
            survey=survey,
            statistics=(statistics or {}).get(name),
            notes=notes,
        )
        step = chunk
        if method.whole_rows:
            step = max(1, chunk // max(1, base.shape[-1])) * max(1, base.shape[-1])
        flat = [t.flatten() for t in (base, *tensors)]
        parts = [
            combine(flat[0][i : i + step], [t[i : i + step] for t in flat[1:]], i)
            for i in range(0, base.numel(), step)
        ]
        assert all(p.dtype == base.dtype for p in parts)
        merged = torch.cat(parts) if parts else flat[0]
        out[name] = merged.view(base.shape)
    return out


def vector(merged):
    """The merged tensors as one vector."""
    return torch.cat([t.flatten() for t in merged.values()])


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
