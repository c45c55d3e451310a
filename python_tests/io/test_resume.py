"""Going on with a checkpoint that was interrupted, alone or with several ranks."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from mergeme_ext.io import CheckpointError, CheckpointSink, CheckpointSource
from mergeme_ext.io.journal import read_journal

TENSORS = [("a", torch.bfloat16, (5, 7)), ("b", torch.float32, (11,)), ("c", torch.float32, (3, 2))]
VALUES = {n: torch.arange(torch.Size(s).numel()).reshape(s).to(d) + 1 for n, d, s in TENSORS}


def sink(path, **kwargs):
    kwargs = {"fingerprint": "f", "max_shard_size": 60, **kwargs}
    return CheckpointSink(path, TENSORS, **kwargs)


def interrupt(path, **kwargs):
    with pytest.raises(KeyboardInterrupt), sink(path, **kwargs) as s:
        s.write("b", VALUES["b"])
        s.write_at("a", 7, VALUES["a"].reshape(-1)[7:21])
        s.note("b", {"t": 0.5})
        raise KeyboardInterrupt


def finish(s):
    for name in VALUES:
        for start, end in s.gaps(name):
            s.write_at(name, start, VALUES[name].reshape(-1)[start:end])


def assert_whole(path):
    source = CheckpointSource(path)
    for name, value in VALUES.items():
        assert torch.equal(source.tensor(name), value)
    assert {p.name for p in path.parent.iterdir()} == {path.name}
    assert not list(path.glob("*journal*"))


def test_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    assert not out.exists()
    with sink(out, resume=True) as s:
        assert s.gaps("a") == [(0, 7), (21, 35)] and s.gaps("b") == [] and s.gaps("c") == [(0, 6)]
        assert s.done_bytes == 14 * 2 + 11 * 4
        assert s.notes == {"b": {"t": 0.5}}
        finish(s)
    assert_whole(out)


def test_nothing_to_resume_begins(tmp_path):
    with sink(tmp_path / "out", resume=True) as s:
        finish(s)
    assert_whole(tmp_path / "out")


def test_an_interrupted_checkpoint_is_not_dropped_silently(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    with pytest.raises(FileExistsError, match="interrupted merge"), sink(out):
        pass
    with sink(out, resume=True) as s:
        assert s.gaps("b") == []
        finish(s)


def test_overwrite_starts_over(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    with sink(out, overwrite=True) as s:
        assert s.done_bytes == 0
        finish(s)
    assert_whole(out)


def test_changed_fingerprint_is_noticed_and_nothing_lost(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    with (
        pytest.raises(CheckpointError, match="has changed since"),
        sink(out, resume=True, fingerprint="g"),
    ):
        pass
    with sink(out, resume=True) as s:
        assert s.gaps("b") == []
        finish(s)


def test_damaged_chunks_are_written_again(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    partial = tmp_path / ".out.partial"
    for file in partial.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-4:] = b"\xff\xff\xff\xff"
        file.write_bytes(data)
    with sink(out, resume=True) as s:
        assert s.gaps("b") == [(0, 11)]
        assert s.gaps("a") == [(0, 7), (21, 35)]
        finish(s)
    assert_whole(out)


def test_wrong_data_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="NaN"), sink(tmp_path / "out") as s:
        s.write("b", VALUES["b"])
        raise ValueError("NaN")
    assert list(tmp_path.iterdir()) == []


def test_torn_journal_line_is_ignored(tmp_path):
    interrupt(tmp_path / "out")
    path = tmp_path / ".out.partial/mergeme_journal-0.jsonl"
    path.write_text(path.read_text() + '["c", 0, 6, 12')
    fingerprint, chunks, notes = read_journal(path)
    assert (fingerprint, len(chunks), len(notes)) == ("f", 2, 1)
    with sink(tmp_path / "out", resume=True) as s:
        finish(s)
    assert_whole(tmp_path / "out")


def test_two_processes_do_not_write_the_same(tmp_path):
    out = tmp_path / "out"
    with sink(out) as s:
        s.write("b", VALUES["b"])
        with pytest.raises(OSError, match="another process"), sink(out, resume=True):
            pass
        finish(s)
    assert_whole(out)


def test_ranks_write_together(tmp_path):
    out = tmp_path / "out"
    with sink(out) as first:
        with sink(out, rank=1) as second:
            second.write("a", VALUES["a"])
            second.note("a", 1)
        with sink(out, rank=2) as third:
            third.write("c", VALUES["c"])
        first.write("b", VALUES["b"])
        first.collect()
        assert first.notes == {"a": 1}
    assert_whole(out)


def test_what_other_ranks_wrote_is_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), sink(out) as first:
        first.write("b", VALUES["b"])
        with sink(out, rank=1) as second:
            second.write("a", VALUES["a"])
        raise KeyboardInterrupt
    with sink(out, resume=True) as s:
        assert [s.gaps(n) for n in "abc"] == [[], [], [(0, 6)]]
        with sink(out, rank=1) as second:  # learns it from rank 0
            assert [second.gaps(n) for n in "abc"] == [[], [], [(0, 6)]]
            finish(second)
        s.collect()
    assert_whole(out)


def test_a_wrong_byte_on_disk_is_found_before_publication(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"'b': elements 0 to 11 read back"), sink(out) as s:
        finish(s)
        file = next(p for p in s.folder.glob("*.safetensors") if b'"b"' in p.read_bytes())
        with file.open("r+b") as f:
            f.seek(-4, os.SEEK_END)
            f.write(b"\0\0\0\0")
    assert not out.exists()


def test_kill_leaves_what_can_be_resumed(tmp_path):
    out = tmp_path / "out"
    code = f"""
        import os, signal, torch
        from mergeme_ext.io import CheckpointSink
        with CheckpointSink({str(out)!r}, [("x", torch.float32, (4,))], fingerprint="f") as s:
            s.write_at("x", 0, torch.ones(2))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -9 and not out.exists()
    lines = (tmp_path / ".out.partial/mergeme_journal-0.jsonl").read_text().splitlines()
    assert json.loads(lines[1])[:3] == ["x", 0, 2]
    again = CheckpointSink(out, [("x", torch.float32, (4,))], fingerprint="f", resume=True)
    with again as s:
        assert s.gaps("x") == [(2, 4)]
        s.write_at("x", 2, torch.zeros(2))
    assert CheckpointSource(out).tensor("x").tolist() == [1, 1, 0, 0]
