"""The bench of whole expert layers: it checks before it times, and survives its contenders."""

import dataclasses
import json
import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import (
    bench_experts,
    experts_contenders,
    harness,
    isolated,
    report_experts,
    roofline,
)
from benchmarks.experts_contenders import Grouped, Missing
from benchmarks.isolated import Remote
from benchmarks.moe_cases import (
    BOUNDS,
    ROUTINGS,
    SHAPES,
    Case,
    checked_expert,
    make_inputs,
    make_weights,
    reference,
    sample_of,
    some_rows,
    training_reference,
    work,
)

SMOKE = SHAPES["smoke"]
HERE = "packed_experts,grouped_experts,torch_grouped_mm,transformers_eager,transformers_batched_mm"
ROUTINGS_TESTED = pytest.mark.parametrize("routing", ROUTINGS)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """A small buffer, and no verdict on the noise of a busy machine."""
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "FLOP_SECONDS", 0.001)
    monkeypatch.setattr(bench_experts, "NOISE", math.inf)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return bench_experts.main(["--shapes", "smoke", "--threads", "1", "--repeats", "2", *arguments])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every contender of this process, in both modes and routings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "FLUSH_BYTES", 1 << 20)
        patch.setattr(bench_experts, "NOISE", math.inf)
        file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        modes = ["--modes", "forward,training", "--routings", ",".join(ROUTINGS)]
        new = run("--tokens", "1,17", *modes, "--contenders", HERE, "--jsonl", str(file))
    return file, new


def test_smallest_cases(rows):
    file, new = rows
    assert new == [json.loads(line) for line in file.read_text().splitlines()]
    assert len(new) == 2 * 2 * 2 * len(HERE.split(","))
    # What has no backward says so; everything else ran.
    for row in new:
        if row["contender"] == "packed_experts" and row["mode"] == "training":
            assert row["missing"] == "no backward"
        else:
            assert row["error"] <= 2**0.5 * BOUNDS["bfloat16"]
            assert 0 < row["best_s"] <= row["median_s"]
            assert row["x_floor"] == row["best_s"] / max(row["floor_bytes_s"], row["floor_flops_s"])
        assert row["probes_before"]["read_gb_per_s"] > 0 and row["noise"] >= 1


def test_a_file_is_taken_up_where_it_ended(rows, tmp_path, capsys):
    file, new = rows
    again = tmp_path / "rows.jsonl"
    shutil.copy(file, again)
    modes = ["--modes", "forward,training", "--routings", ",".join(ROUTINGS)]
    more = run("--tokens", "1,3,17", *modes, "--contenders", HERE, "--jsonl", str(again))
    assert {row["tokens"] for row in more} == {3}
    # Nothing noisy counts as done.
    noisy = [{**row, "noisy": True} for row in new]
    assert not bench_experts.done_in(noisy, HERE.split(","))
    assert len(bench_experts.done_in(new, HERE.split(","))) == 8
    assert not bench_experts.done_in(new, [*HERE.split(","), "vllm"])
    # Nor what failed for no known reason.
    failed = [{**row, "failed": True} for row in new]
    assert not bench_experts.done_in(failed, HERE.split(","))


def test_the_budget_ends_it(capsys):
    assert run("--tokens", "1,2", "--contenders", "grouped_experts", "--budget", "-1") == []
    assert "2 cases left" in capsys.readouterr().err


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = Grouped.function
    monkeypatch.setattr(Grouped, "function", lambda self, *args: 1.05 * right(self, *args))
    (row,) = run("--tokens", "5", "--contenders", "grouped_experts")
    assert row["missing"].startswith("wrong: relative error 0.05") and "best_s" not in row
    monkeypatch.setattr(Grouped, "function", lambda self, *args: right(self, *args) * math.nan)
    (row,) = run("--tokens", "5", "--contenders", "grouped_experts")
    assert row["missing"].startswith("wrong: relative error nan")


def test_slow_calls_are_left_out():
    arguments = ("--contenders", "torch_grouped_mm", "--call-seconds", "1e-9")
    first, second = run("--tokens", "1,4096", *arguments)
    assert "best_s" in first and second["missing"].startswith("left out: about")


def test_memory_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(isolated, "SPARE_BYTES", 1 << 60)
    packed, grouped = run("--tokens", "5", "--contenders", "packed_experts,torch_grouped_mm")
    assert packed["missing"].startswith("needs 0.0 GiB of memory") and packed["failed"]
    assert "best_s" in grouped  # shares the weights that are there


@pytest.mark.parametrize(
    "name, mode, tokens, what",
    [("batched_mm", "forward", 512, "36 GiB of weights"), ("eager", "training", 1, "144 GiB of g")],
)
def test_copies_of_weights_are_refused(name, mode, tokens, what):
    case = Case("qwen3", "bfloat16", 1, mode, "balanced", tokens)
    with pytest.raises(Missing, match=f"would make {what}"):
        experts_contenders.find(f"transformers_{name}", None).refuse(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [("vllm", "no vllm in the folder"), ("kt_kernel", "no kt_kernel in the folder")],
)
def test_absent_peers_say_so(name, message, tmp_path):
    arguments = ("--tokens", "2", "--contenders", f"grouped_experts,{name}")
    ours, theirs = run(*arguments, "--peers", str(tmp_path))
    assert "best_s" in ours and message in theirs["missing"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler")
def test_a_contender_may_end_its_process(tmp_path):
    (tmp_path / "vllm").mkdir()
    source = tmp_path / "dies.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void f(void) { fputs("why", stderr); abort(); }\n'
    )
    library = tmp_path / "vllm/_C.abi3.so"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    remote = Remote("sglang", str(tmp_path))
    case = Case("smoke", "bfloat16", 1, "forward", "balanced", 8)
    try:
        with pytest.raises(Missing, match=r"ended its process with SIGABRT at 8 tokens.*why"):
            remote.prepare(case)
        # What more tokens would do is known; fewer are tried again.
        with pytest.raises(Missing, match="at 8 tokens"):
            remote.prepare(dataclasses.replace(case, tokens=9))
        with pytest.raises(Missing, match="at 7 tokens"):
            remote.prepare(dataclasses.replace(case, tokens=7))
        with pytest.raises(Missing, match="no backward"):
            remote.prepare(dataclasses.replace(case, mode="training"))
    finally:
        remote.close()


@ROUTINGS_TESTED
def test_routing(routing):
    ids = make_inputs(SHAPES["fine"], torch.bfloat16, routing, 2000).topk_ids
    assert all(len(set(token)) == 8 for token in ids.tolist())
    counts = ids.flatten().bincount(minlength=64).sort().values
    assert counts.sum() == 16000
    # Balanced: within six standard deviations of 250. Skewed: the first gets far more.
    if routing == "balanced":
        assert (counts - 250).abs().max() < 6 * 250**0.5
    else:
        assert counts[-1] > 10 * counts[0]


@pytest.mark.parametrize("tokens", [1, 6, 40])
@ROUTINGS_TESTED
def test_references_agree_with_autograd(routing, tokens):
    weights = make_weights(SMOKE, torch.float64)
    inputs = make_inputs(SMOKE, torch.float64, routing, tokens)
    mix = inputs.topk_weights.double()
    leaves = [t.clone().requires_grad_() for t in (inputs.x, weights.gate_up, weights.down, mix)]
    x, gate_up, down, mix = leaves
    out = []
    for t in range(tokens):
        total = 0
        for k, e in enumerate(inputs.topk_ids[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            total = total + mix[t, k] * (down[e] @ (gate * gate.sigmoid() * up))
        out.append(total)
    out = torch.stack(out)
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    sample, expert = sample_of(tokens), checked_expert(inputs)
    (found,) = reference(weights, inputs, sample)
    torch.testing.assert_close(found.value, out[sample].detach())
    rows = (some_rows(grads[1][expert]), some_rows(grads[2][expert]))
    expected = (grads[0][sample], *rows, grads[3][sample])
    for got, want in zip(training_reference(weights, inputs, sample), expected, strict=True):
        torch.testing.assert_close(got.value, want)


def test_sample_has_the_first_and_the_last():
    for tokens in (1, 2, 16, 17, 4096):
        sample = sample_of(tokens).tolist()
        assert sample[0] == 0 and sample[-1] == tokens - 1 and len(sample) == min(tokens, 16)


def test_work():
    inputs = make_inputs(SMOKE, torch.bfloat16, "balanced", 1)  # two of four experts
    per_expert = 3 * 64 * 32
    assert work(SMOKE, torch.bfloat16, inputs, "forward") == (4 * per_expert, 4 * per_expert)
    assert work(SMOKE, torch.float32, inputs, "training") == (32 * per_expert, 12 * per_expert)


def test_weights_differ_between_experts_and_rows():
    gate_up = make_weights(SHAPES["fine"], torch.bfloat16).gate_up
    assert float(gate_up.float().std()) == pytest.approx(1024**-0.5, rel=1e-2)
    assert not torch.equal(gate_up[0], gate_up[1]) and not torch.equal(gate_up[0, 0], gate_up[0, 1])


def test_probes():
    probe = roofline.Probe(torch.ones(1 << 20, dtype=torch.uint8))
    one, two = probe.limits(1), probe.limits(2)
    assert one.keys() == two.keys() and all(value > 0 for value in one.values())
    limits = {"read_gb_per_s": 9e9, "fma_gflop_per_s": 2.0, "bf16_tile_gflop_per_s": 16.0}
    assert roofline.peak_flops(limits, torch.float32) == 2e9
    assert roofline.peak_flops(limits, torch.bfloat16) == 16e9
    assert roofline.noise_of({"a": 2.0, "b": 1.0}, {"a": 1.6, "b": 1.0}) == 1.25


def test_probes_without_a_compiler(monkeypatch):
    monkeypatch.setattr(roofline, "_library", lambda: None)
    limits = roofline.Probe(torch.ones(1 << 20, dtype=torch.uint8)).limits(1)
    assert limits["read_gb_per_s"] > 0 and roofline.peak_flops(limits, torch.bfloat16) > 0


def test_report(rows, tmp_path):
    file, _ = rows
    readme, drawing = tmp_path / "README.md", tmp_path / "experts.svg"
    readme.write_text(f"before\n{report_experts.BEGIN}\nold\n{report_experts.END}\nafter\n")
    arguments = [str(file), "--readme", str(readme), "--plot", str(drawing)]
    text = report_experts.main(arguments)
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert text in readme.read_text() and text.count("| tokens |") == 4
    report_experts.main(arguments)  # a second time changes nothing
    assert readme.read_text().splitlines() == lines
    charts = ElementTree.parse(drawing).getroot()
    assert len(charts.findall("{http://www.w3.org/2000/svg}svg")) == 4
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="expected the lines"):
        report_experts.main([str(file), "--readme", str(readme)])


def test_report_takes_the_last_run_and_names_what_is_missing():
    case = {"shape": "fine", "dtype": "bfloat16", "threads": 1, "mode": "forward"}
    case |= {"op": "experts", "routing": "balanced", "tokens": 8, "noisy": False}
    floor = {"floor_bytes_s": 1e-3, "floor_flops_s": 2e-3, "floor_s": 2e-3}

    def row(contender, seconds=None, **more):
        timed = {} if seconds is None else {"best_s": seconds, "x_floor": seconds / 2e-3}
        return {**case, **floor, "contender": contender, **timed, **more}

    rows = [row("packed_experts", 9.0), row("packed_experts", 3e-3), row("vllm", 6e-3)]
    rows.append(row("sglang", missing="ended its process with SIGILL at 8 tokens"))
    text = report_experts.report(rows)
    assert "| 8 | 3 | 6 | 1 | 2 | 1.50 | 2.00 (vLLM) |" in text
    assert "Missing: SGLang: ended its process with SIGILL" in text
