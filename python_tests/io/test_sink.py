import errno
import itertools
import json
import os
import signal
import threading
import time

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.io import (
    CheckpointError,
    CheckpointSink,
    CheckpointSource,
    format_size,
    parse_size,
)
from mergeme_ext.io import sink as sink_module
from mergeme_ext.io.format import DTYPES
from mergeme_ext.io.mapped import MappedFile
from python_tests.io.test_source import random_tensor, same_bits


def plan(tensors):
    return [(name, t.dtype, t.shape) for name, t in tensors.items()]


def write(path, tensors, **options):
    with CheckpointSink(path, plan(tensors), **options) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)


def nothing_left(folder):
    return list(folder.iterdir()) == []


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_safetensors_reads_what_we_write(tmp_path, dtype):
    tensors = {
        "a": random_tensor(dtype, (3, 5)),
        "scalar": random_tensor(dtype, ()),
        "none": random_tensor(dtype, (0,)),
    }
    write(tmp_path / "out", tensors)
    file = tmp_path / "out" / "model.safetensors"
    written = MappedFile(file)
    for info in written.infos:
        assert same_bits(written.tensor(info), tensors[info.name])
    if dtype == torch.float8_e8m0fnu:
        return  # the library's torch half does not know it
    with safetensors.safe_open(file, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert same_bits(reader.get_tensor(name), tensor)


def test_data_are_aligned_whatever_the_order(tmp_path):
    tensors = {
        "flags": random_tensor(torch.bool, (3,)),
        "ä": random_tensor(torch.float64, (3,)),
        "half": random_tensor(torch.bfloat16, (5,)),
        "single": random_tensor(torch.float32, (5,)),
    }
    write(tmp_path / "out", tensors)
    source = CheckpointSource(tmp_path / "out")
    for name, tensor in tensors.items():
        assert source.info(name).start % tensor.dtype.itemsize == 0
        assert same_bits(source.tensor(name), tensor)


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(5)} | {"big": torch.ones(100)}
    write(tmp_path / "out", tensors, max_shard_size=200)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == [
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / files[-1]).read_text())
    assert index["metadata"] == {"total_size": 900, "total_parameters": 225}
    assert index["weight_map"]["t2"] == files[1]
    assert index["weight_map"]["big"] == files[3]
    source = CheckpointSource(tmp_path / "out")
    assert source.names == list(tensors)
    assert all(torch.equal(source.tensor(n), t) for n, t in tensors.items())


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 1000), max_size=8), seed=st.randoms(use_true_random=False))
def test_chunks_in_any_order_give_the_whole(tmp_path_factory, cuts, seed):
    folder = tmp_path_factory.mktemp("chunks")
    whole = torch.arange(1000.0).bfloat16()
    bounds = [0, *sorted(cuts), 1000]
    chunks = list(itertools.pairwise(bounds))
    seed.shuffle(chunks)
    with CheckpointSink(folder / "out", [("w", whole.dtype, (10, 100))]) as sink:
        for start, end in chunks:
            sink.write_at("w", start, whole[start:end])
    assert torch.equal(CheckpointSource(folder / "out").tensor("w").flatten(), whole)


def test_writes_what_is_not_contiguous(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).t()
    write(tmp_path / "out", {"w": tensor})
    assert torch.equal(CheckpointSource(tmp_path / "out").tensor("w"), tensor)


def test_texts_and_copies(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with CheckpointSink(tmp_path / "out", []) as sink:
        sink.write_text("README.md", "für")
        sink.copy_file(tmp_path / "link", "sub/copy")
        for name in ("../x", "/x", "..", "", "a\\b"):
            with pytest.raises(ValueError, match="expected a file name inside the folder"):
                sink.write_text(name, "")
        with pytest.raises(FileExistsError):
            sink.write_text("README.md", "again")
        with pytest.raises(ValueError, match="expected a regular file"):
            sink.copy_file(tmp_path, "folder")
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == "für"
    assert not (tmp_path / "out/sub/copy").is_symlink()


BAD_WRITES = [
    (lambda s: s.write("w", torch.ones(5)), r"expected shape \[2, 2\], got \[5\]"),
    (lambda s: s.write("w", torch.ones(2, 2).half()), "expected float32, got float16"),
    (lambda s: s.write("v", torch.ones(1)), "'v' was not planned"),
    (lambda s: s.write_at("w", 3, torch.ones(2)), r"expected a part of \[0, 4\), got \[3, 5\)"),
    (lambda s: s.write_at("w", -1, torch.ones(2)), r"got \[-1, 1\)"),
    (lambda s: s.write_at("w", 0, torch.ones(1, 1)), "expected a flat chunk"),
    (lambda s: [s.write_at("w", i, torch.ones(2)) for i in (0, 1)], "was written before"),
    (lambda s: s.write_at("w", 0, torch.ones(3)), "element 3 of 4 was never written"),
    (lambda s: s.write_at("w", 1, torch.ones(3)), "element 0 of 4 was never written"),
]


@pytest.mark.parametrize("act, message", BAD_WRITES, ids=[m for _, m in BAD_WRITES])
def test_refuses_bad_write_and_leaves_nothing(tmp_path, act, message):
    with (
        pytest.raises(ValueError, match=message),
        CheckpointSink(tmp_path / "a/b/out", [("w", torch.float32, (2, 2))]) as sink,
    ):
        act(sink)
    assert nothing_left(tmp_path)


def test_refuses_bad_plan(tmp_path):
    with pytest.raises(CheckpointError, match="'w' is planned twice"):
        CheckpointSink(tmp_path / "out", [("w", torch.float32, (2,))] * 2)
    with pytest.raises(CheckpointError, match="safetensors has no dtype complex128"):
        CheckpointSink(tmp_path / "out", [("w", torch.complex128, (2,))])
    with pytest.raises(ValueError, match="not open"):
        CheckpointSink(tmp_path / "out", [("w", torch.float32, (2,))]).write("w", torch.ones(2))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), CheckpointSink(tmp_path / "out", plan({"w": torch.ones(4)})):
        raise error
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_leaves_nothing(tmp_path, number):
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected), CheckpointSink(tmp_path / "out", plan({"w": torch.ones(4)})):
        assert not nothing_left(tmp_path)
        signal.raise_signal(number)
        time.sleep(10)
    assert nothing_left(tmp_path)


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    write(tmp_path / "out", {"w": torch.ones(1)})
    assert signal.getsignal(signal.SIGTERM) is before
    thread = threading.Thread(target=write, args=(tmp_path / "two", {"w": torch.ones(1)}))
    thread.start()
    thread.join()
    assert (tmp_path / "two").is_dir()


def test_existing_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, {"w": torch.zeros(1)})  # an empty folder is no obstacle
    with pytest.raises(FileExistsError, match="overwriting must be asked for"):
        write(out, {"w": torch.ones(1)})
    with (
        pytest.raises(RuntimeError),
        CheckpointSink(out, plan({"w": torch.ones(1)}), overwrite=True) as sink,
    ):
        sink.write("w", torch.ones(1))
        raise RuntimeError
    assert CheckpointSource(out).tensor("w").item() == 0
    write(out, {"w": torch.ones(1)}, overwrite=True)
    assert CheckpointSource(out).tensor("w").item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, {"w": torch.zeros(1)})
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(sink_module.os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(out, {"w": torch.ones(1)}, overwrite=True)
    assert CheckpointSource(out).tensor("w").item() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_never_overwrites_what_is_no_checkpoint(tmp_path):
    for name, child in (("a", "thesis.tex"), ("b", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / child).touch()
    (tmp_path / "b" / "checkpoint-500").mkdir()
    (tmp_path / "file").touch()
    for name in "ab":
        with pytest.raises(FileExistsError, match="does not look like a checkpoint"):
            write(tmp_path / name, {"w": torch.ones(1)}, overwrite=True)
    with pytest.raises(FileExistsError, match="is no folder"):
        write(tmp_path / "file", {"w": torch.ones(1)}, overwrite=True)


def test_target_through_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", {"w": torch.ones(1)})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/model.safetensors").is_file()


def test_too_little_space_is_seen_first(tmp_path):
    huge = [("w", torch.float32, (2**50,))]
    with (
        pytest.raises(OSError, match=r"no room for the checkpoint: needs 4.5e"),
        CheckpointSink(tmp_path / "out", huge),
    ):
        raise AssertionError("unreachable")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_failed_reservation_leaves_nothing(tmp_path, monkeypatch, code):
    def refuse(descriptor, offset, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sink_module.os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"no room .* could not reserve") as caught:
        write(tmp_path / "deep/out", {"w": torch.ones(1)})
    assert caught.value.errno == errno.ENOSPC
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_reservation_falls_back(tmp_path, monkeypatch, code):
    def refuse(descriptor, offset, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sink_module.os, "posix_fallocate", refuse)
    write(tmp_path / "out", {"w": torch.ones(3)})
    assert CheckpointSource(tmp_path / "out").tensor("w").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 KB", 1500), (7, 7), ("12", 12), ("3B", 3)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (20800, "20.8 KB"), (999_900, "1 MB"), (5_200_000_000, "5.2 GB")],
)
def test_sizes_for_people(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nanGB", "infGB", "5 miles"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_size(text)
