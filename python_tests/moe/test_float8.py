"""Modules with e4m3 weights; the ops' own tests hold what they compute to float64."""

import pytest
import torch

from mergeme_ext.moe import Float8Experts
from mergeme_ext.moe.float8 import linear_float8, scale_shape
from mergeme_ext.ops import grouped_experts_fp8, sort_by_expert
from python_tests.ops.test_grouped_experts_fp8 import weight
from python_tests.references.grouped_matmul_fp8 import grouped_matmul_fp8
from python_tests.references.quantize_fp8 import quantize_fp8
from python_tests.support.tolerance import assert_within_rounding


def make(hidden, intermediate, experts, activation="silu"):
    g = torch.Generator().manual_seed(0)
    module = Float8Experts(hidden, intermediate, experts, activation=activation)
    halves = [weight((experts, intermediate, hidden), g) for _ in range(2)]
    gate_up, scale = (torch.cat(pair, 1) for pair in zip(*halves, strict=True))
    down, down_scale = weight((experts, hidden, intermediate), g)
    state = {
        "gate_up_proj": gate_up,
        "gate_up_proj_scale_inv": scale,
        "down_proj": down,
        "down_proj_scale_inv": down_scale,
    }
    module.load_state_dict(state)
    return module, tuple(state.values())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_experts_run_the_op(activation):
    module, weights = make(200, 150, 5, activation)
    x, ids = torch.randn(9, 200), torch.randint(0, 6, (9, 2), dtype=torch.int32)
    ids[0] = 5
    topk_weights = torch.rand(9, 2)
    out = module(x, ids, topk_weights, sentinel=True)
    routing = sort_by_expert(ids, 5, sentinel=True)
    expected = grouped_experts_fp8(x, *weights, topk_weights, *routing, activation=activation)
    assert torch.equal(out, expected) and (out[0] == 0).all() and not out.requires_grad


def test_experts_begin_as_zeros_and_count_their_blocks():
    module = Float8Experts(300, 192, 2)
    assert module.gate_up_proj_scale_inv.shape == (2, 4, 3)
    assert module.down_proj_scale_inv.shape == (2, *scale_shape(300, 192)) == (2, 3, 2)
    assert all((p.float() == 0).all() and not p.requires_grad for p in module.parameters())
    assert "intermediate_size=192" in repr(module)


def test_experts_reject_bad_arguments():
    with pytest.raises(ValueError, match=r"expected hidden_size, .* positive, got 0, 4 and 2"):
        Float8Experts(0, 4, 2)
    with pytest.raises(ValueError, match=r"expected activation to be one of .*, got 'relu'"):
        Float8Experts(4, 4, 2, activation="relu")


@pytest.mark.parametrize("shape", [(130,), (0, 130), (3, 130), (2, 3, 130)])
def test_linear(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    w, scale = weight((1, 70, 130), g)
    out = linear_float8(x, w[0], scale[0])
    assert out.shape == (*shape[:-1], 70)
    rows = x.reshape(-1, 130)
    value, size = grouped_matmul_fp8(*quantize_fp8(rows), w, scale, torch.tensor([0, len(rows)]))
    assert_within_rounding(out.reshape(-1, 70), value, size, terms=131)
    bias = torch.randn(70, generator=g)
    assert torch.equal(linear_float8(x, w[0], scale[0], bias), out + bias)
