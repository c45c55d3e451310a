"""float64 reference: one slot at a time, with the class's own gate, norm and weights."""

import contextlib

import torch


@contextlib.contextmanager
def all_float64():
    """Keeps a class's ``x.float()`` from rounding float64."""
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else narrow(x)
    try:
        yield
    finally:
        torch.Tensor.float = narrow


def experts_interface(module, x, topk_ids, topk_weights):
    """``module`` and the inputs are float64; differentiable."""

    def linear(x, name, e):
        weight = getattr(module, name)[e]
        y = x @ weight if module.is_transposed else weight @ x
        return y + getattr(module, f"{name}_bias")[e] if module.has_bias else y

    out = [torch.zeros_like(token) for token in x]
    with all_float64():
        for t, ids in enumerate(topk_ids.tolist()):
            for k, e in enumerate(ids):
                if e == module.num_experts:  # another process's expert
                    continue
                y = linear(x[t], "gate_up_proj" if module.has_gate else "up_proj", e)
                y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
                y = linear(y, "down_proj", e)
                if module.has_post_expert_norm:
                    y = module.post_expert_norm(y)
                out[t] = out[t] + topk_weights[t, k] * y
    return torch.stack(out) if out else torch.zeros_like(x)
