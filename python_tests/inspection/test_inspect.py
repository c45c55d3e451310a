import json
import math
import random

import pytest
import torch

from mergeme_ext.inspection import inspect as module
from mergeme_ext.inspection import inspect_models
from mergeme_ext.inspection.alignment import labels_of
from mergeme_ext.io import CheckpointError
from python_tests.support.checkpoints import llama_tensors, save

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed))
    return tmp_path


def inspect(folder, names="ab", base="base", **options):
    return inspect_models([folder / n for n in names], base and folder / base, **options)


def test_aggregates_are_those_of_the_joined_vectors(models):
    found = inspect(models, "abc")
    base, *tuned = (llama_tensors(seed) for seed in range(4))

    def cosine(names):
        x, y = (torch.cat([(t[n] - base[n]).double().flatten() for n in names]) for t in tuned[:2])
        return float(x @ y / (x.norm() * y.norm()))

    assert found.models == ("a", "b", "c") and found.base == "base"
    assert found.total.cosine[0] == pytest.approx(cosine(list(base)), rel=1e-12)
    assert found.by_layer[1].cosine[0] == pytest.approx(cosine([n for n in base if ".1." in n]))
    mlp = [n for n in base if "up_proj" in n]
    assert found.by_kind["mlp up"].cosine[0] == pytest.approx(cosine(mlp))
    assert found.by_layer_and_kind[1, "attention q"].cosine[0] == pytest.approx(cosine([QUERY]))
    assert found.layers == [0, 1] and found.kinds[0] == "embedding" and found.kinds[-1] == "head"
    assert sum(f.numel for f in found.by_kind.values()) == found.total.numel


def test_without_a_base_the_weights_are_compared(models):
    found = inspect(models, base=None)
    a, b = (llama_tensors(seed)[QUERY].double().flatten() for seed in (1, 2))
    tensor = next(t for t in found.tensors if t.name == QUERY)
    assert tensor.figures.cosine[0] == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    assert math.isnan(found.total.relative_norm[0]) and found.base is None


def test_threads_and_tasks_change_nothing(models, monkeypatch):
    threads = torch.get_num_threads()
    expected = inspect(models, "abc").document()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert inspect(models, "abc").document() == expected
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_sample_depends_on_seed_alone(models):
    def names(**options):
        return {s.tensor for s in inspect(models, **options).spectra}

    assert names(samples=0) == set()
    assert len(names(samples=1)) == 9 and len(names(samples=5)) == 16
    assert names(samples=1, seed=1) == names(samples=1, seed=1)
    assert any(names(samples=1, seed=0) != names(samples=1, seed=s) for s in range(1, 6))
    found = inspect(models, samples=1).spectra
    exact = llama_tensors(1), llama_tensors(0)
    for s in [s for s in found if s.model == 0]:
        values = torch.linalg.svdvals((exact[0][s.tensor] - exact[1][s.tensor]).double())
        got = torch.tensor(s.singular_values, dtype=torch.float64)
        torch.testing.assert_close(got, values[:8], rtol=1e-6, atol=1e-6)


def test_document_is_json(models):
    document = inspect(models).document()
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again["pairs"] == [[0, 1]]
    assert {t["name"] for t in again["tensors"]} == set(llama_tensors(0))
    assert str(models) not in json.dumps(document)


def test_progress_counts_every_byte(models):
    class Bar:
        total = done = 0
        closed = False

        def update(self, n):
            self.done += n

        def close(self):
            self.closed = True

    bar = Bar()

    def start(total):
        bar.total = total
        return bar

    inspect(models, progress=start)
    assert bar.done == bar.total > 0 and bar.closed


def test_a_layer_that_stands_out(tmp_path):
    rng = torch.Generator().manual_seed(0)
    base = llama_tensors(0, layers=8)
    save(tmp_path / "base", base)
    for name in "ab":
        tuned = {n: t + 0.01 * torch.randn(t.shape, generator=rng) for n, t in base.items()}
        if name == "b":
            for n in tuned:
                if ".5." in n:
                    tuned[n] = base[n] + 4 * (tuned[n] - base[n])
        save(tmp_path / name, tuned)
    found = inspect(tmp_path)
    first = found.stand_outs[0]
    assert (first.figure, first.of, first.layer) == ("relative_norm", 1, 5)
    assert first.value == pytest.approx(4 * first.median, rel=0.2)


def test_what_is_left_out(models):
    tensors = llama_tensors(1) | {
        "lm_head.weight": torch.zeros(41, 16),
        "model.layers.0.counter": torch.tensor([3]),
    }
    save(models / "a", tensors)
    save(models / "b", llama_tensors(2) | {"model.layers.0.counter": torch.tensor([3])})
    save(models / "base", llama_tensors(0) | {"model.layers.0.counter": torch.tensor([3])})
    assert inspect(models).left_out == {
        "lm_head.weight": "vocabularies differ: 40, 41, 40 rows",
        "model.layers.0.counter": "int64 is not the type of a weight",
    }
    tied = llama_tensors(1, head=False)
    save(models / "a", tied, {"tie_word_embeddings": True})
    save(models / "base", llama_tensors(0))
    save(models / "b", llama_tensors(2))
    assert inspect(models).left_out == {"lm_head.weight": "a ties it to model.embed_tokens.weight"}


def change(tensors, name, value):
    return {
        k: value if k == name else t for k, t in tensors.items() if k != name or value is not None
    }


@pytest.mark.parametrize(
    "value, config, message",
    [
        (
            None,
            {},
            r"/a has no tensor 'model\.layers\.1\.self_attn\.q_proj\.weight', which .*/base",
        ),
        (torch.zeros(3, 4), {}, r"is \[16, 16\] in .*base but \[3, 4\] in .*/a"),
        (torch.zeros(16, 16).to(torch.float8_e4m3fn), {}, r"/a is quantised \(tensor"),
        (torch.zeros(16, 16), {"quantization_config": {}}, r"quantised \(its config"),
        (torch.zeros(16, 16), {"model_type": "qwen2"}, r"/a is a qwen2 model, .*/base a llama"),
    ],
)
def test_models_that_do_not_fit(models, value, config, message):
    save(models / "a", change(llama_tensors(1), QUERY, value), config)
    with pytest.raises(CheckpointError, match=message):
        inspect(models)


def test_too_little_to_compare(models):
    with pytest.raises(ValueError, match="expected a base, or at least two models"):
        inspect(models, "a", base=None)
    with pytest.raises(ValueError, match="at least one model, got none"):
        inspect(models, "")
    with pytest.raises(ValueError, match="samples of at least 0, got -1"):
        inspect(models, samples=-1)
    with pytest.raises(CheckpointError, match="expected a model's folder"):
        inspect(models, base="gone")


def test_labels():
    assert labels_of(["x/a", "y/a", "y/models--o--m/snapshots/1", "z/a"]) == [
        "a",
        "a (2)",
        "o/m",
        "a (3)",
    ]


def test_long_tensors_are_cut(models, monkeypatch):
    expected = inspect(models).total
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 17)
    monkeypatch.setattr(module, "TASK_ELEMENTS", random.Random(0).randint(20, 60))
    found = inspect(models).total
    assert found.changed == expected.changed and found.contested == expected.contested
    assert found.cosine == pytest.approx(expected.cosine, rel=1e-12)
