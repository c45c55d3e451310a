"""Expert parallelism: the experts of a layer divided over the ranks of a process group."""

import itertools
import zlib
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mergeme_ext.moe.exchange import Plan, exchange, exchange_rows, rows_to_tokens, tokens_to_rows
from mergeme_ext.moe.experts import Experts, multiply_experts
from mergeme_ext.ops import sort_by_expert

__all__ = [
    "ParallelExperts",
    "full_state_dict",
    "parallel_parameter_names",
    "run_parallel_experts",
    "split_experts",
]

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
    cache: bool = False,
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
        cache: See ``multiply_experts``.
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
    rows = tokens_to_rows(x, slots, inverse, top_k)
    weights = topk_weights.reshape(-1)[slots]
    local_ids = topk_ids.reshape(-1)[slots] - _per_row(first, counts, slots)
    plan = Plan(counts, received, group)
    ids = exchange(local_ids, plan)
    rows, weights = exchange_rows(plan, rows, weights)
    routing = sort_by_expert(ids[:, None], experts_per_rank[rank])
    outputs = multiply_experts(
        rows,
        gate_up_proj,
        down_proj,
        weights[:, None],
        routing,
        activation=activation,
        cache=cache,
    )
    (outputs,) = exchange_rows(plan.back(), outputs)
    return rows_to_tokens(outputs, slots, inverse, top_k)


class ParallelExperts(Experts):
    """The part of ``Experts`` that this rank holds, called with this rank's tokens.

    Takes and gives what ``Experts`` does; see ``run_parallel_experts``. The parameters are those of
    this rank's experts. ``load_state_dict`` takes the state dict of the whole layer in any layout,
    of which it keeps this rank's experts, or this module's own; ``full_state_dict`` puts the whole
    together again.

    The experts' gradients are sums over the tokens of all ranks; what is not divided, the router
    for one, gets this rank's only. Averaging those is left to the caller, as is dividing the
    experts' by the number of ranks where each rank's loss is a mean. DistributedDataParallel would
    average the experts too, as if all ranks held the same ones: have it leave out
    ``parallel_parameter_names``.

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
            cache=not self.training,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{super().extra_repr()}, owned={self.owned}"


def parallel_parameter_names(module: nn.Module) -> list[str]:
    """Return the names of ``module``'s parameters that differ from rank to rank.

    For ``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)``,
    which is to be called before wrapping ``module``.
    """
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, experts in module.named_modules()
        if isinstance(experts, ParallelExperts)
        for name, _ in experts.named_parameters()
    ]


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
    whole = exchange(source, Plan(send, receive, group))
    return whole.view(-1, *part.shape[1:]) if wanted else None


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
