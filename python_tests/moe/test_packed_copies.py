"""Experts in inference: packed copies of their weights, and when there must be none."""

import pytest
import torch

from mergeme_ext.moe import Experts, MoELayer
from mergeme_ext.moe.packed import packed_copies


@pytest.fixture(autouse=True)
def no_copies():
    packed_copies.forget()
    yield
    packed_copies.forget()


def inputs(dtype, num_tokens=9):
    x = torch.randn(num_tokens, 24).to(dtype)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(num_tokens)]).to(torch.int32)
    return x, ids, torch.rand(num_tokens, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [{}, {"sentinel": True, "capacity": 2}])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_same_bits_as_without(dtype, limits, activation):
    experts = Experts(24, 20, 5, activation=activation, dtype=dtype)
    x, ids, weights = inputs(dtype)
    if limits:
        ids[3, 1] = 5
    expected = experts(x, ids, weights, **limits)  # in training mode
    assert len(packed_copies) == 0
    with torch.no_grad():
        assert torch.equal(experts.eval()(x, ids, weights, **limits), expected)
    assert len(packed_copies) == 2 and expected.requires_grad


def test_made_once_and_again_when_the_weights_change():
    experts = Experts(24, 20, 5).eval()
    x, ids, weights = inputs(torch.float32)
    made = packed_copies.made
    with torch.no_grad():
        first = experts(x, ids, weights)
        experts(x, ids, weights)
        assert packed_copies.made == made + 2
        experts.load_state_dict(Experts(24, 20, 5).state_dict())
        second = experts(x, ids, weights)
        assert packed_copies.made == made + 4
    assert not torch.equal(second, first)
    assert torch.equal(experts(x, ids, weights), second)  # with gradients, and so without copies
    assert len(packed_copies) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_of_a_dtype_with_and_without_copies(dtype):
    layer = MoELayer(24, 20, 5, dtype=dtype).eval()
    x = torch.randn(2, 3, 24).to(dtype)
    with torch.inference_mode():
        out = layer(x)
    assert torch.equal(out, layer(x))
    with torch.no_grad():
        layer(x)
    assert len(packed_copies) == (0 if dtype == torch.float64 else 2)


@torch.no_grad()
def test_mismatched_dtypes_still_raise():
    experts = Experts(24, 20, 5).eval()
    x, ids, weights = inputs(torch.bfloat16)
    with pytest.raises(TypeError, match="gate_up to be bfloat16, got float32"):
        experts(x, ids, weights)
