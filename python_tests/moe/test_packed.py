"""The cache of packed weights on its own; python_tests/integrations has it under modules."""

import pytest
import torch
from torch import nn

from mergeme_ext.moe.packed import PackedExperts, cached_experts, cached_matmul, packed_copies
from mergeme_ext.ops import (
    grouped_experts,
    grouped_matmul_nn,
    grouped_matmul_nt,
    pack_experts,
    sort_by_expert,
)


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(40, 64, 96), requires_grad=False)


@pytest.mark.parametrize("gated, transposed", [(False, False), (True, False), (True, True)])
def test_gives_what_pack_experts_gives(weight, gated, transposed):
    copies = PackedExperts()
    for dtype in (None, torch.bfloat16, torch.float16):
        packed = copies.get(weight, dtype=dtype, gated=gated, transposed=transposed)
        expected = pack_experts(
            weight.to(dtype or weight.dtype), gated=gated, transposed=transposed
        )
        assert torch.equal(packed, expected)
        assert copies.get(weight, dtype=dtype, gated=gated, transposed=transposed) is packed
    assert copies.made == 3 and len(copies) == 1


def test_sees_any_element_written_to(weight):
    copies = PackedExperts()
    for position in (0, 3, 12345, -1):
        copies.get(weight)
        weight.view(-1)[position] += 1
        assert torch.equal(copies.get(weight), pack_experts(weight))
    assert copies.made == 5


@pytest.mark.parametrize("expert", range(0, 40, 7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sees_any_expert_rewritten_past_the_version_counter(weight, expert, dtype):
    weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    copies = PackedExperts()
    copies.get(weight)
    version = weight._version
    weight.data[expert] *= 2
    assert weight._version == version
    assert torch.equal(copies.get(weight), pack_experts(weight))


def test_sees_any_column_scaled_past_the_version_counter(weight):
    copies = PackedExperts()
    for column in range(0, 96, 5):
        copies.get(weight)
        weight.data[:, :, column] *= 2
        assert torch.equal(copies.get(weight), pack_experts(weight)), column


def test_what_it_cannot_see_can_be_forgotten(weight):
    copies = PackedExperts()
    old = copies.get(weight)
    weight.data[3, 1, 7] += 1
    copies.forget(weight)
    assert len(copies) == 0
    assert not torch.equal(copies.get(weight), old)
    copies.forget()
    assert len(copies) == 0


def test_views_of_a_larger_tensor(weight):
    whole = torch.randn(3, 40, 64, 96)
    parts = [nn.Parameter(part, requires_grad=False) for part in whole]
    copies = PackedExperts()
    for part in parts:
        assert torch.equal(copies.get(part), pack_experts(part))
    whole[1].neg_()
    for part, values in zip(parts, whole, strict=True):
        assert torch.equal(copies.get(part), pack_experts(values))
    assert len(copies) == 3


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_copies(transposed):
    gate_up, down = torch.randn(4, 20, 12), torch.randn(4, 12, 10)
    x, weights = torch.randn(9, 12), torch.rand(9, 2)
    routing = sort_by_expert(torch.randint(4, (9, 2), dtype=torch.int32), 4)
    stored = [w.transpose(1, 2).contiguous() if transposed else w for w in (gate_up, down)]
    made = packed_copies.made
    for activation in ("silu", "gelu", "gelu_tanh"):
        torch.testing.assert_close(
            cached_experts(
                x, *stored, weights, *routing, activation=activation, transposed=transposed
            ),
            grouped_experts(x, gate_up, down, weights, *routing, activation=activation),
        )
    rows = torch.randn(18, 12)
    matmul = grouped_matmul_nn if transposed else grouped_matmul_nt
    torch.testing.assert_close(
        cached_matmul(rows, stored[0].clone(), routing[0], transposed=transposed),
        matmul(rows, stored[0], routing[0]),
    )
    assert packed_copies.made == made + 3


def test_registration():
    gate_up, down = torch.randn(4, 20, 12), torch.randn(4, 12, 10)
    x, weights = torch.randn(9, 12), torch.rand(9, 2)
    routing = sort_by_expert(torch.randint(4, (9, 2), dtype=torch.int32), 4)
    ops = torch.ops.mergeme
    arguments = (x, gate_up, down, weights, *routing, "silu", False)
    torch.library.opcheck(ops.cached_experts.default, arguments)
    torch.library.opcheck(ops.cached_matmul.default, (x[:9], gate_up, routing[0] // 2, False))
