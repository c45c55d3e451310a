"""Calls of ops that reach every synchronising instruction of their kernels.

Blocks take several tiles, so that shared memory is used again: the launchers think that three
blocks fit the device at one time. Reductions run through their ring of stages more than once, and
the last tiles, stages and rows are partial. Where work is dealt out by a grid of any size, the grid
is made small.
"""

from dataclasses import replace

import torch

import mergeme_ext
from python_tests.ops import test_first_nonfinite as nonfinite
from python_tests.ops import test_grouped_experts as experts
from python_tests.ops import test_grouped_matmul as matmul
from python_tests.ops import test_sort_by_expert as sorting
from python_tests.ptx.mutation import Call

# Rows of each expert by the height of the tile that they get, see python_tests/cuda/test_tiles.py.
HEIGHTS = {16: [3, 0, 17, 2], 32: [9, 33, 0, 18], 64: [60, 0, 27, 5], 128: [130, 0, 77, 1]}


MANY = [1, 0, 3] * 100  # more experts than the plan takes at once


def normal(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def product(layout, counts, inner, outer, dtype):
    a, b, offsets = matmul.make(layout, counts, inner, outer, dtype)
    offsets = offsets.clamp(max=int(offsets[-1]) - 1)  # the last row belongs to no expert
    return Call(lambda ops: (getattr(ops, f"grouped_matmul_{layout}")(a, b, offsets),))


def products():
    bf16, f32 = torch.bfloat16, torch.float32
    for height, counts in HEIGHTS.items():
        inner = 264 if height == 128 else 456
        yield product("nt", counts, inner, 152, bf16)
        yield product("nn", counts, inner, 152, bf16)
        if height == 128:  # the last zeros land where the sums pass through
            yield product("nt", counts, 200, 152, bf16)
            yield product("nn", counts, 200, 152, bf16)
    yield product("tn", [300, 0, 40, 70], 136, 72, bf16)
    yield product("tn", [170, 0, 0, 9], 136, 72, bf16)
    for layout in ("nt", "nn", "tn"):
        yield product(layout, [70, 0, 30], 40, 72, f32)
    yield replace(product("nt", MANY, 8, 8, f32), kernel="plan_kernel")


def expert_calls(counts, hidden, intermediate, dtype):
    args = experts.make(counts, 2, hidden, intermediate, dtype)
    args = (*args[:4], args[4].clamp(max=sum(counts) - 3), *args[5:])
    grad = normal(*args[0].shape, dtype=dtype, seed=2)
    _, saved = torch.ops.mergeme_simt.grouped_experts(*args, save=True)
    yield Call(lambda ops: (ops.grouped_experts(*args)[0],))
    yield Call(lambda ops: ops.grouped_experts(*args, save=True))
    for wanted in range(4):  # one gradient, so that few kernels run
        mask = [wanted == i for i in range(4)]
        yield Call(
            lambda ops, m=mask: ops.grouped_experts_backward(grad, *args, saved, output_mask=m)
        )


def all_experts():
    yield from expert_calls(HEIGHTS[16], 456, 200, torch.bfloat16)
    yield from expert_calls(HEIGHTS[128], 168, 136, torch.bfloat16)
    yield from expert_calls([40, 0, 17, 3], 24, 136, torch.float32)
    yield replace(next(expert_calls(MANY, 8, 8, torch.float32)), kernel="plan_kernel")


def sorts():
    for shape in ((421, 5, 17), (900, 5, 17), (700, 1, 4100)):
        ids = sorting.make(*shape)
        yield Call(lambda ops, ids=ids, e=shape[2]: ops.sort_by_expert(ids, e))
    ids = sorting.make(60, 3, 5)
    keys = sorting.make_priority(ids, torch.float32)
    yield Call(lambda ops: ops.sort_by_expert(ids, 5, keys, capacity=11))


def statistics():
    for tokens, num_experts in ((70, 9), (5, 4100)):
        z = normal(tokens, num_experts)
        ids = torch.topk(z, 2).indices.int()
        mask = torch.arange(tokens) % 3 > 0
        yield Call(lambda ops, z=z, ids=ids: ops.router_statistics(z, ids))
        yield Call(lambda ops, z=z, ids=ids, m=mask: ops.router_statistics(z, ids, m))


def gates():
    for num_experts, top_k, options in (
        (40, 3, {"num_groups": 8, "top_groups": 4}),
        (40, 20, {}),
        (1100, 3, {"num_groups": 4, "top_groups": 2}),
        (1100, 20, {}),
    ):
        z = normal(11, num_experts, dtype=torch.bfloat16)
        yield Call(lambda ops, z=z, k=top_k, o=options: ops.topk_gating(z, None, k, **o), 1)
    z = normal(9, 40, dtype=torch.bfloat16)
    ids = torch.topk(z, 3).indices.int()
    grad = normal(9, 3)
    yield Call(lambda ops: (ops.topk_gating_backward(grad, z, ids),), 1)


def models(shape, count, dtype=torch.float32):
    base = normal(*shape, dtype=dtype)
    return base, [base + normal(*shape, dtype=dtype, seed=1 + m) / 8 for m in range(count)]


def thresholds():
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.zeros(9, 1500, dtype=dtype)
        # All equal: the cut lies in a late tile, and there in a late thread's part.
        tensors = [normal(9, 1500, dtype=dtype), torch.ones_like(base), -torch.ones_like(base)]
        keep = [5000, 12_000, 13_000]
        yield Call(lambda ops, b=base, t=tensors, k=keep: (ops.magnitude_threshold(b, t, k),), 1)


def norms():
    base, tensors = models((3, 4200), 2)
    cuts = mergeme_ext.magnitude_threshold(base, tensors, [7000, 300])
    for mask, selection in (("magnitude", cuts), ("random", cuts.clamp(0.2, 0.8))):
        yield Call(
            lambda ops, m=mask, s=selection: (ops.masked_norms(base, tensors, s, mask=m, key=5),), 1
        )


def drops():
    base, tensors = models((3, 1031), 2)
    selection = torch.tensor([[0.2, 0.9], [0.3, 0.8]], dtype=torch.float64)
    yield Call(
        lambda ops: (
            ops.drop_by_rank(base, tensors, selection, key=3, offset=0, inverse_prob=True),
        ),
        2,
    )


def searches():
    x = nonfinite.make((256 * 2048,), torch.float32)  # a block has a run of 8 for each thread
    x[-3] = float("nan")  # the last thread of the last block: its find goes through all of the tree
    yield Call(lambda ops: (ops.first_nonfinite(x),))


# By op; each kernel is named by the calls that launch it.
CALLS = {
    "grouped_matmul": products,
    "grouped_experts": all_experts,
    "sort_by_expert": sorts,
    "router_statistics": statistics,
    "topk_gating": gates,
    "magnitude_threshold": thresholds,
    "masked_norms": norms,
    "drop_by_rank": drops,
    "first_nonfinite": searches,
}
