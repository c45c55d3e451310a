"""The toy task vectors that the worked examples use, and what the method tests share."""

import torch

from python_tests.support.tolerance import assert_within_rounding

BASE = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
DELTAS = torch.tensor(
    [
        [0.5, -0.125, 0.0, 0.75, -0.625, 0.0625],
        [-0.25, -0.375, 1.0, 0.125, -0.5, 0.0],
        [0.125, 0.625, 0.25, -0.75, 0.375, -0.0625],
    ]
)
MODELS = [BASE + d for d in DELTAS]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_example(out, expected):
    """Worked examples are printed to six digits."""
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=1e-5)


def make(dtype, shape=(9, 13), models=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    tuned = [
        base + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(models)
    ]
    return base.to(dtype), [t.to(dtype) for t in tuned]


def flat(tensor):
    return tensor.double().flatten().tolist()


def assert_close(out, reference, terms):
    value, size = (torch.tensor(x, dtype=torch.float64).view(out.shape) for x in reference)
    assert_within_rounding(out, value, size, terms=terms)


def in_chunks(method, base, models, chunk, *, tensor_name="", **parameters):
    """What ``method`` merges to when its function is given stretches of ``chunk`` elements."""
    bound = method.bind(len(models), parameters)
    combine = method.prepare(base, models, bound, tensor_name=tensor_name)
    like, flats = models[0], [t.reshape(-1) for t in models]
    if method.whole_rows:
        chunk = max(1, chunk // like.shape[-1]) * like.shape[-1]
    parts = []
    for start in range(0, like.numel(), chunk):
        stretch = slice(start, start + chunk)
        flat_base = None if base is None else base.reshape(-1)[stretch]
        parts.append(combine(flat_base, [t[stretch] for t in flats], start))
    return torch.cat(parts).view_as(like)


def terms_of(dtype, num_models):
    """Roundings in a combination of models whose weights were found in float64.

    Float64 inputs feel those of the weights too: of sums of the 117 elements that ``make`` gives,
    and of a few functions of them.
    """
    return 2 * num_models + (500 if dtype == torch.float64 else 4)
