"""Top-k gating: which experts a token goes to, and with which weights."""

import torch
from torch import Tensor

__all__ = ["topk_gating"]


def topk_gating(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` experts of every row of ``logits`` and their gate weights.

    Args:
        logits: Router output ``[T, E]``: tokens by experts.
        bias: float32 ``[E]`` added to the scores for the choice only, never in the weights; None
            for no bias.
        top_k: K, in ``[1, E]``.
        score: ``"softmax"`` over the E logits; of each logit, ``"sigmoid"`` or ``"sqrtsoftplus"``,
            the root of log(1 + exp(logit)); or ``"none"``, the logit itself (a probability, say).
        renormalize: Divide the K scores by their sum. With softmax this is the softmax over the K
            selected logits (top-k then softmax), and computed as such; with sigmoid and
            sqrtsoftplus the quotient is formed from shares that do not underflow where the scores
            do.
        scale: Factor on the final weights, dimensionless.
        num_groups: G, a divisor of E, at most 1024: group g holds the experts from g * E / G on.
        top_groups: Experts are chosen from this many groups, those of the greatest group score; of
            equal ones the lower first. They must hold at least K experts.
        group_score: Of a group: ``"max"``, the largest score plus bias in it, or ``"top2"``, the
            sum of the two largest.

    Returns:
        ``topk_ids``, int32 ``[T, K]``, distinct in a row, by descending score plus bias; of equal
        ones the lower expert first. ``topk_weights``, ``[T, K]``, float32 (float64 for float64
        logits). Both new and contiguous. Arithmetic is in float32 (float64 for float64 logits), in
        one order on all devices: all give the same bits. Without a bias the logits themselves are
        compared, so that scores which round to one number keep their order. In float32 an
        exponential below 2^-126 is taken as 0.

        A row with a NaN, in the logits or in score plus bias, gets NaN weights and valid ids. With
        softmax a logit of +inf gives NaN, as in torch. Where all scores that are summed are
        exactly zero, their logits being -inf (0 with ``score="none"``), the weights are 0.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or ``top_k``, ``score`` or an argument of the
            groups is not among the allowed.

    Gradient: ``logits``, in closed form from ``topk_weights`` (the choice is piecewise constant).
    With ``top_k=1``, ``score="softmax"`` and ``renormalize=True`` the weight is always ``scale``
    and the gradient exactly 0.

    Source: Shazeer et al. 2017, arXiv:1701.06538 (softmax over the K kept logits), with the order
    of Mixtral, Jiang et al. 2024, arXiv:2401.04088 (equal to it); selection bias and sigmoid
    scores: DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, eqs. 13 to 16, and its section 2.1.2
    for groups (there of a node's experts) ranked by the sum of their best scores; groups ranked by
    their maximum: DeepSeek-V2, arXiv:2405.04434, section 2.2.2. Experts outside the top groups are
    never chosen, as if their score were -inf; some implementations set it to 0 instead, which
    exceeds a negative score plus bias.
    """
    return torch.ops.mergeme.topk_gating.default(
        logits,
        bias,
        top_k,
        score=score,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )


def _fake(logits, bias, top_k, **options):
    shape = (logits.shape[0], top_k)
    weight_type = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=weight_type)


def _fake_backward(grad, logits, topk_ids, *, score="softmax", renormalize=True, scale=1.0):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    topk_ids, _ = output
    ctx.mark_non_differentiable(topk_ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], topk_ids)
    ctx.options = {name: keyword_only_inputs[name] for name in ("score", "renormalize", "scale")}


def _refuse_second_order(ctx, grad):
    raise NotImplementedError(
        "mergeme::topk_gating_backward: second derivatives of topk_gating are not supported"
    )


def register(namespace: str) -> None:
    """Give ``namespace``'s ops their fakes and backwards."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx, _, grad):
        if grad is None:
            return None, None, None
        logits, topk_ids = ctx.saved_tensors
        grad_logits = ops.topk_gating_backward.default(grad, logits, topk_ids, **ctx.options)
        return grad_logits, None, None

    name = f"{namespace}::topk_gating"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(f"{name}_backward", _refuse_second_order)


register("mergeme")
