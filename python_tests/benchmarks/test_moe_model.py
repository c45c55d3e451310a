"""The bench of whole models: all implementations on one model, the experts' part by subtraction."""

import json

import pytest
import torch

from benchmarks import bench_moe_model, harness, report_experts, roofline

SMALL = ["--threads", "1", "--prefill", "12", "--context", "5", "--decode", "3", "--rounds", "1"]
SMALL += ["--check-tokens", "9", "--check-steps", "4"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "FLOP_SECONDS", 0.001)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smoke-qwen3", "smoke-olmoe"])
def test_smallest_model(model, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["--models", model, "--implementations", "grouped_mm,mergeme", *SMALL]
    rows = bench_moe_model.main([*arguments, "--jsonl", str(file)])
    assert rows == [json.loads(line) for line in file.read_text().splitlines()]
    missing = {row["implementation"]: row["missing"] for row in rows if "missing" in row}
    names = [name for name in ("grouped_mm", "mergeme") if name not in missing]
    assert not missing or "register" in missing["mergeme"]
    checks = {row["check"]: row for row in rows if "check" in row}
    assert list(checks) == names
    for row in checks.values():
        assert row["logits_agree"] and row["greedy_ids_agree"]
        assert row["float32_difference"] < 1e-5
    timed = {(row["phase"], row["implementation"]): row for row in rows if "phase" in row}
    every = [*names, bench_moe_model.LEFT_OUT]
    assert set(timed) == {(phase, name) for phase in ("prefill", "decode") for name in every}
    for (phase, name), row in timed.items():
        assert row["tokens_per_s"] == {"prefill": 12, "decode": 3}[phase] / row["best_s"] > 0
        assert ("experts_s" in row) == (name != bench_moe_model.LEFT_OUT)
    assert timed["decode", "grouped_mm"]["experts_to_default"] == 1
    assert next(r["peak_resident_bytes"] for r in rows if "peak_resident_bytes" in r) > 50e6
    assert "tokens/s" in capsys.readouterr().err
    assert f"| {model} | 1 | prefill 12 | grouped_mm |" in report_experts.report(rows)


def test_leaving_the_experts_out_leaves_the_rest():
    bench_moe_model.available([])
    subject = bench_moe_model.Subject(bench_moe_model.make_model("smoke-qwen3", torch.float32))
    prompt = subject.prompt(6)
    subject.use("eager")
    whole = subject.logits(prompt)
    subject.use(bench_moe_model.LEFT_OUT)
    assert not torch.allclose(subject.logits(prompt), whole)
    layers = subject.model.model.layers
    for layer in layers:
        layer.mlp.experts.down_proj.data.zero_()
    subject.use("eager")
    rest = subject.logits(prompt)
    subject.use(bench_moe_model.LEFT_OUT)
    assert torch.equal(subject.logits(prompt), rest)


@pytest.mark.parametrize("name, low, high", [("qwen3", 1.0e9, 2e9), ("olmoe", 1.0e9, 2e9)])
def test_models_have_one_to_two_billion_parameters(name, low, high):
    with torch.device("meta"):
        model = bench_moe_model.make_model(name, torch.bfloat16)
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_no_such_model():
    with pytest.raises(SystemExit, match="no model 'x'"):
        bench_moe_model.main(["--models", "x"])
