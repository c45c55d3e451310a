"""Kernels launched with `overlaps` wait for the kernel before them first of all, in nvcc's PTX.

Without the wait such a kernel reads what is not written yet, on a GPU, now and then.
"""

import re
from pathlib import Path

import pytest

from python_tests.ptx.text import Kernel, kernels
from python_tests.support import ptx

pytestmark = pytest.mark.skipif(
    not ptx.built_ops("sm_90a"), reason="no PTX: build with MERGEME_SIMT=1 where nvcc is found"
)
ROOT = Path(__file__).parents[2]
OVERLAPPED = {
    "topk_gating": ("topk_segment_kernel", "topk_kernel", "backward_kernel"),
    "sort_by_expert": (
        "count_kernel",
        "scan_kernel",
        "place_kernel",
        "small_kernel",
        "drop_kernel",
    ),
    "router_statistics": ("sum_kernel", "finish_kernel", "backward_kernel"),
    "grouped_matmul": ("plan_kernel", "grouped_matmul_kernel", "grouped_matmul_sm80_kernel"),
    "grouped_experts": (
        *("plan_kernel", "gate_up_kernel", "rows_kernel", "sums_kernel", "grad_activation_kernel"),
        *("gate_up_sm80_kernel", "rows_sm80_kernel", "sums_sm80_kernel"),
        *("grad_activation_sm80_kernel", "combine_kernel"),
    ),
}
# Also what may be global memory: generic loads, copies that are asynchronous or in bulk, atomics.
_TOUCHES_MEMORY = re.compile(
    r"(ld|st|ldu|prefetch|atom|red)\b(?!\.(param|local|shared|const))|cp\.|tensormap|discard"
)


def first_touch_before_wait(kernel: Kernel) -> str | None:
    """What a kernel does before its griddepcontrol.wait that it may not do; None if all is well."""
    labels = {n for n, line in enumerate(kernel.lines) if re.match(r"\s*\$?\w+:", line)}
    for i in kernel.instructions:
        if any(n <= i.line for n in labels):
            return "a label: the wait may be passed by"
        if i.opcode == "griddepcontrol.wait":
            return f"a guard, {i.guard}" if i.guard else None
        if i.opcode.startswith(("bra", "call", "ret", "exit")) or _TOUCHES_MEMORY.match(i.opcode):
            return f"{i.guard}{i.opcode} {i.operands}"
    return "no griddepcontrol.wait"


def base_name(mangled: str) -> str:
    """The function's own name, the last of a mangled qualified one."""
    at, name = mangled.index("N") + 1, ""
    while m := re.match(r"(\d+)", mangled[at:]):
        begin = at + len(m[1])
        at = begin + int(m[1])
        name = mangled[begin:at]
    return name


@pytest.mark.parametrize("op", OVERLAPPED)
def test_kernels_wait_before_they_touch_memory(op):
    found = kernels(ptx.text_of(op, "sm_90a"))
    waiting = {name: k for name, k in found.items() if base_name(name) in OVERLAPPED[op]}
    assert {base_name(name) for name in waiting} == set(OVERLAPPED[op])
    bad = {name: what for name, k in waiting.items() if (what := first_touch_before_wait(k))}
    assert not bad


@pytest.mark.parametrize("op", OVERLAPPED)
def test_older_devices_have_nothing_to_wait_for(op):
    assert "griddepcontrol" not in ptx.text_of(op, "sm_80")


def test_only_these_launchers_overlap():
    """Another launcher that says `overlaps` needs its kernels in the table above."""
    saying = {
        path.parent.name
        for path in (ROOT / "csrc/ops").glob("*/launch.cu")
        if ".overlaps" in path.read_text()
    }
    assert saying == set(OVERLAPPED)


WAIT = "griddepcontrol.wait;"
BODIES = {
    "right": (
        "mov.u32 %r0, %tid.x;\nld.param.u64 %q0, [p];\nld.shared.u32 %r0, [s];\n" + WAIT,
        None,
    ),
    "none": ("ret;", "ret "),
    "load": ("ld.global.u32 %r0, [%q0];\n" + WAIT, "ld.global.u32 %r0, [%q0]"),
    "generic load": ("ld.u32 %r0, [%q0];\n" + WAIT, "ld.u32 %r0, [%q0]"),
    "store": ("st.global.u32 [%q0], %r0;\n" + WAIT, "st.global.u32 [%q0], %r0"),
    "copy": ("cp.async.cg.shared.global [s], [%q0], 16;\n" + WAIT, "cp.async.cg"),
    "branch": ("@%p0 bra $L1;\n" + WAIT + "\n$L1:\nret;", "@%p0 bra"),
    "label": ("$L1:\n" + WAIT, "a label"),
    "guard": ("@%p0 " + WAIT, "a guard"),
}


@pytest.mark.parametrize("body, finding", BODIES.values(), ids=BODIES)
def test_what_is_found_in_a_kernel(body, finding):
    (kernel,) = kernels(f".visible .entry k(\n.param .u64 p\n)\n{{\n{body}\n}}\n").values()
    found = first_touch_before_wait(kernel)
    assert found is None if finding is None else found.startswith(finding)
