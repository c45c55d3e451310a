import pytest
import yaml

from mergeme_ext.cli import main
from python_tests.assembly.models import make


@pytest.fixture
def recipe(tmp_path):
    make(tmp_path / "base")
    make(tmp_path / "one", like=tmp_path / "base", seed=1, rms_norm_eps=1e-5)
    experts = [{"source_model": "one"}, {"source_model": "base"}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "experts": experts, "gate_mode": "zero"}))
    return path


def test_builds_and_reports(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["moe", str(recipe), str(out), "--dry-run"]) == 0
    assert "the model would have 2 experts, 29 tensors" in capsys.readouterr().out
    assert not out.exists()
    assert main(["moe", str(recipe), str(out)]) == 0
    shown = capsys.readouterr()
    assert str(out) in shown.out and "2 experts" in shown.out
    assert "mergeme moe: note: " in shown.err and "rms_norm_eps 1e-05" in shown.err
    assert (out / "config.json").is_file()
    assert main(["moe", str(recipe), str(out)]) == 2
    assert "overwriting must be asked for" in capsys.readouterr().err
    assert main(["moe", str(recipe), str(out), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_errors_are_one_line(recipe, tmp_path, capsys):
    recipe.write_text(recipe.read_text().replace("gate_mode", "gate_mod"))
    assert main(["moe", str(recipe), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "did you mean 'gate_mode'?" in shown
    assert not (tmp_path / "out").exists()


def test_help_shows_a_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["moe", "--help"])
    shown = capsys.readouterr().out
    assert "positive_prompts:" in shown and "--overwrite" in shown and "--quiet" in shown
