"""Every bench runs its smallest case, and its contenders agree. No time is asserted."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from benchmarks import harness

BENCHES = sorted(p.stem for p in Path(harness.__file__).parent.glob("bench_*.py"))


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
