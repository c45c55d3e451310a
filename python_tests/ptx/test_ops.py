"""Ops in the interpreter: what of a kernel's misbehaviour is noticed, and what its counts show."""

import ctypes

import pytest
import torch

from mergeme_ext import _simt
from python_tests.ops import test_grouped_experts as experts
from python_tests.ops import test_grouped_matmul as matmul
from python_tests.support import ptx
from python_tests.support.backends import CPU, PTX80, PTX90, PTX_BACKENDS

pytestmark = pytest.mark.skipif(
    not ptx.built_ops("sm_80"), reason="no PTX: build with MERGEME_SIMT=1 where nvcc is found"
)
ARCHITECTURES = sorted(ptx.ARCHITECTURES.values())
BF16 = torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_a_symbol_of_the_launchers(architecture):
    library = ctypes.CDLL(_simt.__file__)
    for op in ptx.built_ops(architecture):
        names = ptx.kernel_names(ptx.text_of(op, architecture))
        assert names
        assert [name for name in names if not hasattr(library, name)] == []


def test_cutting_a_kernel_out_keeps_it_and_its_lines():
    text = ptx.text_of("gram", "sm_80")
    names = ptx.kernel_names(text)
    assert len(set(names)) == len(names) > 1
    for name in names:
        alone = ptx.only_kernel(text, name)
        assert ptx.kernel_names(alone) == [name]
        kernel = alone[alone.index(".entry") :].split("\n}\n")[0]
        assert kernel in text
        assert alone[: alone.index(kernel)].count("\n") == text[: text.index(kernel)].count("\n")
        assert [k.name for k in ptx.Module(alone).kernels()] == [name]


# A kernel of three blocks: weighted_sum of 5000 float32 values, of which it gets the address of the
# results at byte 0, and at byte 8 that of a table of the tensors' addresses.
HEADER = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry {name}(.param .align 8 .b8 p[{size}])
{{
 .reg .b64 %rd<8>;
 .reg .b32 %r<8>;
 .reg .pred %p<2>;
 ld.param.u64 %rd1, [p];
 ld.param.u64 %rd2, [p+8];
 mov.u32 %r1, %ctaid.x;
 mov.u32 %r2, %tid.x;
 {body}
 ret;
}}
"""


def run_instead(body, tensors=None, backend=PTX80):
    text = ptx.text_of("weighted_sum", "sm_80")
    name = next(n for n in ptx.kernel_names(text) if "IfE" in n)
    size = ptx.Module(ptx.only_kernel(text, name)).kernels()[0].parameter_bytes
    body = body.replace("; ", ";\n ")
    tensors = tensors or [torch.arange(5000.0)]
    weights = torch.ones(len(tensors), dtype=torch.float64)
    with ptx.override("weighted_sum", "sm_80", HEADER.format(name=name, size=size, body=body)):
        return backend.op("weighted_sum")(tensors, weights)


def test_memory_that_nothing_writes_is_nan():
    assert run_instead("").isnan().all()


def test_what_every_block_writes_alike_is_right():
    out = run_instead("mov.u32 %r3, 7; st.global.u32 [%rd1+4], %r3;")
    assert out[1].view(torch.int32) == 7 and out.isnan().sum() == 4999


BAD_BODIES = {
    "before-results": ("st.global.u32 [%rd1+-4], %r1;", "outside"),
    "behind-results": ("st.global.u32 [%rd1+20000], %r1;", "outside"),
    "null": ("mov.u64 %rd3, 0; ld.global.u32 %r3, [%rd3];", "NULL|null|outside"),
    "misaligned": ("ld.global.u32 %r3, [%rd1+2];", "misaligned|aligned"),
    "input": ("ld.global.u64 %rd3, [%rd2]; st.global.u32 [%rd3], %r1;", "read-only|read only"),
    "table": ("ld.global.u64 %rd3, [%rd2+8];", "outside"),
    "trap": ("trap;", "trap"),
    "schedule": ("st.global.u32 [%rd1], %r1;", "to be the same for every seed"),
    "shared-race": (
        "st.shared.u32 [s], %r2; bar.sync 0; ld.shared.u32 %r3, [s]; st.shared.u32 [s], %r2;",
        "race|hazard",
    ),
    "shuffle": (
        "setp.gt.u32 %p1, %r2, 15; @%p1 bra OUT; shfl.sync.down.b32 %r3, %r2, 16, 31, 65535; OUT:",
        "shfl_undefined_reads|mask",
    ),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_misbehaviour_is_noticed(case):
    body, message = BAD_BODIES[case]
    if "[s]" in body:
        body = ".shared .align 4 .b32 s; " + body
    with pytest.raises(RuntimeError, match=message):
        run_instead(body)


def test_an_override_ends_with_its_context():
    tensors, weights = [torch.arange(5000.0)], torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        run_instead("trap;", tensors)
    for backend in (PTX80, PTX90):
        assert torch.equal(backend.op("weighted_sum")(tensors, weights), tensors[0])


@pytest.mark.parametrize("backend", PTX_BACKENDS)
def test_inputs_may_share_memory(backend):
    x = torch.arange(400.0)
    tensors, weights = [x[:300], x[100:], x[:300]], torch.tensor([1.0, 2, 4]).double()
    assert torch.equal(*(b.op("weighted_sum")(tensors, weights) for b in (CPU, backend)))


def test_every_seed_runs_and_settings_come_back():
    tensors, weights = [torch.ones(3)], torch.ones(1, dtype=torch.float64)
    with ptx.recording(seeds=(0, 1, 2)) as launches:
        PTX90.op("weighted_sum")(tensors, weights)
    assert [x.seed for x in launches] == [0, 1, 2]
    first = launches[0]
    assert (first.op, first.variant, first.architecture) == (
        "weighted_sum",
        "weighted_sum",
        "sm_90a",
    )
    assert (first.capability, first.grid, first.block, first.cluster) == (
        90,
        (1, 1, 1),
        (256, 1, 1),
        1,
    )
    assert first.statistics["warp_instructions"] > 0
    with pytest.raises(ZeroDivisionError), ptx.seeds(5), ptx.pretending(75):
        raise ZeroDivisionError
    assert _simt.ptx.settings.seeds == [0, 1, 2]
    assert _simt.ptx.settings.capability is None and not _simt.ptx.settings.record


def variants(backend, op, *args, capability, **options):
    with ptx.pretending(capability), ptx.recording() as launches:
        out = backend.op(op)(*args, **options)
    return out, [x for x in launches if x.variant != "grouped plan"]


# What a device of this capability runs: the text for it, and what the kernel's variant is called.
DEVICES = [
    (PTX80, 75, ""),
    (PTX80, 80, "sm_80"),
    (PTX80, 86, "sm_80"),
    (PTX80, 89, "sm_80"),
    (PTX90, 90, "sm_90"),
    (PTX80, 100, "sm_80"),
    (PTX80, 120, "sm_80"),
]
ENOUGH_ROWS = [40, 0, 34]  # for tiles of sm_90


def kernel_suffix(suffix):
    return suffix and f"_{suffix.replace('_', '')}"


@pytest.mark.parametrize("backend, capability, suffix", DEVICES)
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_products_run_the_variant_of_the_device(backend, capability, suffix, layout):
    args = matmul.make(layout, ENOUGH_ROWS, 72, 40, BF16)
    op = f"grouped_matmul_{layout}"
    out, launches = variants(backend, op, *args, capability=capability)
    matmul.check(out, layout, args)
    expected = f"grouped_matmul ({suffix})" if suffix else "grouped_matmul"
    assert [x.variant for x in launches] == [expected]
    assert f"grouped_matmul{kernel_suffix(suffix)}_kernel<" in launches[0].kernel


@pytest.mark.parametrize("backend, capability, suffix", DEVICES)
def test_experts_run_the_variant_of_the_device(backend, capability, suffix):
    args = experts.make(ENOUGH_ROWS, 2, 72, 40, BF16)
    (out, _), launches = variants(backend, "grouped_experts", *args, capability=capability)
    right = experts.reference(*args)
    torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=2e-2)
    tiles = [x for x in launches if "combine" not in x.variant]
    for x, name in zip(tiles, ("gate_up", "rows"), strict=True):
        assert f"::{name}{kernel_suffix(suffix)}_kernel<" in x.kernel


@pytest.mark.parametrize("dtype, inner", [(torch.float32, 72), (torch.float64, 72), (BF16, 71)])
def test_portable_products_where_tensor_cores_do_not_serve(dtype, inner):
    args = matmul.make("nt", [9, 0, 23], inner, 40, dtype)
    for backend, capability in ((PTX80, 80), (PTX90, 90)):
        _, launches = variants(backend, "grouped_matmul_nt", *args, capability=capability)
        assert [x.variant for x in launches] == ["grouped_matmul"]


@pytest.mark.parametrize("height", [16, 32, 64, 128])
def test_heights_of_tiles_follow_the_rows(height):
    args = matmul.make("nt", [height // 2] * 2, 64, 64, BF16)
    _, launches = variants(PTX80, "grouped_matmul_nt", *args, capability=80)
    assert f", {height}>" in launches[0].kernel.replace(f"(int){height}", str(height))


def streaming_cases():
    """Calls, and how the variants of the kernels begin that go through the large operands."""
    g = torch.Generator().manual_seed(0)
    base, *tensors = (torch.randn(64, 2048, generator=g).to(BF16) for _ in range(3))
    flat, *flats = (t.flatten() for t in (base, *tensors))
    weights = torch.tensor([0.5, 0.25]).double()
    kept = torch.tensor([[0.5, 0.0]] * 2).double()
    mask = {"mask": "magnitude", "key": 1}
    merge = mask | {"offset": 0, "elect": "sum", "normalize": True, "lam": 1.0}
    logits = torch.randn(256, 128, generator=g)
    ids = torch.randint(128, (256, 8), generator=g).int()
    rows = torch.ones(1, 2).double()
    whole = {"axis": "all", "offset": 0, "row_length": 64 * 2048}
    return {
        "weighted_sum": ((tensors, weights), {}, ""),
        "merge_task_vectors": (
            (base, tensors, weights, weights, kept),
            merge,
            "merge_task_vectors",
        ),
        "masked_norms": ((base, tensors, kept), mask, "masked_norms_partials"),
        "gram": ((base, tensors), {"axis": "row"}, "gram_row"),
        "first_nonfinite": ((base,), {}, "first_nonfinite"),
        "magnitude_threshold": ((base, tensors, [5000, 9000]), {}, "magnitude_threshold_count"),
        "combine_rows": ((flat, flats, rows), whole, ""),
        "router_statistics": ((logits, ids), {}, ""),
        "quantize_fp8": ((base,), {}, ""),
    }


@pytest.mark.parametrize("backend", PTX_BACKENDS)
@pytest.mark.parametrize("op", streaming_cases())
def test_streaming_kernels_touch_few_sectors_beyond_the_ideal(op, backend):
    args, options, variant = streaming_cases()[op]
    with ptx.recording() as launches:
        backend.op(op)(*args, **options)
    counts = [
        x.statistics[kind]
        for x in launches
        if x.variant.startswith(variant)
        for kind in ("global_load", "global_store")
    ]
    sectors, ideal = (sum(c[key] for c in counts) for key in ("sectors", "ideal_sectors"))
    assert sectors > 0 and ideal >= 0.95 * sectors, (ideal, sectors)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("rows", [16, 128])
def test_products_have_few_conflicts_in_shared_memory(layout, rows):
    """Main loops of 32 steps; what lies around them is counted too."""
    depth = 2048 if layout != "tn" else 128
    counts = [rows // 2] * 2 if layout != "tn" else [1024]
    args = matmul.make(layout, counts, depth, 128, BF16)
    _, launches = variants(PTX80, f"grouped_matmul_{layout}", *args, capability=80)
    assert launches[0].statistics["shared"]["conflict_degree"] <= 1.1
