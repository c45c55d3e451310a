"""What of the GPU bench can be tested without a GPU."""

import subprocess

import pytest
import torch

from benchmarks import bench_experts_gpu, gpu_machine
from benchmarks.bench_experts_gpu import Case, call_of, error_of, markdown, parts_of
from benchmarks.experts_contenders import Missing
from benchmarks.experts_contenders_gpu import CONTENDERS, DeepGemm, need, padded_rows
from benchmarks.moe_cases import (
    SHAPES,
    make_inputs,
    make_weights,
    reference,
    sample_of,
    training_reference,
)
from python_tests.house.test_layout import ROOT

CASE = Case("smoke", "bfloat16", 1, "forward", "balanced", 20)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_refuses_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpu_machine.MissingGpuError, match="no GPU: nvidia-smi"):
        gpu_machine.query("name")


def fake_smi(folder, text, code=0):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    tool.chmod(0o755)


def test_reads_the_first_gpu(tmp_path, monkeypatch):
    fake_smi(tmp_path, "NVIDIA H100 80GB HBM3, 9.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_machine.query("name", "compute_cap") == ["NVIDIA H100 80GB HBM3", "9.0"]


def test_refuses_a_driver_without_a_gpu(tmp_path, monkeypatch):
    fake_smi(tmp_path, "No devices were found", code=6)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(gpu_machine.MissingGpuError, match="No devices were found"):
        gpu_machine.query("name")


def test_refuses_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(gpu_machine.MissingGpuError, match="install the CUDA toolkit"):
        gpu_machine.find_nvcc()


@pytest.mark.parametrize(
    "capability, listed", [("8.0", "8.0+PTX"), ("9.0", "9.0a"), ("12.0", "12.0+PTX")]
)
def test_architectures_of_the_build(capability, listed):
    assert gpu_machine.architectures(capability) == listed


@no_gpu
@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_make_refuses_before_it_installs_anything(target, tmp_path):
    done = subprocess.run(
        ["make", target, f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "no GPU" in done.stderr
    assert not (tmp_path / "venv").exists()


@no_gpu
def test_bench_refuses_without_a_gpu(capsys):
    assert bench_experts_gpu.main([]) == 2
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", ["grouped_experts", "torch_grouped_mm"])
def test_contenders_that_run_anywhere_are_right(name, mode):
    case = Case("smoke", "bfloat16", 1, mode, "balanced", 20)
    weights = make_weights(SHAPES["smoke"], torch.bfloat16)
    inputs = make_inputs(SHAPES["smoke"], torch.bfloat16, "balanced", 20)
    check = reference if mode == "forward" else training_reference
    expected = check(weights, inputs, sample_of(20))
    contender = CONTENDERS[name]()
    contender.load(weights, 1)
    result = call_of(contender, case, inputs)()
    assert 0 < error_of(case, parts_of(case, result, inputs), expected) < 0.02
    with pytest.raises(Missing, match="wrong"):
        first = result if mode == "forward" else result[0]
        first.mul_(1.1)
        error_of(case, parts_of(case, result, inputs), expected)


def test_missing_libraries_say_why():
    with pytest.raises(Missing, match="no_such_library: No module named"):
        need("no_such_library")


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_padded_rows_begin_at_multiples_and_keep_their_expert(tokens):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, 6, (tokens, 2), generator=g)
    place, owner = padded_rows(ids, 6, 16)
    assert place.unique().numel() == ids.numel() and owner.numel() % 16 == 0
    assert torch.equal(owner[place].long(), ids.reshape(-1))
    for block in owner.view(-1, 16):
        assert block.unique().numel() == 1


def test_deep_gemm_layer_around_its_products(monkeypatch):
    class Library:
        @staticmethod
        def m_grouped_bf16_gemm_nt_contiguous(a, b, d, owner):
            for row, e in enumerate(owner.tolist()):
                d[row] = a[row] @ b[e].T if e >= 0 else float("nan")

    monkeypatch.setattr("benchmarks.experts_contenders_gpu.need", lambda name: Library)
    weights = make_weights(SHAPES["smoke"], torch.bfloat16)
    inputs = make_inputs(SHAPES["smoke"], torch.bfloat16, "balanced", 20)
    contender = DeepGemm()
    contender.load(weights, 1)
    expected = reference(weights, inputs, sample_of(20))
    error_of(CASE, parts_of(CASE, contender.forward(inputs)(), inputs), expected)


def test_prediction_is_for_the_tokens_at_hand():
    inputs = make_inputs(SHAPES["olmoe"], torch.bfloat16, "balanced", 512)
    case = Case("olmoe", "bfloat16", 1, "forward", "balanced", 512)
    found = bench_experts_gpu.prediction("NVIDIA A100-SXM4-80GB", case, inputs)
    assert 4e-4 < found["predicted_s"] < 6e-4 and "memory" in found["predicted"]
    assert bench_experts_gpu.prediction("NVIDIA GeForce RTX 4090", case, inputs) == {}


def test_table_of_rows():
    base = {"shape": "olmoe", "mode": "forward", "routing": "balanced", "tokens": 512}
    rows = [
        base | {"contender": "grouped_experts", "median_s": 6e-4, "predicted_s": 5e-4}
        | {"predicted": "500 (memory, ±20 %)"},
        base | {"contender": "torch_grouped_mm", "median_s": 9e-4},
        base | {"contender": "vllm", "missing": "vllm: No module named 'vllm'"},
    ]  # fmt: skip
    text = markdown(rows)
    line = "| olmoe | forward | balanced | 512 | 600 | 900 | 500 (memory, ±20 %) | 1.20 |"
    assert line in text
    assert "Missing: vllm: vllm: No module named 'vllm'" in text
