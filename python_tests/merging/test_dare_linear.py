import pytest
import torch

from mergeme_ext.merging import get
from mergeme_ext.merging.sparsify import mask_key
from python_tests.references import merge_methods as reference
from python_tests.support.toy import BASE, DTYPES, MODELS, assert_close, assert_example, flat, make

DARE = get("dare_linear")
# With this seed the masks of a tensor called "w" are those of the worked examples.
EXAMPLE = {"weights": 1, "density": 0.5, "seed": 539497, "tensor_name": "w"}


def test_worked_example():
    masks = [reference.random_mask(6, 0.5, EXAMPLE["seed"], "w", m) for m in range(3)]
    assert masks == [[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
    out = DARE(BASE, MODELS, **EXAMPLE)
    assert_example(out, [2.161538, -0.767308, 1.7, 1.2375, 2.4, -1.168269])
    out = DARE(BASE, MODELS, **EXAMPLE, rescale="inverse_prob")
    assert_example(out, [2.25, -1.5, 2.5, 1.5, 2, -1.125])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", ["none", "inverse_prob", "l1", "l2", "linf"])
def test_matches_loop(dtype, rescale):
    base, models = make(dtype)
    weights, density = [0.2, -0.5, 1.0], [0.3, 0.8, 1.0]
    options = {"rescale": rescale, "seed": 5, "lam": 0.4}
    out = DARE(base, models, weights=weights, density=density, tensor_name="x.weight", **options)
    models = [flat(m) for m in models]
    expected = reference.dare(flat(base), models, weights, density, name="x.weight", **options)
    assert_close(out, expected, terms=20 if rescale in ("none", "inverse_prob") else 150)


def test_masks_depend_on_seed_name_and_place_only():
    base, models = make(torch.float32)
    options = {"weights": 1, "density": 0.5, "rescale": "none"}

    def run(**more):
        return DARE(base, models, **options, **more)

    assert torch.equal(run(seed=1, tensor_name="a"), run(seed=1, tensor_name="a"))
    assert not torch.equal(run(seed=1, tensor_name="a"), run(seed=2, tensor_name="a"))
    assert not torch.equal(run(seed=1, tensor_name="a"), run(seed=1, tensor_name="b"))
    twice = DARE(base, [models[0]] * 2, weights=[1, -1], density=0.5, rescale="none")
    assert not torch.equal(twice, base)  # each model draws its own mask


def test_key_is_documented():
    assert mask_key(1, "a") == -6696997030444538922
    assert mask_key(1, "1a") != mask_key(11, "a")
    assert -(2**63) <= mask_key(2**64 - 1, "ä") < 2**63


def test_degenerate_cases():
    assert torch.equal(DARE(BASE, MODELS[:1], weights=1), MODELS[0])
    assert torch.equal(DARE(BASE, [BASE, BASE], weights=1, density=0.5), BASE)
    same = DARE(BASE, MODELS, weights=1, density=1.0, rescale="inverse_prob")
    assert torch.equal(same, get("task_arithmetic")(BASE, MODELS, weights=1))


def test_expectation_is_task_arithmetic():
    base, (model, *_) = make(torch.float64, shape=(4000,))
    options = {"weights": 1, "density": 0.25, "rescale": "inverse_prob"}
    outs = [DARE(base, [model], seed=s, **options) - base for s in range(64)]
    x = model - base
    # The mean of 64 draws of Bernoulli(p) x / p has standard deviation |x| sqrt((1-p)/p/64).
    z = (torch.stack(outs).mean(0) - x) / (x.abs() * (3 / 64) ** 0.5)
    assert abs(z.mean()) < 4 / len(x) ** 0.5 and z.abs().max() < 6
