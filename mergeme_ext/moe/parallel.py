"""Expert parallelism: the experts of a layer divided over the ranks of a process group."""

import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mergeme_ext.moe.experts import Experts
from mergeme_ext.ops import grouped_experts, sort_by_expert

__all__ = ["ParallelExperts", "full_state_dict", "run_parallel_experts", "split_experts"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def split_experts(num_experts: int, world_size: int) -> list[int]:
    """Return how many of ``num_experts`` each rank holds: as even as can be, the first ones more.

    Raises:
        ValueError: There are fewer experts than ranks.
    """
    if num_experts < world_size:
        raise ValueError(
            f"expected at least one expert for each of {world_size} ranks, got {num_experts}"
        )
    share, more = divmod(num_experts, world_size)
    return [share + (rank < more) for rank in range(world_size)]


@torch.compiler.disable
def run_parallel_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts_per_rank: Sequence[int],
    *,
    activation: str = "silu",
    sentinel: bool = False,
    capacity: int | None = None,
    priority: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return what ``run_experts`` returns, with each rank's tokens sent to the experts' ranks.

    Every rank of ``group`` calls this, each with its own tokens. Each choice of a token travels as
    one row, with its weight, to the rank of its expert, and its weighted output travels back. An
    expert sees its rows in the order of (rank, token, choice): as one process would on the ranks'
    tokens one after the other.

    Args:
        x: This rank's tokens [T, H]; T may differ between ranks and be zero.
        gate_up_proj: This rank's experts [E_r, 2I, H], dtype of ``x``: gate rows first.
        down_proj: [E_r, H, I], dtype of ``x``.
        topk_ids: int32 [T, K], each in [0, E), E the sum of ``experts_per_rank``.
        topk_weights: [T, K], float32 (float64 with float64 ``x``).
        experts_per_rank: E_r of each rank, at least 1; rank 0 has the first experts.
        activation: "silu", "gelu" or "gelu_tanh".
        sentinel: Whether an id may also be E, for no expert.
        capacity: How many choices an expert takes at most of each rank; the rest add nothing and
            do not travel. None for all.
        priority: [T, K], float32 or float64: which choices it takes, the greatest; None for the
            first.
        group: None for the default group. Any backend with all-to-all; gloo and NCCL among them.

    Returns:
        [T, H], new, dtype of ``x``; summed over k in order in float32 (float64 for float64) and
        rounded once. For half types the rows that travel back have been rounded before.

    Raises:
        TypeError: The ranks disagree on the dtype.
        ValueError: They disagree on H, I, ``activation``, ``experts_per_rank`` or on what needs a
            gradient.
        RuntimeError: Another rank's arguments were refused there. All ranks learn of all this
            before any row is sent, so that none waits for one that has left.

    Gradient: ``x``, ``topk_weights`` and the weights; all ranks must run backward. An expert's
    gradient is the sum over all ranks' tokens, and belongs to its rank alone.

    Source: GShard, Lepikhin et al. 2020, arXiv:2006.16668, section 3.3, without its fixed capacity.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    refusal, counts = None, [0] * world_size
    try:
        if len(experts_per_rank) != world_size or min(experts_per_rank) < 1:
            raise ValueError(
                f"expected experts_per_rank to have {world_size} positive numbers, "
                f"got {list(experts_per_rank)}"
            )
        _check(x, gate_up_proj, down_proj, topk_ids, topk_weights, experts_per_rank[rank])
        first = [sum(experts_per_rank[:r]) for r in range(world_size + 1)]
        offsets, permutation, inverse = sort_by_expert(
            topk_ids, first[-1], sentinel=sentinel, capacity=capacity, priority=priority
        )
        bounds = offsets[torch.tensor(first, device=offsets.device)].tolist()
        counts = [end - begin for begin, end in itertools.pairwise(bounds)]
    except Exception as error:  # raised below, once the other ranks know
        refusal = error
    received = _agree(
        counts,
        refusal,
        x,
        gate_up_proj,
        down_proj,
        topk_weights,
        (activation, *experts_per_rank),
        group,
    )

    top_k, kept = topk_ids.shape[1], bounds[-1]
    slots = permutation[:kept]
    rows = _ToRows.apply(x, slots, inverse, top_k)
    weights = topk_weights.reshape(-1)[slots]
    local_ids = topk_ids.reshape(-1)[slots] - _per_row(first, counts, slots)
    plan = _Plan(counts, received, group)
    ids = _exchange(local_ids, plan)
    rows, weights = _Exchange.apply(plan, rows, weights)
    metadata = sort_by_expert(ids[:, None], experts_per_rank[rank])
    outputs = grouped_experts(
        rows, gate_up_proj, down_proj, weights[:, None], *metadata, activation=activation
    )
    (outputs,) = _Exchange.apply(plan.back(), outputs)
    return _ToTokens.apply(outputs, slots, inverse, top_k)


class ParallelExperts(Experts):
    """The part of ``Experts`` that this rank holds, called with this rank's tokens.

    Takes and gives what ``Experts`` does; see ``run_parallel_experts``. The parameters are those of
    this rank's experts. ``load_state_dict`` takes the state dict of the whole layer in any layout,
    of which it keeps this rank's experts, or this module's own; ``full_state_dict`` puts the whole
    together again. Averaging the gradients of what is not divided, the router's for one, is left to
    the caller, as is dividing the experts' by the number of ranks where the loss is a mean.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E of the whole layer.
        group: The ranks to divide them over; None for the default group.
        activation: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        experts_per_rank: How many each rank holds; None for ``split_experts``.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        group: dist.ProcessGroup | None = None,
        experts_per_rank: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        world_size = dist.get_world_size(group)
        if experts_per_rank is None:
            experts_per_rank = split_experts(num_experts, world_size)
        counts = list(experts_per_rank)
        if len(counts) != world_size or min(counts) < 1 or sum(counts) != num_experts:
            raise ValueError(
                f"ParallelExperts: expected experts_per_rank to be {world_size} positive numbers "
                f"that add up to num_experts = {num_experts}, got {counts}"
            )
        rank = dist.get_rank(group)
        first = sum(counts[:rank])
        owned = range(first, first + counts[rank])
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            owned=owned,
            device=device,
            dtype=dtype,
        )
        self.group, self.experts_per_rank = group, counts

    @classmethod
    def from_experts(
        cls,
        experts: Experts,
        *,
        group: dist.ProcessGroup | None = None,
        experts_per_rank: Sequence[int] | None = None,
    ) -> Self:
        """Return this rank's part of ``experts``, which is the same on every rank; a copy."""
        num_experts, hidden_size, intermediate_size = experts.down_proj.shape
        part = cls(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=experts.activation,
            group=group,
            experts_per_rank=experts_per_rank,
            device="meta",
        )
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(experts, name)
            mine = whole.detach()[part.owned.start : part.owned.stop].clone()
            setattr(part, name, nn.Parameter(mine, requires_grad=whole.requires_grad))
        return part.train(experts.training)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        sentinel: bool = False,
        capacity: int | None = None,
        priority: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H]: see ``run_parallel_experts``."""
        return run_parallel_experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            topk_ids,
            topk_weights,
            self.experts_per_rank,
            activation=self.activation,
            sentinel=sentinel,
            capacity=capacity,
            priority=priority,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{super().extra_repr()}, owned={self.owned}"


def full_state_dict(module: nn.Module, dst: int | None = None) -> dict[str, Tensor]:
    """Return ``module.state_dict()`` with the experts of all ranks put together.

    Every rank of the experts' group calls this.

    Args:
        module: A ``ParallelExperts``, or anything that holds some.
        dst: The one rank of the group to get the whole; None for all.

    Returns:
        The fused layout: new tensors for the experts, the module's own for the rest. Empty on the
        ranks that are not ``dst``.
    """
    found = module.state_dict()
    wanted = True
    for prefix, experts in module.named_modules():
        if not isinstance(experts, ParallelExperts):
            continue
        rank = dist.get_rank(experts.group)
        wanted = dst in (None, rank)
        for name in ("gate_up_proj", "down_proj"):
            whole = _gather(getattr(experts, name).detach(), experts, dst)
            if wanted:
                found[f"{prefix}.{name}".lstrip(".")] = whole
    return dict(found) if wanted else {}


def _gather(part: Tensor, experts: ParallelExperts, dst: int | None) -> Tensor | None:
    """The parts of all ranks one after the other, on ``dst`` or everywhere."""
    group = experts.group
    rank, counts = dist.get_rank(group), experts.experts_per_rank
    send = [part.numel() if dst in (None, r) else 0 for r in range(len(counts))]
    wanted = dst in (None, rank)
    receive = [n * part[0].numel() if wanted else 0 for n in counts]
    source = part.reshape(-1)
    if dst is None:
        source = source.repeat(len(counts))
    whole = _exchange(source, _Plan(send, receive, group))
    return whole.view(-1, *part.shape[1:]) if wanted else None


class _Plan(NamedTuple):
    """How many rows go to each rank and come from it."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup | None

    def back(self) -> "_Plan":
        return _Plan(self.receive, self.send, self.group)


def _exchange(rows: Tensor, plan: _Plan) -> Tensor:
    out = rows.new_empty(sum(plan.receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), plan.receive, plan.send, group=plan.group)
    return out


class _Exchange(torch.autograd.Function):
    """All-to-all of several tensors' rows.

    One function for all, so that every rank runs the collectives of backward in the same order.
    """

    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(_exchange(t, plan) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        back = ctx.plan.back()
        need = ctx.needs_input_grad[1:]
        return None, *(_exchange(g, back) if n else None for g, n in zip(grads, need, strict=True))


def _gather_rows(tokens: Tensor, slots: Tensor, top_k: int) -> Tensor:
    return tokens[slots // max(top_k, 1)]


def _sum_rows(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Sum over k in order of each token's rows; a slot that was dropped has none."""
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    num_tokens = len(inverse) // top_k if top_k else 0
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=acc)
    places = inverse.view(num_tokens, top_k)
    dropped = len(rows) < len(inverse)
    for k in range(top_k):
        place = places[:, k]
        if dropped:
            kept = (place < len(rows)).nonzero().squeeze(1)
            total[kept] += rows[place[kept]]
        else:
            total += rows[place]
    return total.to(rows.dtype)


class _ToRows(torch.autograd.Function):
    """Tokens to rows sorted by expert: row r is the token of slot ``slots[r]``."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape, ctx.top_k = x.shape, top_k
        return _gather_rows(x, slots, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad_x = _sum_rows(grad, inverse, ctx.top_k).view(ctx.shape)
        return grad_x, None, None, None


class _ToTokens(torch.autograd.Function):
    """Rows to tokens, each the sum of its rows over k in order: the transpose of _ToRows."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.top_k = top_k
        return _sum_rows(rows, inverse, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slots,) = ctx.saved_tensors
        return _gather_rows(grad, slots, ctx.top_k), None, None, None


def _per_row(values: Sequence[int], counts: Sequence[int], like: Tensor) -> Tensor:
    """``values[r]`` repeated ``counts[r]`` times, as ``like``."""
    pairs = zip(values, counts, strict=False)
    return torch.cat([like.new_full((count,), value) for value, count in pairs])


def _check(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
) -> None:
    """Refuse here what the op would refuse after the rows have been sent."""
    if x.dtype not in DTYPES:
        raise TypeError(f"expected x to be one of {DTYPES}, got {x.dtype}")
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.dtype != x.dtype:
            raise TypeError(f"expected {name} to be {x.dtype}, got {weight.dtype}")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if topk_weights.dtype != acc:
        raise TypeError(f"expected topk_weights to be {acc}, got {topk_weights.dtype}")
    if x.dim() != 2:
        raise ValueError(f"expected x of shape [T, H], got {list(x.shape)}")
    if down_proj.dim() != 3:
        raise ValueError(f"expected down_proj of shape [E, H, I], got {list(down_proj.shape)}")
    hidden, intermediate = x.shape[1], down_proj.shape[2]
    expected = {
        "gate_up_proj": (gate_up_proj, (num_experts, 2 * intermediate, hidden)),
        "down_proj": (down_proj, (num_experts, hidden, intermediate)),
        "topk_ids": (topk_ids, (len(x), *topk_ids.shape[1:2])),
        "topk_weights": (topk_weights, tuple(topk_ids.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or (name == "topk_ids" and tensor.dim() != 2):
            raise ValueError(f"expected {name} of shape {list(shape)}, got {list(tensor.shape)}")


def _agree(
    counts: list[int],
    refusal: Exception | None,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    settings: Sequence[object],
    group: dist.ProcessGroup | None,
) -> list[int]:
    """Exchange the counts of rows, and with them all that the ranks must agree on.

    Returns:
        How many rows come from each rank. Raises on every rank if there is anything amiss on one.
    """
    grad = torch.is_grad_enabled()
    facts = {
        "dtype": DTYPES.index(x.dtype) if x.dtype in DTYPES else -1,
        "hidden size": x.shape[-1] if x.dim() else -1,
        "intermediate size": down_proj.shape[-1] if down_proj.dim() else -1,
        "activation and experts_per_rank (a checksum)": zlib.crc32(repr(settings).encode()),
        "gradient of x": int(grad and x.requires_grad),
        "gradient of topk_weights": int(grad and topk_weights.requires_grad),
        "gradient of the experts": int(
            grad and (gate_up_proj.requires_grad or down_proj.requires_grad)
        ),
    }
    # A row for each rank: the count meant for it, whether all is well here, and the facts.
    mine = [[count, refusal is None, *facts.values()] for count in counts]
    table = torch.tensor(mine, dtype=torch.int64, device=x.device)
    theirs = torch.empty_like(table)
    dist.all_to_all_single(theirs, table, group=group)
    rows = theirs.tolist()
    if refusal is not None:
        raise refusal
    if unwell := [rank for rank, row in enumerate(rows) if not row[1]]:
        raise RuntimeError(
            f"run_parallel_experts: arguments were refused on ranks {unwell}; see the error there"
        )
    for column, name in enumerate(facts, start=2):
        by_value: dict[object, list[int]] = {}
        for rank, row in enumerate(rows):
            value = DTYPES[row[column]] if name == "dtype" else row[column]
            by_value.setdefault(value, []).append(rank)
        if len(by_value) > 1:
            got = ", ".join(f"{value} on ranks {ranks}" for value, ranks in by_value.items())
            raise (TypeError if name == "dtype" else ValueError)(
                f"run_parallel_experts: expected all ranks to have the same {name}, got {got}"
            )
    return [row[0] for row in rows]
