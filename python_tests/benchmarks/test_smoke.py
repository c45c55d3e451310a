"""Every bench runs its smallest case, and its contenders agree. No time is asserted."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_merge, harness
from benchmarks.checkpoints import config_of_size, make_checkpoints, weights_bytes
from benchmarks.processes import measure
from mergeme_ext.io import CheckpointSource
from python_tests.support.checkpoints import save

# These have no cases of the common kind; their own tests are below and beside this file.
WHOLE_PROGRAMS = {
    "bench_merge",
    "bench_experts",
    "bench_experts_gpu",
    "bench_gating",
    "bench_moe_model",
}
BENCHES = sorted(p.stem for p in Path(harness.__file__).parent.glob("bench_*.py"))
BENCHES = [name for name in BENCHES if name not in WHOLE_PROGRAMS]


@pytest.mark.parametrize("name", BENCHES)
def test_smallest_case(name, monkeypatch):
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 20)
    module = importlib.import_module(f"benchmarks.{name}")
    rows = harness.run_case(module, module.CASES["smoke"], "cpu", 1)
    assert [row["contender"] for row in rows] == list(module.CONTENDERS)
    assert "eager" in " ".join(module.CONTENDERS) or len(rows) > 1
    assert all(row["median_s"] > 0 and math.isfinite(row["gb_per_s"]) for row in rows)


def test_contenders_that_disagree_are_not_timed():
    ones = torch.ones(3)
    with pytest.raises(SystemExit, match="eager disagrees with ours"):
        harness._check_agreement(["ours", "eager"], [ones, ones + 1])


@pytest.fixture
def small_probes(monkeypatch):
    monkeypatch.setattr(harness, "probes", lambda: {"copy_gb_per_s": 1.0})


@pytest.mark.slow
def test_merge_bench(tmp_path, capsys, small_probes):
    lines = tmp_path / "rows.jsonl"
    arguments = ["--size", "200KB", "--methods", "linear", "--rounds", "1", "--work", str(tmp_path)]
    rows = bench_merge.main([*arguments, "--jsonl", str(lines), "--our-flag=--no-model-check"])
    assert rows == [json.loads(line) for line in lines.read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    runs = {row["contender"]: row for row in rows if "wall_s" in row}
    assert list(runs) == ["floor", "ours"]
    assert runs["ours"]["peak_anonymous_bytes"] > 20e6 and runs["ours"]["cpu_s"] > 0.1
    (ours,) = [r["summary"] for r in rows if r.get("summary", {}).get("contender") == "ours"]
    assert ours["wall_to_floor"] == runs["ours"]["wall_s"] / runs["floor"]["wall_s"]
    assert "x floor" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.slow
def test_memory_bench(tmp_path, capsys):
    arguments = ["--memory", "--sizes", "200KB", "--methods", "linear", "--max-memory", "256MB"]
    rows = bench_merge.main([*arguments, "--work", str(tmp_path), "--our-flag=--no-model-check"])
    assert rows[0]["limit_bytes"] == 656e6 and capsys.readouterr().out.rstrip().endswith("yes")


def test_every_recipe_names_its_models(tmp_path):
    folders = [tmp_path / name for name in ("x", "y", "z")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    for method in bench_merge.RECIPES:
        recipe = bench_merge.recipe_of(method, folders)
        used = [folder for folder in folders if str(folder) in recipe]
        assert used and "PER_MODEL" not in recipe
        assert [p.parent for p in bench_merge.inputs_of(method, folders)] == used


def test_summary_takes_imports_off():
    def run(contender, wall):
        costs = {"wall_s": wall, "cpu_s": wall, "peak_anonymous_bytes": 1}
        return {"method": "m", "contender": contender, **costs}

    rows = [run("floor", 1.0), run("ours", 3.0), run("mergekit", 24.0)]
    for name, seconds in (("ours", 1.0), ("mergekit", 4.0)):
        rows.append({"contender": name, "import_wall_s": seconds, "import_cpu_s": seconds})
    _, ours, theirs = bench_merge.summaries(rows)
    assert (ours["wall_to_floor"], ours["net_to_floor"], theirs["net_to_floor"]) == (3, 2, 20)
    assert (ours["mergekit_to_ours_wall"], ours["mergekit_to_ours_net_wall"]) == (8, 10)


def test_differences_count_roundings(tmp_path):
    a, b = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, -1.0078125, -0.0, 3.0])
    for folder, weights in (("x", a), ("y", b)):
        save(tmp_path / folder, {"w": weights.bfloat16()})
    found = bench_merge.differences(tmp_path / "x", tmp_path / "y")
    assert found == {"equal": 0.5, "within_one_rounding": 0.75, "largest_difference": 1.0}


@pytest.mark.parametrize("nbytes", [5e6, 5e7, 5e8, 2e9, 6e9])
def test_sizes(nbytes):
    assert weights_bytes(config_of_size(int(nbytes))) == pytest.approx(nbytes, rel=0.12)


def test_made_models_are_correlated(tmp_path):
    folders = make_checkpoints(tmp_path, 200_000, ["a", "b"])
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (CheckpointSource(f).tensor(name).double().flatten() for f in folders)
    a, b = a - base, b - base
    assert float(a.std()) == pytest.approx(2e-3, rel=0.05)
    assert float(a @ b / (a.norm() * b.norm())) == pytest.approx(0.25, abs=0.05)


def test_a_process_is_measured_with_its_children(tmp_path):
    grandchild = "x = bytearray(b'1') * 300_000_000\nimport time\ntime.sleep(0.5)"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {grandchild!r}])"
    cost = measure([sys.executable, "-c", child], cwd=tmp_path)
    assert cost.peak_anonymous_bytes > 300e6 and cost.wall_s > 0.5 and cost.returncode == 0
    failed = measure([sys.executable, "-c", "raise SystemExit('why')"], cwd=tmp_path)
    assert (failed.returncode, failed.message) == (1, "why")
