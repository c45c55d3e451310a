"""Auxiliary losses of a router: balanced load, small logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.ops import router_statistics

__all__ = ["load_balancing_loss", "pooled_load_balancing_loss", "router_z_loss"]


def _as_mask(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """Bool [T] on the device of ``logits``, from a mask of any shape and number type."""
    if mask is None:
        return None
    if mask.numel() != logits.shape[0]:
        raise ValueError(
            f"expected mask to have one element for each of the {logits.shape[0]} rows of logits, "
            f"got shape {list(mask.shape)}"
        )
    return (mask.reshape(-1) != 0).to(logits.device)


def _num_tokens(logits: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many tokens count; at least 1, so that no tokens have a loss of 0."""
    return max(logits.shape[0], 1) if mask is None else mask.sum().clamp(min=1)


def load_balancing_loss(logits: Tensor, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the Switch load-balancing loss of one layer's router ``logits``.

    With T tokens, ``E * sum_e f_e P_e``, where ``f_e`` is the number of slots that expert e has in
    ``topk_ids`` over T, and ``P_e`` the mean of its probability ``softmax(logits)_e``. Perfect
    balance gives K. The choice is piecewise constant: gradients flow through ``P`` alone.

    Args:
        logits: Router output [T, E].
        topk_ids: int32 [T, K], each in [0, E): the experts the tokens went to.
        mask: The tokens that count, not 0 where they do: T elements of any shape and type, such as
            an attention mask [B, S]; None for all.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 if no token counts.

    Raises:
        ValueError: ``mask`` does not have T elements, or a shape does not match.

    Source: Fedus, Zoph and Shazeer 2021 (Switch Transformers), arXiv:2101.03961, eqs. 4 to 6, less
    its factor alpha. Departs from it for K > 1, which it does not have: f counts all K choices and
    sums to K, as in transformers.
    """
    return pooled_load_balancing_loss([logits], [topk_ids], mask=mask)


def pooled_load_balancing_loss(
    logits: Sequence[Tensor], topk_ids: Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """Return the load-balancing loss of the tokens of all layers taken together.

    ``E * sum_e f_e P_e`` as in ``load_balancing_loss``, with f and P over the tokens of all
    layers: only the load summed over layers is asked to be balanced. It equals transformers'
    ``load_balancing_loss_func`` where the layers chose the K largest logits.

    Args:
        logits: A router's output [T, E] for each layer, all of one shape. They may lie on several
            devices; the loss is formed on the first one's.
        topk_ids: int32 [T, K] for each layer.
        mask: The tokens that count, the same in each layer; see ``load_balancing_loss``.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 if no token counts.

    Raises:
        ValueError: There is no layer, there are not as many ``topk_ids`` as ``logits``, ``mask``
            does not have T elements, or a shape does not match.

    Source: Fedus, Zoph and Shazeer 2021, arXiv:2101.03961, eqs. 4 to 6, applied to the concatenated
    layers, as Mixtral's implementation in transformers does (Jiang et al. 2024, arXiv:2401.04088).
    """
    if len(logits) == 0 or len(logits) != len(topk_ids):
        raise ValueError(
            "expected logits and topk_ids to have one tensor for each layer, "
            f"got {len(logits)} and {len(topk_ids)}"
        )
    device = logits[0].device
    counts, probabilities, tokens = 0, 0, 0
    for layer, ids in zip(logits, topk_ids, strict=True):
        layer_mask = _as_mask(mask, layer)
        layer_counts, layer_probabilities, _ = router_statistics(layer, ids, layer_mask)
        counts = counts + layer_counts.to(device)
        probabilities = probabilities + layer_probabilities.to(device)
        layer_tokens = _num_tokens(layer, layer_mask)
        tokens = tokens + (layer_tokens if layer_mask is None else layer_tokens.to(device))
    share = counts.to(probabilities.dtype) / tokens
    return len(share) * (share * (probabilities / tokens)).sum()


def router_z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ``log(sum_e exp(logits_e))^2``, which keeps logits small.

    Args:
        logits: Router output [T, E].
        mask: The tokens that count; see ``load_balancing_loss``.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 if no token counts.

    Raises:
        ValueError: ``mask`` does not have T elements, or ``logits`` is not [T, E].

    Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, eq. 5, less its coefficient (0.001 there).
    """
    rows = _as_mask(mask, logits)
    no_ids = logits.new_empty((logits.shape[0], 0), dtype=torch.int32)
    _, _, squares = router_statistics(logits, no_ids, rows)
    return squares / _num_tokens(logits, rows)
