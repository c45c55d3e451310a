"""Linear combinations with weights for each row or column against torch's broadcasting."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES as WEIGHTS
from benchmarks.task_vectors import bytes_read, bytes_written, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "combine_rows"
CASES = {
    f"{name}_{axis}" if name != "smoke" else name: {**case, "axis": axis}
    for name, case in WEIGHTS.items()
    for axis in (["row"] if name == "smoke" else ["row", "column"])
}


def make(case, device):
    base, tensors = make_weights(case, device)
    groups = case["shape"][0 if case["axis"] == "row" else 1]
    weights = torch.linspace(0.5, 1.5, groups * case["models"], dtype=torch.float64)
    return base, tensors, weights.view(groups, -1).to(device), case["axis"]


def work(case):
    return bytes_read(case) + bytes_written(case), 3 * case["models"] * numel(case)


def _mergeme(base, tensors, weights, axis):
    flat = [t.view(-1) for t in tensors]
    options = {"axis": axis, "row_length": base.shape[1]}
    return mergeme_ext.combine_rows(base.view(-1), flat, weights, **options).view(base.shape)


def _eager(base, tensors, weights, axis):
    wide = base.float()
    out = wide.clone()
    for tensor, weight in zip(tensors, weights.float().unbind(1), strict=True):
        out.addcmul_(tensor.float().sub_(wide), weight[:, None] if axis == "row" else weight)
    return out.to(base.dtype)


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)
