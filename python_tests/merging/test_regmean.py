import pytest
import torch

from mergeme_ext.merging import get
from python_tests.references import whole_model as reference
from python_tests.support.toy import BASE, DTYPES, MODELS
from python_tests.support.whole_model import merge_model, same_bits

REGMEAN = get("regmean")
GRAMS = [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
WEIGHTS = [torch.eye(2), torch.tensor([[3.0, 1.0], [1.0, 1.0]])]


def layer(out_features, in_features, dtype=torch.float32, models=3, tokens=200, seed=0):
    """Weights, and Grams of inputs with a few strong directions, as in real models."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=g, dtype=torch.float64)
    grams, weights = [], []
    for _ in range(models):
        x = torch.randn(tokens, in_features, generator=g, dtype=torch.float64) @ mix
        grams.append((x.t() @ x / tokens).float())
        weights.append(torch.randn(out_features, in_features, generator=g, dtype=torch.float64))
    return [w.to(dtype) for w in weights], grams


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (1, [[1.5, 0.5], [0.357143, 0.928571]]),
        (0.9, [[1.514447, 0.507400], [0.352361, 0.936575]]),
        (0, [[1.666667, 0.6], [0.333333, 1]]),
    ],
)
def test_worked_example(ratio, expected):
    out = REGMEAN(None, WEIGHTS, non_diagonal_ratio=ratio, statistics=GRAMS)
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("tokens", [200, 5])
def test_matches_inverse(dtype, ratio, tokens):
    """5 tokens for 24 inputs: only the ridge makes the sum of the Grams regular."""
    weights, grams = layer(70, 24, dtype, tokens=tokens)
    out = REGMEAN(None, weights, non_diagonal_ratio=ratio, statistics=grams)
    expected = reference.regmean(weights, grams, ratio, 1e-6)
    assert out.dtype == dtype
    # The condition number, at most 1e6 by the ridge times the Grams' own spread, scales the
    # error of a solve in float64; what is left is one rounding to the output.
    slack = 1e-6 if tokens == 5 else 1e-10
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + slack * expected.abs().max()
    assert ((out.double() - expected).abs() <= bound).all()


def test_solves_the_regression():
    """The outputs on all inputs are nearer to the models' outputs than those of the mean."""
    g = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(300, 16, generator=g) @ torch.randn(16, 16, generator=g) for _ in range(2)
    ]
    weights = [torch.randn(8, 16, generator=g) for _ in inputs]
    grams = [x.t() @ x / len(x) for x in inputs]
    merged = REGMEAN(None, weights, non_diagonal_ratio=1, statistics=grams)

    def loss(w):
        return sum(((x @ (w - own).t()) ** 2).sum() for x, own in zip(inputs, weights, strict=True))

    assert loss(merged) < 0.9 * loss(sum(weights) / 2)
    nudged = merged + 1e-2 * torch.randn(8, 16, generator=g)
    assert loss(merged) < loss(nudged)


def test_dead_inputs_get_the_mean():
    weights, grams = layer(6, 8)
    for gram in grams:
        gram[3] = gram[:, 3] = 0
    out = REGMEAN(None, weights, statistics=grams)
    torch.testing.assert_close(out[:, 3], sum(weights)[:, 3] / 3)
    with pytest.raises(ValueError, match=r"^regmean: .* tensor 'a' .* order 4 is not; raise ridge"):
        REGMEAN(None, weights, ridge=0, statistics=grams, tensor_name="a")


NO_GRAM = [[None, None, None], [None, torch.eye(8), torch.eye(8)], [torch.zeros(8, 8)] * 3]


@pytest.mark.parametrize("statistics", NO_GRAM, ids=["none", "one missing", "zeros"])
def test_without_a_gram_it_is_the_plain_mean(statistics):
    weights, _ = layer(6, 8)
    notes = {}
    model = {"a": (weights[0], weights)}
    out = merge_model("regmean", model, statistics={"a": statistics}, notes=notes)
    torch.testing.assert_close(out["a"], sum(weights) / 3)
    assert notes == {"regmean": "no Gram: plain mean"}
    torch.testing.assert_close(REGMEAN(BASE, MODELS), sum(MODELS) / 3)


def test_equal_models_stay():
    weights, grams = layer(6, 8)
    out = REGMEAN(None, [weights[0]] * 3, statistics=grams)
    torch.testing.assert_close(out, weights[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_no_bit_depends_on_chunks_or_threads(dtype):
    weights, grams = layer(150, 600, dtype, models=2, tokens=50)
    model = {"a": (weights[0], weights)}
    statistics = {"a": grams}
    whole = merge_model("regmean", model, statistics=statistics)
    threads = torch.get_num_threads()
    for chunk, count in ((600, 1), (13 * 600 + 5, 2), (100 * 600, 2)):
        torch.set_num_threads(count)
        try:
            assert same_bits(
                merge_model("regmean", model, chunk=chunk, statistics=statistics), whole
            )
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)


BAD = [
    (torch.zeros(2, 2, 2), torch.eye(2), r"got \[2, 2\] for tensor 'a' \[2, 2, 2\]"),
    (torch.zeros(2), torch.eye(2), r"got \[2, 2\] for tensor 'a' \[2\]"),
    (torch.zeros(2, 3), torch.eye(2), r"got \[2, 2\] for tensor 'a' \[2, 3\]"),
    (torch.zeros(2, 3), torch.ones(3), r"got \[3\] for tensor 'a' \[2, 3\]"),
]


@pytest.mark.parametrize("weight, gram, message", BAD, ids=str)
def test_refuses_other_shapes(weight, gram, message):
    with pytest.raises(ValueError, match=f"^regmean: expected a Gram .*{message}"):
        REGMEAN(None, [weight] * 2, statistics=[gram] * 2, tensor_name="a")
