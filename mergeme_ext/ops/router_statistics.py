"""Router statistics: what the auxiliary losses of a router are made of."""

import torch
from torch import Tensor

__all__ = ["router_statistics"]


def router_statistics(
    logits: Tensor, topk_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how often ``topk_ids`` names each expert, and sums over ``logits``'s rows.

    Args:
        logits: Router output ``[T, E]``: tokens by experts.
        topk_ids: int32 ``[T, K]``, each in ``[0, E)``: the experts the tokens went to. K may be 0.
        mask: bool ``[T]``: the tokens that count; None for all.

    Returns:
        ``counts``, int32 ``[E]``: the slots of each expert. ``probability_sums``, ``[E]``: the sum
        over tokens of ``softmax(logits)``. ``lse_squares``, a scalar: the sum over tokens of the
        square of ``log(sum_e exp(logits))``. The last two are float32 (float64 for float64
        logits), summed in that type: in token order in chunks of at least 16 tokens, whose length
        depends on T alone, then over chunks. So they do not depend on the number of threads, and
        all devices give the same bits. All new.

        A NaN makes the sums NaN. The softmax of a row of only -inf is taken as 0, and its square
        is inf.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match.
        IndexError: An id is outside ``[0, E)`` (CPU; on CUDA the kernel asserts).

    Gradient: ``logits``; ``counts`` has none.

    Source: Fedus, Zoph and Shazeer 2021 (Switch Transformers), arXiv:2101.03961, eqs. 5 and 6 (f
    and P are the first two, divided by T); Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, eq. 5.
    """
    return torch.ops.mergeme.router_statistics.default(logits, topk_ids, mask)


def _fake(logits, topk_ids, mask=None):
    num_experts = logits.shape[1]
    sum_type = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=sum_type),
        logits.new_empty((), dtype=sum_type),
    )


def _fake_backward(grad_sums, grad_squares, logits, mask=None):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, _, mask = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits, mask)


def _refuse_second_order(ctx, grad):
    raise NotImplementedError(
        "mergeme::router_statistics_backward: second derivatives of router_statistics are not "
        "supported"
    )


def register(namespace: str) -> None:
    """Give ``namespace``'s ops their fakes and backwards."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx, _, grad_sums, grad_squares):
        logits, mask = ctx.saved_tensors
        op = ops.router_statistics_backward.default
        return op(grad_sums, grad_squares, logits, mask), None, None

    name = f"{namespace}::router_statistics"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(f"{name}_backward", _refuse_second_order)


register("mergeme")
