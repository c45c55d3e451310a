"""The arithmetic of the GPU model, and that its committed counts and table belong together."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks import gpu_counts, gpu_model, sass
from benchmarks.gpu_model import A100, H100
from python_tests.support import ptx

KERNELS = gpu_counts.read_table()
PLAIN = gpu_counts.Kernel(
    who="ours",
    role="down",
    name="plain",
    arch="80",
    rows=128,
    columns=128,
    depth=32,
    stages=4,
    threads=128,
    math_warps=4,
    registers=250,
    shared=65568,
    loop=140,
    launch={},
    tile={"instructions": 8000, "wavefronts": 1600, "sectors": 0},
    step={"instructions": 700, "wavefronts": 384, "sectors": 0},
)


@pytest.mark.parametrize("gpu, microseconds", [(H100, 10.0), (A100, 16.8)])
def test_weights_of_a_decoding_step_at_full_bandwidth(gpu, microseconds):
    moved = 4096 * 4096 * 2
    found = gpu_model.memory_seconds(gpu, moved, share=1) * 1e6
    assert found == pytest.approx(microseconds, abs=0.05)
    assert gpu_model.memory_seconds(gpu, moved) * 1e6 == pytest.approx(found / 0.9)


@pytest.mark.parametrize("gpu, teraflops, ridge", [(A100, 312, 155), (H100, 989, 295)])
def test_peaks_and_ridge_of_the_gpus(gpu, teraflops, ridge):
    assert gpu.flops_per_second / 1e12 == pytest.approx(teraflops, rel=0.005)
    assert gpu.flops_per_second / gpu.bytes_per_second == pytest.approx(ridge, rel=0.01)


@pytest.mark.parametrize(
    "threads, registers, shared, blocks",
    [
        (128, 250, 65568, 2),  # by registers and by shared memory
        (128, 168, 65568, 2),  # by shared memory: 3 would fit the registers
        (128, 96, 73760, 2),
        (128, 250, 1024, 2),  # 4 warps of 32 * 256
        (256, 32, 0, 8),  # by threads
        (32, 16, 0, 32),  # by blocks
        (1024, 65, 0, 0),  # does not fit: 32 warps of 72 * 32
    ],
)
def test_blocks_of_an_sm(threads, registers, shared, blocks):
    assert gpu_model.blocks_per_sm(A100, threads, registers, shared) == blocks


def test_blocks_that_need_hoppers_shared_memory():
    assert gpu_model.blocks_per_sm(H100, 384, 168, 213120) == 1
    assert gpu_model.blocks_per_sm(A100, 384, 168, 213120) == 0


def test_tiles_never_straddle_two_groups():
    rows = np.array([0, 1, 128, 129])
    assert gpu_model.tiles_of(rows, 256, PLAIN) == (0 + 1 + 1 + 2) * 2
    assert gpu_model.tiles_of(rows, 257, PLAIN) == (0 + 1 + 1 + 2) * 3


def test_limits_of_one_kernel_by_hand():
    # 217 tiles on 108 SMs: one has three. 1024 steps are 32 stages.
    found = gpu_model.predict(A100, PLAIN, 217, 1024, 2e9).limits
    clocks = {k: v * A100.hertz for k, v in found.items()}
    assert found["memory"] == pytest.approx(2e9 / 1.8e12)
    assert clocks["tensor"] == pytest.approx(3 * 2 * 128 * 128 * 1024 / (2048 * 0.8))
    assert clocks["issue"] == pytest.approx(3 * (8000 + 32 * 140 * 4) / 4)
    assert clocks["shared"] == pytest.approx(3 * (1600 + 32 * 384))
    # Two blocks at a time: two rounds of a first load and 32 stages, three of them in flight.
    assert clocks["latency"] == pytest.approx(2 * 700 * (1 + 32 / 3))


def test_slower_of_the_limits_is_the_bound_and_launches_are_added():
    found = gpu_model.Prediction({"memory": 1e-5, "tensor": 2e-5}, launches=2)
    assert found.bound == "tensor" and found.seconds == pytest.approx(2.5e-5)
    assert gpu_model.described(found) == "25 (tensor, ±40 %)"
    assert gpu_model.described(gpu_model.Prediction({"memory": 5.1e-6}, 2)) == "10 (memory, ±20 %)"


def test_launch_bound_gets_no_number():
    assert gpu_model.described(gpu_model.Prediction({"memory": 5e-6}, launches=2)) == "launch"


def test_wgmma_reads_its_operands_from_shared_memory_and_mma_on_hopper_is_slower():
    wide = dataclasses.replace(
        PLAIN,
        arch="90a",
        columns=256,
        depth=64,
        math_warps=8,
        step={"wavefronts": 0, "instructions": 540},
    )
    found = gpu_model.predict(H100, wide, 1, 64, 0).limits
    assert found["shared"] * H100.hertz == pytest.approx(1600 + (128 + 2 * 256) * 64 * 2 / 128)
    mma = gpu_model.predict(H100, PLAIN, 1, 64, 0).limits["tensor"] * H100.hertz
    assert mma == pytest.approx(2 * 128 * 128 * 64 / (4096 * 0.8 * 0.63))


def test_layer_counts_every_slot_once():
    case = gpu_model.layer("qwen3", 512)
    assert case.rows.sum() == 512 * 8 == case.slots and len(case.rows) == 128
    assert case.rows.max() <= 512


@pytest.mark.parametrize(
    "gpu, tokens, depth, tile",
    [
        # fine: 8 of 64 experts, so tokens / 8 rows each; twice that fits the tile.
        (A100, 64, 1024, ("80", 16, 128)),
        (A100, 67, 1024, ("80", 16, 128)),
        (A100, 68, 1024, ("80", 32, 128)),
        (A100, 256, 1024, ("80", 64, 128)),
        (A100, 260, 1024, ("80", 128, 128)),
        (H100, 128, 1024, ("80", 32, 128)),
        (H100, 129, 1024, ("90a", 64, 256)),
        (H100, 256, 2048, ("90a", 64, 256)),
        (H100, 257, 1024, ("90a", 128, 128)),
        (H100, 4096, 1025, ("90a", 128, 256)),
    ],
)
def test_tile_is_the_launchers(gpu, tokens, depth, tile):
    assert gpu_model.our_tile(gpu, gpu_model.layer("fine", tokens), depth) == tile


def run(tiles, steps, **extra):
    counts = {n: 7 + 100 * tiles + 10 * tiles * steps for n in gpu_counts.COUNTS}
    return gpu_counts.Run(tiles, steps, counts | extra)


def test_fit_finds_launch_tile_and_step():
    parts = gpu_counts.fit([run(1, 4), run(1, 8), run(2, 4)], run(3, 6))
    assert [p["wavefronts"] for p in parts] == pytest.approx([7, 100, 10])


def test_fit_refuses_counts_that_are_not_linear():
    with pytest.raises(RuntimeError, match="wavefronts are not linear: predicted 487"):
        gpu_counts.fit([run(1, 4), run(1, 8), run(2, 4)], run(3, 6, wavefronts=600))


def test_counts_belong_to_the_committed_code():
    table = sass.read_table()
    found = {(r["op"], r["kernel"], r["arch"]): r for r in table["loops"]}
    for k in KERNELS:
        row = found["grouped_experts" if k.who == "ours" else k.who, k.name, k.arch]
        assert k.registers == row["registers"], "python -m benchmarks.gpu_counts --write"
        if row["shape"].startswith("HMMA"):
            assert k.loop == row["loop"] and row["mma"] * 4 * 16 * 8 * 16 == k.rows * 128 * k.depth


def test_main_loops_have_no_bank_conflicts_beyond_the_copies():
    # Of a stage: 16 bytes a thread written by cp.async, 8 x 16 bytes a warp and matrix read.
    for k in KERNELS:
        if k.arch == "80" and k.rows == 128:
            written = (128 + 128) * 32 * 2 // 128
            read = 4 * (64 + 64) * 32 * 2 // 128
            assert k.step["wavefronts"] == written + read


def test_readme_shows_the_table_and_calls_it_a_model():
    text = gpu_model.markdown(KERNELS)
    assert text in gpu_model.README.read_text()
    headings = [line for line in text.splitlines() if line.startswith("**")]
    assert len(headings) == 2
    assert all(line.startswith("**Model, not measured") for line in headings)
    assert text.count("model of") == 6  # columns


def test_plot_names_itself_a_model(tmp_path):
    gpu_model.plot(KERNELS, tmp_path / "plot.svg")
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "plot.svg").read_bytes() == gpu_model.PLOT.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    not ptx.built_ops("sm_80"), reason="no PTX: build with MERGEME_SIMT=1 where nvcc is found"
)
def test_counts_of_ours_are_the_committed_ones():
    counted = gpu_counts.count_ours(sass.read_table())
    assert counted == [k for k in KERNELS if k.who == "ours"]
