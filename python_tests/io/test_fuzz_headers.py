"""A few hundred examples of each kind; ``python -m python_tests.io.fuzz_headers`` runs more."""

import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.io import CheckpointError, CheckpointSource
from python_tests.io import fuzz_headers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with fuzz_headers.playground(tmp_path_factory.mktemp("fuzz")) as folder:
        yield folder


@pytest.mark.parametrize("kind", fuzz_headers.KINDS)
def test_refused_or_harmless(folder, kind):
    @settings(max_examples=300)
    @given(rng=st.randoms(use_true_random=False))
    def try_examples(rng):
        fuzz_headers.empty(folder)
        with fuzz_headers.time_limit(20), fuzz_headers.only_within(folder.parent):
            fuzz_headers.try_one(kind, rng, folder)

    try_examples()


@pytest.mark.parametrize("kind", fuzz_headers.KINDS)
def test_both_outcomes_occur_and_repeat(folder, kind):
    fuzz_headers.empty(folder)
    outcomes, _, _ = fuzz_headers.run(kind, 200, 0, folder)
    assert (outcomes["opened"] > 0) == (kind != "random")
    assert outcomes["opened"] < outcomes.total() == 200
    assert fuzz_headers.run(kind, 200, 0, folder)[0] == outcomes


def test_the_guards_notice(folder, tmp_path):
    (tmp_path / "foreign").touch()
    with pytest.raises(AssertionError, match="foreign"), fuzz_headers.only_within(folder):
        (tmp_path / "foreign").read_bytes()
    with pytest.raises(TimeoutError), fuzz_headers.time_limit(0.01):
        while True:
            pass


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(200_000_000)  # no block of it is on disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="a header of at most 100000000 bytes"):
        CheckpointSource(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
