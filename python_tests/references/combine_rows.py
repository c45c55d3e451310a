"""float64 linear combinations with weights by row or column, one loop."""

import torch


def combine_rows(base, tensors, weights, axis, offset, row_length):
    value, magnitude = [], []
    zero = torch.zeros_like(tensors[0]) if base is None else base
    for i in range(tensors[0].numel()):
        at = offset + i
        group = {"all": 0, "row": at // row_length, "column": at % row_length}[axis]
        b = zero[i].item()
        terms = [
            w * (t[i].item() - b) for w, t in zip(weights[group].tolist(), tensors, strict=True)
        ]
        sizes = [
            abs(w) * (abs(t[i].item()) + abs(b))
            for w, t in zip(weights[group].tolist(), tensors, strict=True)
        ]
        value.append(b + sum(terms))
        magnitude.append(abs(b) + sum(sizes))
    return (
        torch.tensor(value, dtype=torch.float64),
        torch.tensor(magnitude, dtype=torch.float64),
    )
