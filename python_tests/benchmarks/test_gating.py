import json

import pytest
import torch

from benchmarks import bench_gating, harness


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(harness, "probes", lambda: {"copy_gb_per_s": 1.0})
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 20)


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_smallest_case(quick, capsys, cache):
    threads = torch.get_num_threads()
    rows = bench_gating.main(["--smoke", "--cache", cache, "--threads", str(threads)])
    *lines, header, _, forward, training = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == rows and len(rows) == 2
    assert all(set(row["seconds"]) == {"mergeme", "eager", "read"} for row in rows)
    assert rows[0]["missing"] == {"sglang": "no --peers"}
    assert rows[1]["missing"] == {"sglang": "has no backward"}
    assert header.startswith("| case |") and "| forward |" in forward and "training" in training


def test_missing_library_is_reported(tmp_path):
    assert bench_gating.find_sglang(tmp_path) == "no vllm/_C.abi3.so in --peers"
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/_C.abi3.so").touch()
    assert "_C.abi3.so" in bench_gating.find_sglang(tmp_path)


@pytest.mark.parametrize("name", bench_gating.CASES)
def test_contenders_agree(name):
    gate = bench_gating.Gate({**bench_gating.CASES[name], "tokens": 64})
    for mode in ("forward", "training"):
        calls, _ = bench_gating.contenders(gate, mode, "not here")
        gate.check("eager", calls["eager"](), calls["mergeme"]())


def test_a_contender_that_disagrees_is_refused():
    gate = bench_gating.Gate(bench_gating.SMOKE)
    ids, weights, *rest = gate.mergeme()
    with pytest.raises(SystemExit, match="other disagrees with mergeme"):
        gate.check("other", (ids, weights * 1.01, *rest), (ids, weights, *rest))
    with pytest.raises(SystemExit, match="other disagrees with mergeme"):
        gate.check("other", (ids, weights, rest[0] + 1), (ids, weights, *rest))
