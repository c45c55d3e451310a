"""Every synchronising instruction is missed when it goes, or mutations.json says why not."""

import os
from collections import Counter

import pytest

from python_tests.ptx import mutation
from python_tests.ptx.mutation import Subject, demangle, examine, key_of, mutants, short_name
from python_tests.ptx.mutation_calls import CALLS
from python_tests.ptx.text import kernels
from python_tests.support import ptx

needs_ptx = pytest.mark.skipif(
    not ptx.built_ops("sm_80"), reason="no PTX: build with MERGEME_SIMT=1 where nvcc is found"
)
asked_for = pytest.mark.skipif(
    not os.environ.get("MERGEME_MUTATIONS"), reason="takes minutes: make test-mutations"
)


def table():
    return {key_of(row): row for row in mutation.read_table()["rows"]}


def test_every_op_has_rows():
    assert {op for op, *_ in table()} == set(CALLS)


@pytest.mark.parametrize("key", table(), ids=" ".join)
def test_what_is_not_noticed_is_explained(key):
    row = table()[key]
    noticed = row["stopped"] + row["hazard"] + row["wrong"]
    assert noticed + sum(f["copies"] for f in row["unnoticed"]) == row["mutants"]
    for finding in row["unnoticed"] + row["never_run"]:
        assert finding["reason"].strip(), finding


def test_nine_of_ten_are_noticed():
    rows = [row for key, row in table().items() if key[2] == "sm_80"]
    total = sum(row["mutants"] for row in rows)
    assert sum(row["stopped"] + row["hazard"] + row["wrong"] for row in rows) >= 0.9 * total


def test_readme_shows_the_table():
    assert mutation.markdown(mutation.read_table()) in mutation.README.read_text()


@asked_for
@needs_ptx
@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_findings_are_those_of_the_table(op):
    new = {key_of(row): row for row in mutation.measure([op])}
    old = {key: row for key, row in table().items() if key[0] == op}
    for key, row in new.items():
        assert mutation.with_reasons(row, mutation.read_table()) == old.get(key)
    assert set(new) == set(old)


# Every eleventh mutant of some kernels, in each run of the tests.
SAMPLE = {
    "grouped_matmul": ("grouped_matmul_sm80_kernel<bfloat16_t, 0, 16>", "plan_kernel<128>"),
    "sort_by_expert": ("small_kernel", "scan_kernel"),
}


@needs_ptx
@pytest.mark.slow
@pytest.mark.parametrize("op", SAMPLE)
def test_sample(op):
    subject = Subject(op, "ptx80", list(CALLS[op]()))
    names = {short_name(demangle(name)): name for name in subject.kernels}
    for kernel in SAMPLE[op]:
        counts, findings = examine(subject, names[kernel], lambda number: number % 11 == 3)
        known = {mutation.finding_key(f) for f in table()[op, kernel, "sm_80"]["unnoticed"]}
        assert counts.total() > 0 and {f.key() for f in findings} <= known


# Each warp writes its part of shared memory and reads another's, twice; the last barrier stands
# before nothing.
EXCHANGE = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p)
{
.reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %q<9>;
.shared .align 8 .b8 s[512];
.shared .align 8 .b8 m[8];
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
mov.u32 %r2, s;
add.u32 %r3, %r2, %r1;
xor.b32 %r4, %r1, 128;
add.u32 %r4, %r2, %r4;
st.shared.u32 [%r3], %r0;
bar.sync 0;
ld.shared.u32 %r5, [%r4];
bar.sync 0;
st.shared.u32 [%r3], %r5;
bar.sync 0;
ret;
}
"""


def noticed_of(body: str) -> list[bool]:
    (kernel,) = kernels(body).values()
    lines = set(range(1, len(body.splitlines()) + 2))

    def is_noticed(mutant):
        m = ptx.Module(mutant.kernel.text())
        try:
            return m.launch("k", 1, 64, args=[None], race=True)["races"] > 0
        except RuntimeError:
            return True

    return [is_noticed(m) for m in mutants(kernel, 2, lines) if m.change.startswith("delete")]


def test_a_barrier_that_orders_nothing_is_found():
    assert noticed_of(EXCHANGE) == [True, True, False]


CHANGES = {
    "bar.sync 0": ["", "bar.warp.sync -1;"],
    "bar.warp.sync -1": [""],
    "cp.async.commit_group": [""],
    "cp.async.wait_group 2": ["", "cp.async.wait_group 3;"],
    "cp.async.wait_all": ["", "cp.async.wait_group 1;"],
    "wgmma.wait_group.sync.aligned 0": ["", "wgmma.wait_group.sync.aligned 1;"],
    "fence.proxy.async": [""],
    "mbarrier.init.shared.b64 [m], 1": [""],
    "mbarrier.arrive.shared.b64 %q1, [m]": ["mov.b64 %q1, 0;"],
    "mbarrier.arrive.expect_tx.shared.b64 _, [m], %r1": ["", "mbarrier.arrive.shared.b64 _, [m];"],
    "mbarrier.try_wait.parity.shared.b64 %p1, [m], %r1": [
        "setp.eq.u32 %p1, 0, 0;",
        "{ .reg .b32 mutant_parity; xor.b32 mutant_parity, %r1, 1; "
        "mbarrier.try_wait.parity.shared.b64 %p1, [m], mutant_parity; }",
    ],
}


@pytest.mark.parametrize("instruction", CHANGES)
def test_changes(instruction):
    body = EXCHANGE.replace("bar.sync 0;", "").replace("ret;", f"{instruction};\nret;")
    (kernel,) = kernels(body).values()
    (at,) = [n for n, line in enumerate(kernel.lines) if line == f"{instruction};"]
    made = list(mutants(kernel, 2, {kernel.first + at}))
    assert [m.kernel.lines[at] for m in made] == CHANGES[instruction]
    assert Counter(m.change.split()[0] for m in made)["delete"] == 1
    for mutant in made:
        ptx.Module(mutant.kernel.text())  # they can be read


def test_instructions_that_are_not_run_are_left_alone():
    (kernel,) = kernels(EXCHANGE).values()
    assert list(mutants(kernel, 2, set())) == []
