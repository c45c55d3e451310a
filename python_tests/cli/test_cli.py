import subprocess
import sys

import pytest

import mergeme_ext
from mergeme_ext import cli
from mergeme_ext.cli import main
from mergeme_ext.io import CheckpointSource
from mergeme_ext.merging import MergePlan, names
from python_tests.support.checkpoints import llama_tensors, save

RECIPE = """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {density: 0.5}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def test_merge(models, capsys):
    assert main(["merge", "r.yaml", "out", "--threads", "1", "--max-shard-size", "5KB"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("out: 21 tensors, 20.8 KB in ") and err == ""
    assert len(CheckpointSource(models / "out")) == 21


def test_quiet_and_dry_run(models, capsys):
    assert main(["merge", "r.yaml", "out", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "ties (Yadav et al. 2023, arXiv:2306.01708): 21 tensors, 20.8 KB, float32\n"
    )
    assert "\n  model.layers.*.mlp.down_proj.weight" in out and "; writes 20.8 KB\n" in out
    assert not (models / "out").exists()
    assert main(["merge", "r.yaml", "out", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_errors_take_one_line(models, capsys):
    (models / "r.yaml").write_text(RECIPE.replace("density", "densty"))
    assert main(["merge", "r.yaml", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "mergeme merge: r.yaml:6: unknown key 'densty' in parameters; did you mean 'density'?\n"
    )
    with pytest.raises(ValueError, match="densty"):
        main(["merge", "r.yaml", "out", "--traceback"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.yaml", "out"], "none.yaml: cannot read the recipe: No such file or directory"),
        (["r.yaml", "full"], "full: exists and is not empty; overwriting must be asked for"),
        (["r.yaml", "a", "--overwrite"], "a is one of the inputs; choose another folder"),
        (["r.yaml", "out", "--threads", "0"], "expected threads of at least 1, got 0"),
        (
            ["r.yaml", "out", "--chunk-elements", "0"],
            "expected chunk_elements of at least 1, got 0",
        ),
        (
            ["r.yaml", "out", "--max-shard-size", "x"],
            "expected a size such as 5GB or 500MB, got 'x'",
        ),
    ],
)
def test_user_errors(models, capsys, arguments, message):
    save(models / "full", {})
    assert main(["merge", *arguments]) == 2
    assert capsys.readouterr().err == f"mergeme merge: {message}\n"
    assert not (models / "out").exists()


def test_interrupt(models, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MergePlan, "run", stop)
    assert main(["merge", "r.yaml", "out"]) == 130
    assert capsys.readouterr().err == (
        "mergeme merge: stopped; the same command with --resume goes on from there\n"
    )


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (mergeme_ext.__version__, "torch", "CUDA kernels", "CPU code", *names()):
        assert word in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage: mergeme" in capsys.readouterr().out


def test_wrong_usage():
    for arguments in ([], ["marge"], ["merge"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_runs_as_a_module():
    command = [sys.executable, "-m", "mergeme_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"mergeme_ext {mergeme_ext.__version__}\n"


def test_light_imports():
    program = (
        "import sys, mergeme_ext.merging, mergeme_ext.io\n"
        "heavy = {'transformers', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_random_seed_is_for_recipes_without_one(models):
    recipe = RECIPE.replace("ties", "dare_ties")
    seeded = recipe.replace("density: 0.5}\n", "density: 0.5, seed: 5}\n")
    assert seeded != recipe
    written = {}
    for name, text, seed in (("none", recipe, 0), ("five", recipe, 5), ("own", seeded, 9)):
        (models / "r.yaml").write_text(text)
        arguments = ["-q", "--no-model-check", "--random-seed", str(seed)]
        assert main(["merge", "r.yaml", name, *arguments]) == 0
        written[name] = (models / name / "model.safetensors").read_bytes()
    assert written["none"] != written["five"] == written["own"]


def test_info_lists_the_methods(capsys):
    assert main(["info", "--methods"]) == 0
    out = capsys.readouterr().out
    assert "\nties: Trim to the largest magnitudes" in out and "\n    lambda: 1.0\n" in out
    assert "dare_ties: " in out and "    density: 1.0, of each model\n" in out
