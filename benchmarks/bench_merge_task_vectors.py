"""The merges people make, cuts given, against the same steps in torch."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.merge_inputs import models

OP = "merge_task_vectors"
_Q_PROJ = {"shape": (4096, 4096), "models": 3, "dtype": torch.bfloat16}
CASES = {
    "smoke": {**_Q_PROJ, "shape": (64, 64), "mask": "random", "elect": "sum"},
    "task_arithmetic": {**_Q_PROJ, "mask": "all", "elect": "none"},
    "ties": {**_Q_PROJ, "mask": "magnitude", "elect": "sum"},
    "dare_linear": {**_Q_PROJ, "mask": "random", "elect": "none"},
    "dare_ties": {**_Q_PROJ, "mask": "random", "elect": "sum"},
    "ties_float32": {**_Q_PROJ, "dtype": torch.float32, "mask": "magnitude", "elect": "sum"},
    "ties_eight_models": {**_Q_PROJ, "models": 8, "mask": "magnitude", "elect": "sum"},
}


def make(case, device):
    base, tensors = models(case, device)
    # A probability of one, so that torch's own random mask agrees; the bits are drawn all the same.
    selection = torch.tensor([[1.0, 0.0]] * len(tensors), dtype=torch.float64, device=device)
    if case["mask"] == "magnitude":
        keep = [int(0.8 * base.numel())] * len(tensors)
        selection = mergeme_ext.magnitude_threshold(base, tensors, keep)
    weights = torch.linspace(0.5, 1.5, len(tensors), dtype=torch.float64, device=device)
    return base, tensors, weights, selection, case["mask"], case["elect"]


def work(case):
    numel = case["shape"][0] * case["shape"][1]
    # Base and models read and the result written once; the flops are those of task arithmetic.
    return (case["models"] + 2) * numel * case["dtype"].itemsize, (3 * case["models"] + 2) * numel


def _ours(base, tensors, weights, selection, mask, elect):
    ones = torch.ones_like(weights)
    options = {"mask": mask, "elect": elect, "normalize": elect == "sum", "key": 1}
    return mergeme_ext.merge_task_vectors(base, tensors, weights, ones, selection, **options)


def _eager(base, tensors, weights, selection, mask, elect):
    wide = base.float()
    x = torch.stack([t.float() - wide for t in tensors])
    if mask == "random":
        x = torch.stack(
            [d * torch.empty_like(d).bernoulli_(p) for d, p in zip(x, selection[:, 0], strict=True)]
        )
    elif mask == "magnitude":
        x = torch.where(x.abs() >= selection[:, 0].float().view(-1, 1, 1), x, 0)
    w = weights.float().view(-1, 1, 1)
    v = w * x
    if elect == "none":
        return (wide + v.sum(0)).to(base.dtype)
    agree = v.sign() == torch.where(v.sum(0) >= 0, 1.0, -1.0)
    by = (w * agree).sum(0)
    return (wide + (v * agree).sum(0) / torch.where(by == 0, 1.0, by)).to(base.dtype)


CONTENDERS = {"mergeme": _ours, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)
