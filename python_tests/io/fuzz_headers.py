"""Damaged and hostile files, one at a time: each must open, or be refused with CheckpointError.

``python -m python_tests.io.fuzz_headers --examples 100000`` runs that many of every kind, in memory
if the system has /dev/shm, and prints what became of them.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from mergeme_ext.io import AdaptedSource, CheckpointError, CheckpointSource
from mergeme_ext.io.format import DTYPES
from mergeme_ext.io.operands import num_rows

SECONDS_EACH = 20
NAMES = [
    "w",
    "model.norm.weight",
    "a.weight",
    "a.weight_scale",
    "a.weight_scale_inv",
    "a.weight_zero_point",
    "a.input_scale",
    "a.scale",
    "a.qweight",
    "x_blocks",
    "x_scales",
    "gate_up_proj",
    "gate_up_proj_scale_inv",
    "__metadata__",
    "",
    "ä\u2028",
]
FILES = ["a.safetensors", "b.safetensors", "1-of-3.safetensors", "c.bin", "model.safetensors"]
OUTSIDE = [
    "../outside.safetensors",
    "/etc/passwd",
    "..",
    "sub/a.safetensors",
    "a.safetensors/",
    "a",
]
ODD = [
    *(-1, 0, 1, 2, 3, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, -0.0, 1e300),
    *(float("inf"), float("nan"), True, False, None, "", "F32", "F8_E4M3", "U8", "\ud800", "\0"),
    *("fp8", "compressed-tensors", "128x128", "3x", "(", "a" * 300 + ".safetensors"),
    *([], {}, [[]], {"": None}, [0, 2**62, 2**62], [1] * 100, [0, 0], [0, 2**63], [128, 128]),
]


def tensor_entry(rng, begin):
    dtype = rng.choice(list(DTYPES))
    shape = [rng.choice([0, 1, 2, 3, 4]) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
    end = begin + torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}, end


def header(rng, names=NAMES):
    entries, position = {}, 0
    for name in rng.sample(names, min(rng.choice([0, 1, 2, 3, 5]), len(names))):
        entries[name], position = tensor_entry(rng, position)
    if rng.random() < 0.3:
        entries["__metadata__"] = {"format": "pt"}
    return entries, position


def mutate(rng, value, odd):
    """Return ``value``, a JSON value, with one thing in it replaced, dropped, moved or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(odd)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    out = value.copy()
    action = rng.random()
    if action < 0.6:
        out[key] = mutate(rng, value[key], odd)
    elif action < 0.75:
        del out[key]
    elif isinstance(value, dict):
        out[rng.choice([*NAMES, *FILES])] = value[key]
    else:
        out.insert(key, rng.choice([value[key], rng.choice(odd)]))
    return out


def damage_text(rng, text):
    """Return bytes with a piece doubled, dropped, replaced or nested."""
    begin = rng.randrange(len(text) + 1)
    end = min(len(text), begin + rng.choice([1, 1, 2, 5, 40]))
    piece = rng.choice(
        [
            b"",
            text[begin:end] * 2,
            bytes([rng.randrange(256)]),
            b"[" * rng.choice([1, 200, 20_000]),
            b"9" * rng.choice([1, 30, 5000]),
            b"1e999",
            b"NaN",
            rng.choice([b'"', b"\\", b"{", b"}", b",", b":", b"\0", b"\xff", b"\\ud800"]),
        ]
    )
    return text[:begin] + piece + text[end:]


def damaged(rng, value, odd=ODD):
    """Return JSON text of ``value`` after a few mutations, or random bytes."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice([0, 1, 8, 64]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        value = mutate(rng, value, odd)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 0, 0, 0, 1, 2])):
        text = damage_text(rng, text)
    return text


def write_file(rng, path, text, size):
    """Write a safetensors file around a header; length and data may be off too."""
    length, data = len(text), size
    if rng.random() < 0.1:
        length = rng.choice([0, 1, 7, length + 1, length + 8, 2**31, 2**63, 2**64 - 1])
    if rng.random() < 0.1:
        data = max(0, data + rng.choice([-8, -1, 1, 8, 4096]))
    raw = struct.pack("<Q", length) + text + rng.randbytes(data)
    if rng.random() < 0.05:
        raw = raw[: rng.randrange(len(raw) + 1)]
    path.write_bytes(raw)


def write_header(rng, folder):
    entries, size = header(rng)
    write_file(rng, folder / "model.safetensors", damaged(rng, entries), size)


def write_random(rng, folder):
    (folder / "model.safetensors").write_bytes(rng.randbytes(rng.choice([0, 7, 8, 9, 40, 400])))


def write_index(rng, folder):
    weight_map = {}
    for file in rng.sample(FILES[:3], rng.choice([1, 2, 3])):
        entries, size = header(rng, [n for n in NAMES if n not in weight_map])
        text = json.dumps(entries).encode()
        if rng.random() < 0.1:
            text = damage_text(rng, text)
        raw = struct.pack("<Q", len(text)) + text + bytes(size)
        (folder / file).write_bytes(raw)
        weight_map |= {name: file for name in entries if name != "__metadata__"}
    index = {"metadata": {"total_size": 8}, "weight_map": weight_map}
    name = rng.choice(["model"] * 8 + ["pytorch_model", "other"])
    suffix = "bin" if name == "pytorch_model" else "safetensors"
    text = damaged(rng, index, [*ODD, *FILES, *OUTSIDE])
    (folder / f"{name}.{suffix}.index.json").write_bytes(text)


def write_config(rng, folder):
    shape = rng.choice([[4, 6], [5, 7], [2, 4, 6], [4], []])
    count = torch.Size(shape).numel()
    sizes = rng.choice([[], [1], [4], [4, 1], [2, 2], [3, 3], [2, 1, 1], [0]])
    end = count + 4 * torch.Size(sizes).numel()
    scale = rng.choice(["_scale", "_scale_inv"])
    entries = {
        "a.weight": {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, count]},
        f"a.weight{scale}": {"dtype": "F32", "shape": sizes, "data_offsets": [count, end]},
    }
    text = json.dumps(entries).encode()
    raw = struct.pack("<Q", len(text)) + text + rng.randbytes(end)
    (folder / "model.safetensors").write_bytes(raw)
    weights = {"strategy": "block", "block_structure": [2, 3], "group_size": 2}
    quantisation = {
        "quant_method": "fp8",
        "weight_block_size": [2, 3],
        "config_groups": {"group_0": {"weights": weights}},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "quant_algo": "FP8",
    }
    config = {
        "quantization_config": quantisation,
        "torch_dtype": "bfloat16",
        "text_config": {"quantization_config": quantisation},
        "compression_config": quantisation,
    }
    for key in rng.sample(list(quantisation), rng.randrange(6)):
        del quantisation[key]
    for key in rng.sample(list(config), rng.choice([1, 2, 3])):
        del config[key]
    (folder / "config.json").write_bytes(damaged(rng, config))


MODULE = "model.layers.0.q_proj"


def write_base(folder):
    tensors = {f"{MODULE}.weight": torch.ones(6, 4), f"{MODULE}.bias": torch.ones(6)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def write_adapter(rng, folder):
    shapes = {"lora_A.weight": [2, 4], "lora_B.weight": [6, 2], "lora_B.bias": [6]}
    entries, position = {}, 0
    for part in rng.sample(list(shapes), rng.choice([2, 3, 3])):
        end = position + 4 * torch.Size(shapes[part]).numel()
        entries[f"base_model.model.{MODULE}.{part}"] = {
            "dtype": "F32",
            "shape": shapes[part],
            "data_offsets": [position, end],
        }
        position = end
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 2},
        "use_rslora": True,
        "fan_in_fan_out": False,
        "target_parameters": None,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_bytes(damaged(rng, config))
    text = json.dumps(entries).encode() if rng.random() < 0.7 else damaged(rng, entries)
    write_file(rng, folder / "adapter_model.safetensors", text, position)


KINDS = {
    "header": write_header,
    "random": write_random,
    "index": write_index,
    "config": write_config,
    "adapter": write_adapter,
}


def touch(source, files):
    """Read a little of every tensor, and check that all of it lies within its file."""
    for info in getattr(source, "_on_disk", {}).values():
        size = (files / info.file).stat().st_size
        assert 0 <= info.start <= info.start + info.nbytes <= size, info
    assert json.dumps(source.config) and source.label
    for name in source.names:
        info, operand = source.info(name), source.operand(name)
        assert (operand.dtype, operand.shape) == (info.dtype, info.shape)
        count = num_rows(operand)
        for begin, end in ((0, min(count, 2)), (max(0, count - 1), count)):
            assert operand.rows(begin, end).shape[0] == end - begin
        assert source.bytes_to_read(name) >= 0 and source.default_dtype(name)
        name.encode()


def empty(folder):
    for entry in os.scandir(folder):
        os.unlink(entry.path)


def try_one(kind, rng, folder):
    """Write one example of ``kind`` into the empty ``folder``; return what became of it."""
    KINDS[kind](rng, folder)
    try:
        source = None
        if kind == "adapter":
            source = CheckpointSource(folder.parent / "base")
        source = CheckpointSource(folder) if source is None else AdaptedSource(source, folder)
    except CheckpointError as error:
        text = str(error).replace(str(folder), "").replace(str(folder.parent), "")
        text = re.sub(r"'[^']*'|\[[^]]*\]|\d+", "_", text.split("\n")[0])
        return "refused: " + re.sub(r"^[/\w.-]*:? ?", "", text)[:56]
    touch(source, folder.parent / "base" if kind == "adapter" else folder)
    return "opened"


@contextlib.contextmanager
def only_within(folder):
    """Fail if anything but files of ``folder`` is opened meanwhile."""
    opened = []
    _WATCHERS.append(opened)
    _hook()
    try:
        yield
    finally:
        _WATCHERS.remove(opened)
    roots = (str(folder), sys.prefix, sys.base_prefix)
    # Hypothesis reads the programs that are loaded, for constants to try, when it draws first.
    foreign = [p for p in opened if not (p.startswith(roots) or p.endswith(".py"))]
    foreign = [p for p in foreign if ".hypothesis" not in Path(p).parts]
    assert not foreign, foreign


_WATCHERS: list[list[str]] = []
_HOOKED: list[bool] = []


def _hook():
    """Watch the interpreter open files. A hook stays for good, so there is one for all."""
    if not _HOOKED:
        sys.addaudithook(
            lambda event, args: [
                watcher.append(os.fsdecode(args[0]))
                for watcher in (_WATCHERS if event == "open" else ())
                if isinstance(args[0], str | bytes | os.PathLike)
            ]
        )
        _HOOKED.append(True)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in the body after that time: a hang is a failure."""

    def stop(number, frame):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def playground(parent=None):
    """Make a folder for examples, beside files that none of them may reach."""
    top = Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))
    try:
        (top / "case").mkdir()
        (top / "base").mkdir()
        write_base(top / "base")
        safetensors.torch.save_file({"secret": torch.ones(1)}, top / "outside.safetensors")
        yield top / "case"
    finally:
        shutil.rmtree(top)


def resident():
    """Return the process's resident memory in bytes; 0 if the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def run(kind, examples, seed, folder):
    """Try ``examples`` files of ``kind``; return outcomes, seconds, and growth of memory."""
    outcomes = collections.Counter()
    start, settled, peak = time.perf_counter(), 0, 0
    for i in range(examples):
        rng = random.Random(f"{kind}-{seed}-{i}")
        try:
            with time_limit(SECONDS_EACH), only_within(folder.parent):
                outcomes[try_one(kind, rng, folder)] += 1
        except BaseException:
            print(f"kind {kind}, seed {seed}, example {i}", file=sys.stderr)
            raise
        empty(folder)
        if i == examples // 20:
            settled = peak = resident()
        elif i % 100 == 0:
            peak = max(peak, resident())
    return outcomes, time.perf_counter() - start, peak - settled


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=100_000, help="of each kind")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outcomes", type=int, default=12, help="reasons to list per kind")
    args = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with playground(memory) as folder:
        for kind in args.kinds:
            outcomes, seconds, growth = run(kind, args.examples, args.seed, folder)
            opened = outcomes.pop("opened", 0)
            print(
                f"{kind}: {args.examples} examples in {seconds:.0f} s: {opened} opened, "
                f"{outcomes.total()} refused for {len(outcomes)} reasons; "
                f"resident memory grew by {growth / 2**20:.1f} MiB"
            )
            for reason, count in outcomes.most_common(args.outcomes):
                print(f"  {count:7d} {reason}", flush=True)


if __name__ == "__main__":
    main()
