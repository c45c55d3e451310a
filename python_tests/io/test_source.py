import json
import os
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.io import CheckpointError, CheckpointSource
from mergeme_ext.io.format import DTYPES, read_header
from mergeme_ext.io.mapped import MappedFile

# The library's torch half does not know float8_e8m0fnu; test_sink has it.
LIBRARY_DTYPES = [d for d in DTYPES.values() if d != torch.float8_e8m0fnu]


def random_tensor(dtype, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), generator=g, dtype=torch.int16).to(torch.uint8)
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(-1).view(torch.uint8).tolist()
        == b.contiguous().view(-1).view(torch.uint8).tolist()
    )


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES, ids=str)
def test_reads_what_safetensors_writes(tmp_path, dtype):
    tensors = {
        "a": random_tensor(dtype, (3, 5)),
        "scalar": random_tensor(dtype, ()),
        "none": random_tensor(dtype, (2, 0, 4)),
        "z": random_tensor(dtype, (7,), seed=1),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = MappedFile(tmp_path / "model.safetensors")
    assert {info.name for info in file.infos} == set(tensors)
    for info in file.infos:
        tensor = tensors[info.name]
        assert same_bits(file.tensor(info), tensor)
        assert (info.dtype, info.shape) == (dtype, tuple(tensor.shape))
        assert info.nbytes == tensor.numel() * dtype.itemsize
        assert info.file == "model.safetensors"


@pytest.mark.filterwarnings("error")
def test_tensors_are_views_of_the_map(tmp_path):
    weight = torch.arange(1000.0)
    safetensors.torch.save_file({"w": weight}, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    view = source.tensor("w")
    assert view.data_ptr() == source.tensor("w").data_ptr()
    source.prefetch("w")
    source.release("w")
    del source
    assert torch.equal(view, weight)  # the map outlives its source


def test_names_come_in_file_order(tmp_path):
    raw_file(
        tmp_path / "model.safetensors",
        {"first": entry(begin=8, end=16), "second": entry(begin=0, end=8)},
        bytes(16),
    )
    assert CheckpointSource(tmp_path).names == ["second", "first"]


def test_reads_data_at_an_odd_address(tmp_path):
    data = torch.tensor([1.5, -2.0])
    header = json.dumps({"w": entry()}).encode()
    header += b" " * ((3 - len(header)) % 8)
    raw_file(tmp_path / "model.safetensors", header, data.numpy().tobytes())
    source = CheckpointSource(tmp_path)
    assert source.info("w").start % 4 == 3
    assert torch.equal(source.tensor("w"), data)


def test_reads_shards_through_symbolic_links(tmp_path):
    blobs, model = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir(), model.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        safetensors.torch.save_file({f"t{i}": torch.full((3,), float(i))}, blobs / f"blob{i}")
        (model / name).symlink_to(blobs / f"blob{i}")
    (blobs / "index").write_text(json.dumps({"weight_map": dict(zip(("t0", "t1"), names))}))  # noqa: B905
    (model / "model.safetensors.index.json").symlink_to(blobs / "index")
    source = CheckpointSource(model)
    assert source.names == ["t0", "t1"]
    assert source.info("t1").file == names[1]
    assert source.tensor("t1").tolist() == [1.0] * 3


BAD_FILES = {
    "empty": (b"", "truncated: 0 bytes"),
    "header length beyond the file": (
        struct.pack("<Q", 1 << 40) + b"{}",
        "should take 1099511627776",
    ),
    "huge header length": (b"\xff" * 8 + b"{}", "should take 18446744073709551615"),
    "not JSON": (struct.pack("<Q", 4) + b"{]}!", "header: expected JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "header: expected JSON"),
    "nested without end": (struct.pack("<Q", 200_000) + b"[" * 200_000, "header: expected JSON"),
    "an array": (struct.pack("<Q", 2) + b"[]", "expected a JSON object, got list"),
    "not a number": (struct.pack("<Q", 9) + b'{"a":NaN}', "NaN is not JSON"),
}
GOOD = entry()
BAD_HEADERS = {
    "no fields": ({"w": {}}, 0, "expected the fields dtype, shape and data_offsets, got \\[\\]"),
    "entry is no object": ({"w": 3}, 0, "expected an object in the header, got 3"),
    "unknown dtype": ({"w": entry("F33")}, 8, "'w': unknown dtype 'F33'"),
    "dtype no text": ({"w": entry(["F32"])}, 8, "unknown dtype"),
    "negative size": ({"w": entry(shape=(-2,))}, 8, "expected shape as a list of sizes"),
    "fractional size": ({"w": entry(shape=(2.0,))}, 8, "expected shape as a list of sizes"),
    "true as size": ({"w": entry(shape=(True, 2))}, 8, "expected shape as a list of sizes"),
    "three offsets": ({"w": GOOD | {"data_offsets": [0, 8, 9]}}, 8, "expected data_offsets"),
    "offsets backwards": ({"w": entry(begin=8, end=0)}, 8, "takes 8 bytes, but .* hold -8"),
    "offsets too short": ({"w": entry(end=7)}, 8, r"shape \[2\] of F32 takes 8 bytes, .* hold 7"),
    "overflowing shape": ({"w": entry(shape=(2**62, 8))}, 8, "expected fewer or smaller dimens"),
    "overflowing shape of nothing": (
        {"w": entry(shape=(2**62, 0, 8), end=0)},
        0,
        "expected fewer or smaller dimensions",
    ),
    "huge size": ({"w": entry(shape=(2**63,))}, 8, "expected shape as a list of sizes"),
    "many dimensions": ({"w": entry(shape=(1,) * 65, end=4)}, 4, "expected fewer or smaller"),
    "half a character": ({"w\ud800": entry()}, 8, "expected a name that is text"),
    "overlap": (
        {"a": entry(), "b": entry(begin=4, end=12)},
        12,
        "tensor 'a' and tensor 'b' overlap",
    ),
    "hole at the start": (
        {"w": entry(begin=4, end=12)},
        12,
        "4 bytes between the header and tensor 'w'",
    ),
    "hole": (
        {"a": entry(), "b": entry(begin=9, end=17)},
        17,
        "1 bytes between tensor 'a' and tensor 'b'",
    ),
    "truncated data": ({"w": entry()}, 7, "truncated: the header describes 8 .* the file has 7"),
    "trailing data": ({"w": entry()}, 9, "1 bytes at the end belong to no tensor"),
    "metadata not text": ({"__metadata__": {"a": 1}}, 0, "expected __metadata__ to map text"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_file(tmp_path, case):
    data, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(tmp_path)


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_refuses_bad_header(tmp_path, case):
    header, size, message = BAD_HEADERS[case]
    raw_file(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(tmp_path)


def test_refuses_duplicate_keys(tmp_path):
    text = json.dumps({"w": entry()})
    raw_file(tmp_path / "model.safetensors", (text[:-1] + "," + text[1:]).encode(), bytes(8))
    with pytest.raises(CheckpointError, match="header: key 'w' appears twice"):
        CheckpointSource(tmp_path)


def sharded(folder, weight_map, **shards):
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE = {"t": torch.ones(1)}
BAD_INDEX = {
    "parent folder": ({"t": "../a.safetensors"}, "in the same folder, got '../a.safetensors'"),
    "absolute": ({"t": "/tmp/a.safetensors"}, "in the same folder, got '/tmp/a.safetensors'"),
    "subfolder": ({"t": "sub/a.safetensors"}, "in the same folder"),
    "backslash": ({"t": "..\\a.safetensors"}, "in the same folder"),
    "dots": ({"t": ".."}, "in the same folder, got '..'"),
    "not text": ({"t": 3}, "in the same folder, got 3"),
    "pickle": ({"t": "a.bin"}, "expected the name of a .safetensors file"),
    "missing file": ({"t": "b.safetensors"}, "names b.safetensors, which is not in the folder"),
    "tensor missing": ({"t": "a.safetensors", "u": "a.safetensors"}, "puts tensor 'u' in a.safe"),
    "empty map": ({}, "expected an object weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_refuses_bad_index(tmp_path, case):
    weight_map, message = BAD_INDEX[case]
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    for folder in (tmp_path, model / "sub"):
        safetensors.torch.save_file(ONE, folder / "a.safetensors")
    sharded(model, weight_map, a=ONE)
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(model)


def test_refuses_tensor_in_two_shards(tmp_path):
    sharded(
        tmp_path, {"t": "a.safetensors", "u": "b.safetensors"}, a=ONE, b=ONE | {"u": torch.ones(2)}
    )
    with pytest.raises(
        CheckpointError, match=r"'t' is in two shards, a.safetensors and b.safetens"
    ):
        CheckpointSource(tmp_path)


def test_refuses_tensor_the_index_omits(tmp_path):
    sharded(tmp_path, {"t": "a.safetensors"}, a=ONE | {"u": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"holds tensor 'u', which .* does not list"):
        CheckpointSource(tmp_path)


def test_refuses_index_that_is_no_json(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("weights")
    with pytest.raises(CheckpointError, match=r"index.json: expected JSON"):
        CheckpointSource(tmp_path)


def test_refuses_folder_without_model(tmp_path):
    (tmp_path / "model.fp16.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors, .* model.fp16.safe"):
        CheckpointSource(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: expected a model's folder, found none"):
        CheckpointSource(tmp_path / "nowhere")
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(CheckpointError, match=r"GGUF weights are quantised .* made from"):
        CheckpointSource(tmp_path)


def test_reads_an_index_and_shards_of_any_name(tmp_path):
    sharded(
        tmp_path,
        {"t": "weights, part A.safetensors", "u": "consolidated-1.safetensors"},
        **{"weights, part A": ONE, "consolidated-1": {"u": torch.zeros(2)}},
    )
    source = CheckpointSource(tmp_path)
    assert sorted(source.names) == ["t", "u"]
    index = tmp_path / "model.safetensors.index.json"
    text = json.loads(index.read_text()) | {"metadata": "lost", "author": {"x": [1]}}
    index.unlink()
    (tmp_path / "model.fp16.safetensors.index.json").write_text(json.dumps(text))
    assert CheckpointSource(tmp_path).names == source.names
    (tmp_path / "another.safetensors.index.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"it does hold another.safetensors.index.json, "):
        CheckpointSource(tmp_path)


def test_never_opens_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    sharded(tmp_path, {"t": "a.safetensors"})
    with pytest.raises(CheckpointError, match="not in the folder"):
        CheckpointSource(tmp_path)


def test_config(tmp_path):
    safetensors.torch.save_file(ONE, tmp_path / "model.safetensors")
    assert CheckpointSource(tmp_path).config == {}
    (tmp_path / "config.json").write_text('{"a": {"b": [1]}}')
    source = CheckpointSource(tmp_path)
    source.config["a"]["b"].append(2)
    assert source.config == {"a": {"b": [1]}}
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON"):
        CheckpointSource(tmp_path).config  # noqa: B018


def test_missing_tensor(tmp_path):
    safetensors.torch.save_file(ONE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor 'w'"):
        CheckpointSource(tmp_path).tensor("w")


@settings(max_examples=200)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Whatever bytes change: either CheckpointError, or tensors that lie inside the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, 2).half()}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path.write_bytes(raw)
    try:
        infos, _ = read_header(path)
    except CheckpointError:
        return
    assert sum(i.nbytes for i in infos) <= len(raw)
    for info in infos:
        assert 0 <= info.start <= info.start + info.nbytes <= len(raw)
