"""The choice of the CPU half's instruction set, and what a user may say about it."""

import os
import platform
import subprocess
import sys

import pytest

import mergeme_ext

# Each starts a process that loads torch: some seconds.
pytestmark = pytest.mark.slow
X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 sets")
NAMES = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
AVAILABLE = mergeme_ext._load._C.build_info()["cpu_available"].split(", ")


def chosen(isa, unchecked=None):
    """What a process of its own chooses, or the last line of its error."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MERGEME_CPU_ISA")}
    if isa is not None:
        environment["MERGEME_CPU_ISA"] = isa
    if unchecked is not None:
        environment["MERGEME_CPU_ISA_UNCHECKED"] = unchecked
    code = "from mergeme_ext import _C; print(_C.build_info()['cpu_chosen'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_sets_offered_are_named_in_order():
    assert [n for n in NAMES if n in AVAILABLE] == AVAILABLE
    assert AVAILABLE[0] == "portable" and chosen(None) in AVAILABLE


@pytest.mark.parametrize("isa", AVAILABLE)
def test_a_set_on_offer_can_be_asked_for(isa):
    assert chosen(isa) == isa


@X86
@pytest.mark.parametrize("isa", [n for n in NAMES if n not in AVAILABLE] or ["sse9"])
def test_a_set_not_on_offer_is_refused(isa):
    message = f"MERGEME_CPU_ISA: expected one of {', '.join(AVAILABLE)}, got {isa}"
    assert message in chosen(isa)


@X86
@pytest.mark.parametrize("isa", NAMES)
def test_unchecked_takes_the_users_word(isa):
    assert chosen(isa, unchecked="1") == isa


def test_unchecked_alone_changes_nothing_and_other_words_are_errors():
    assert chosen(None, unchecked="1") == chosen(None, unchecked="0") == chosen(None)
    assert "expected one of" in chosen("sse9", unchecked="1")
    expected = "MERGEME_CPU_ISA_UNCHECKED: expected 0 or 1, got yes"
    assert expected in chosen("portable", unchecked="yes")
