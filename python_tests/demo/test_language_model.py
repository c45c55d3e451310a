import math

import pytest
import torch

from mergeme_ext.demo import language_model
from mergeme_ext.demo.language_model import load_model, next_token_loss, perplexity
from mergeme_ext.demo.training import Training, fine_tune
from mergeme_ext.io import CheckpointSource, names
from python_tests.demo.support import write_base
from python_tests.support.checkpoints import save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


def rows_of(count, length=17):
    return torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("slice_tokens", [1, 5, 512])
def test_loss_and_gradient_are_transformers_own(base, monkeypatch, slice_tokens):
    monkeypatch.setattr(language_model, "SLICE_TOKENS", slice_tokens)
    model, rows = load_model(base).double(), rows_of(2)
    model.get_output_embeddings().weight.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    expected = model(input_ids=rows, labels=rows).loss
    gradients = torch.autograd.grad(expected, learned)
    loss = next_token_loss(model, rows, torch.float64)
    # Both losses come out in float32; the gradients pass through it once.
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, learned), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_perplexity_does_not_depend_on_the_batch(base):
    model, rows = load_model(base), rows_of(5)
    whole = perplexity(model, rows, torch.float32, batch=5)
    assert perplexity(model, rows, torch.float32, batch=2) == pytest.approx(whole, rel=1e-5)
    logits = model(rows).logits[:, :-1].double().log_softmax(-1)
    nll = -logits.gather(2, rows[:, 1:, None]).mean().item()
    assert whole == pytest.approx(math.exp(nll), rel=1e-5)


def test_refuses_a_checkpoint_with_a_tensor_too_few(base, tmp_path):
    source = CheckpointSource(base)
    tensors = {n: source.tensor(n).clone() for n in source.names if "norm" not in n}
    folder = save(tmp_path / "m", tensors, {"vocab_size": 257, "tie_word_embeddings": True})
    with pytest.raises(RuntimeError, match=r"did not take every tensor.*layernorm"):
        load_model(folder)


def test_fine_tuning_learns_and_leaves_the_embedding(base, tmp_path):
    rows = torch.arange(97, 103).repeat(8, 6)
    training = Training(steps=12, rows=2, row_tokens=36, learning_rate=1e-2)
    losses = []
    fine_tune(
        base,
        rows,
        tmp_path / "a",
        training,
        torch.float32,
        lambda step, loss, speed, seconds: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(1, 13))
    assert losses[-1][1] < losses[0][1] - 0.3
    before, after = CheckpointSource(base), CheckpointSource(tmp_path / "a")
    assert after.names == before.names and after.config == before.config
    for name in before.names:
        same = torch.equal(before.tensor(name), after.tensor(name))
        assert same == (name == names.EMBEDDING), name
    fine_tune(base, rows, tmp_path / "b", training, torch.float32, lambda *_: None)
    again = CheckpointSource(tmp_path / "b")
    assert all(torch.equal(after.tensor(n), again.tensor(n)) for n in after.names)


def test_learning_rate_rises_and_falls():
    training = Training(steps=30, learning_rate=1.0)
    rates = [training.rate(step) for step in range(30)]
    assert rates[4] == 1.0 == max(rates) and rates[0] == 0.2
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0.1 < rates[-1] < 0.11
    assert Training(steps=1).rate(0) == Training.learning_rate


def test_compute_dtype_is_one_of_two():
    assert language_model.compute_dtype() in (torch.float32, torch.bfloat16)
