import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from mergeme_ext.cli import main
from mergeme_ext.inspection import inspect_models
from mergeme_ext.report.inspection import inspection_page, inspection_text
from python_tests.support.checkpoints import llama_tensors, save

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed))
    return tmp_path


def test_tables_page_and_json(models, capsys):
    command = ["inspect", "a", "b", "--base", "base", "--html", "p.html", "--json", "p.json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("task vectors against base\n1  a\n2  b\n")
    for kind in ("embedding", "attention q", "mlp down", "norm final", "head", "all"):
        assert re.search(rf"^{kind} +\d", out, re.M), kind
    document = json.loads((models / "p.json").read_text())
    row = next(line for line in out.splitlines() if line.startswith("attention q"))
    assert f"{document['kinds']['attention q']['cosine'][0]:.3f}" in row
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "c", "p.html", "p.json"]


def drawings(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_page_stands_alone_and_is_well_formed(models):
    page = inspection_page(inspect_models([models / n for n in "abc"], models / "base"))
    assert not re.search(r"<script|<link|<img|@import|url\(|\ssrc=|\shref=", page)
    body = page.removeprefix("<!DOCTYPE html>\n")
    body = re.sub(r"<(meta[^>]*)>", r"<\1/>", body)
    ElementTree.fromstring(body)  # every tag is closed and every text escaped
    large = [d for d in drawings(page) if d.get("role") == "img"]
    assert len(large) >= 4 and all(d.get("aria-label") for d in large)
    numbers = " ".join(re.findall(r'\b(?:d|x|y|cx|cy|width|height)="([^"]*)"', page))
    assert "nan" not in numbers and "inf" not in numbers


def test_drawings_show_the_figures(models):
    found = inspect_models([models / n for n in "ab"], models / "base")
    page = inspection_page(found)
    for layer, figures in found.by_layer.items():
        assert f"a and b, layer {layer}: {figures.cosine[0]:.3f}" in page
    assert page.count('class="cell"') == len(found.by_layer_and_kind) + 8  # and the scale


def test_names_are_escaped(models):
    tensors = llama_tensors(1) | {f"model.layers.0.{HOSTILE}": torch.ones(3, 3)}
    for name in ("base", "b", HOSTILE.replace("/", "")):
        save(models / name, tensors)
    tensors[f"model.layers.0.{HOSTILE}"][0, 0] = float("nan")
    save(models / "b", tensors)
    found = inspect_models([models / HOSTILE.replace("/", ""), models / "b"], models / "base")
    page, text = inspection_page(found), inspection_text(found)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in text and "1 NaN or infinite weights" in text


def test_many_models_show_extremes(models):
    found = inspect_models([models / n for n in "abcabcabc"], models / "base")
    text, page = inspection_text(found), inspection_page(found)
    assert "cosine min" in text and "cosine max" in text and "9  c (3)" in text
    assert "lowest" in page and "highest" in page


def test_one_model_and_no_base(models, capsys):
    assert main(["inspect", "a", "--base", "base"]) == 0
    assert "cosine" not in capsys.readouterr().out
    assert main(["inspect", "a", "b", "--samples", "0", "--html", "w.html"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no base: the weights themselves") and "|d|" not in out


def test_json_to_the_screen_and_quiet(models, capsys):
    assert main(["inspect", "a", "b", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["a", "b"]
    assert main(["inspect", "a", "b", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a"], "expected a base, or at least two models to compare with each other"),
        (["a", "gone"], "gone: expected a model's folder, found none"),
        (["a", "b", "--samples", "-1"], "expected samples of at least 0, got -1"),
        (["a", "b", "--threads", "0"], "expected --threads of at least 1, got 0"),
        (["a", "b", "--html", "full.html"], "full.html: exists; overwriting must be asked for"),
        (["a", "b", "--json", "no/x.json"], "no: expected a folder to write x.json to"),
        (["a", "b", "--html", "a"], "a: is a folder; name a file"),
    ],
)
def test_user_errors(models, capsys, arguments, message):
    (models / "full.html").write_text("kept")
    assert main(["inspect", *arguments]) == 2
    assert capsys.readouterr().err == f"mergeme inspect: {message}\n"
    assert (models / "full.html").read_text() == "kept"
    assert main(["inspect", "a", "b", "--html", "full.html", "--overwrite"]) == 0
