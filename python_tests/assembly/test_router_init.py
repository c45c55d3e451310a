import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeme_ext.assembly.router_init import (
    Prompts,
    condition,
    mean_inputs,
    random_rows,
    rows_from_means,
)
from python_tests.assembly.models import make

ONE, TWO = ["the heart and the liver", "fever"], ["def x return if class"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=3)


@torch.no_grad()
def test_residual_states_are_those_that_transformers_reports(base):
    model, encode = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    found = {
        pool: mean_inputs(
            base, [Prompts(ONE), Prompts(TWO)], tokenizer=base, gate_input="residual", pool=pool
        )
        for pool in ("mean", "last")
    }
    for e, texts in enumerate((ONE, TWO)):
        runs = [model(**encode(t, return_tensors="pt"), output_hidden_states=True) for t in texts]
        for layer in range(3):
            states = [r.hidden_states[layer][0].double() for r in runs]
            mean = sum(s.mean(0) for s in states) / len(states)
            last = sum(s[-1] for s in states) / len(states)
            torch.testing.assert_close(found["mean"][layer, e], mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["last"][layer, e], last, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_router_states_are_what_the_mlp_gets(base):
    model, encode = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    found = mean_inputs(base, [Prompts(TWO, ONE[1:])], tokenizer=base)
    assert found.shape == (3, 1, 24) and found.dtype == torch.float64
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, out, i=i: seen.update({i: out[0].double().mean(0)})
        )
    model(**encode(TWO[0], return_tensors="pt"))
    positive = dict(seen)
    model(**encode(ONE[1], return_tensors="pt"))
    for layer in range(3):
        expected = positive[layer] - seen[layer]
        torch.testing.assert_close(found[layer, 0], expected, rtol=1e-5, atol=1e-6)


def test_long_prompts_are_cut(base):
    long, short = [Prompts(["the heart of a"])], [Prompts(["the heart"])]
    cut = mean_inputs(base, long, tokenizer=base, max_tokens=2)
    assert torch.equal(cut, mean_inputs(base, short, tokenizer=base))
    assert not torch.equal(cut, mean_inputs(base, long, tokenizer=base))


def test_worked_examples_of_the_reference_tool():
    # Positive mean [1, 0.5], negative mean [0.5, 0]: their difference, normalised.
    rows = rows_from_means(torch.tensor([[0.5, 0.5]]).double(), center=False, scale=1.0)
    torch.testing.assert_close(
        rows, torch.tensor([[0.707107, 0.707107]]).double(), atol=1e-6, rtol=0
    )
    for second, expected in (([0.9, 0.435890], 4.358899), ([0.95, 0.312250], 6.244998)):
        rows = torch.tensor([[1.0, 0.0], second]).double()
        assert math.isclose(condition(rows, center=False), expected, rel_tol=1e-5)


@given(
    num_experts=st.integers(2, 5),
    scale=st.floats(0.1, 10),
    offset=st.floats(0, 100),
    seed=st.integers(0, 2**31),
)
def test_centred_rows_favour_nobody_at_the_average_input(num_experts, scale, offset, seed):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(num_experts, 16, generator=g, dtype=torch.float64)
    means += offset * torch.randn(16, generator=g, dtype=torch.float64)
    rows = rows_from_means(means, center=True, scale=scale)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((num_experts,), scale).double())
    average = means.mean(0)
    assert (rows @ (average / average.norm())).abs().max() <= 1e-9 * scale
    # Each expert's own mean input goes to it.
    if num_experts == 2:
        assert (means @ rows.T).argmax(1).tolist() == [0, 1]
    plain = rows_from_means(means, center=False, scale=scale)
    torch.testing.assert_close(plain, scale * means / means.norm(dim=1, keepdim=True))


def test_equal_means_give_rows_of_zeros_not_of_noise():
    means = torch.full((3, 7), 0.1, dtype=torch.float64) * torch.tensor([[1], [1 + 1e-12], [1]])
    assert not rows_from_means(means, center=True, scale=4.0).any()
    assert condition(rows_from_means(means, center=True, scale=4.0), center=True) == 1.0
    assert condition(rows_from_means(means, center=False, scale=4.0), center=False) > 1e6


def test_condition_of_centred_rows_leaves_their_sum_out():
    rows = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    assert condition(rows, center=True) == 1.0
    assert condition(torch.cat([rows, torch.zeros(1, 3)]), center=True) == 1.0


def test_random_rows_depend_on_seed_and_name_alone():
    rows = random_rows((4, 50), 1, "a")
    torch.manual_seed(99)
    assert torch.equal(random_rows((4, 50), 1, "a"), rows)
    assert not torch.equal(random_rows((4, 50), 2, "a"), rows)
    assert not torch.equal(random_rows((4, 50), 1, "b"), rows)
    assert 0.015 < rows.std() < 0.025
