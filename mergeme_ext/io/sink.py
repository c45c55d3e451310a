"""Writes checkpoints at known offsets; the folder appears under its name only when complete."""

import bisect
import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import stat
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.io.format import (
    DTYPES,
    CheckpointError,
    TensorInfo,
    dtype_name,
    encode_header,
    format_size,
    parse_size,
)
from mergeme_ext.io.journal import Chunk, Journal, read_journal
from mergeme_ext.io.source import INDEX, SINGLE

__all__ = ["CheckpointSink"]

# Beyond the tensors: config, tokenizer, index, file system overhead.
_SPARE_BYTES = 32 * 2**20
# The only subfolder that a checkpoint has; one with others is never overwritten.
TEMPLATES = "additional_chat_templates"
_JOURNAL = "mergeme_journal-{}.jsonl"
_READ_BYTES = 4 * 2**20  # read back at a time when checking
# So much may wait in memory before it is sent to the disk, while the writing goes on.
_FLUSH_BYTES = 64 * 2**20
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def _as_info(tensor: Any) -> TensorInfo:
    name, dtype, shape = (
        tensor if isinstance(tensor, tuple) else (tensor.name, tensor.dtype, tensor.shape)
    )
    if dtype not in DTYPES.values():
        raise CheckpointError(f"tensor {name!r}: safetensors has no dtype {dtype_name(dtype)}")
    return TensorInfo(name, dtype, tuple(shape))


def _plan_shards(tensors: list[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    for shard in shards:  # wide elements first: without holes, that aligns every tensor
        shard.sort(key=lambda t: -t.dtype.itemsize)
    return shards


class _Coverage:
    """Which elements of one tensor have been written, as sorted, disjoint, joined intervals."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Record ``[start, end)``; False if a part of it was there already."""
        i = bisect.bisect_right(self.starts, start)
        if (i > 0 and self.ends[i - 1] > start) or (i < len(self.starts) and self.starts[i] < end):
            return False
        joins_left = i > 0 and self.ends[i - 1] == start
        joins_right = i < len(self.starts) and self.starts[i] == end
        if joins_left and joins_right:
            self.ends[i - 1] = self.ends.pop(i)
            self.starts.pop(i)
        elif joins_left:
            self.ends[i - 1] = end
        elif joins_right:
            self.starts[i] = start
        else:
            self.starts.insert(i, start)
            self.ends.insert(i, end)
        return True

    def complete(self, numel: int) -> bool:
        return numel == 0 or (self.starts == [0] and self.ends == [numel])

    def gaps(self, numel: int) -> list[tuple[int, int]]:
        edges = [0]
        for start, end in zip(self.starts, self.ends, strict=True):
            edges += [start, end]
        edges.append(numel)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in pairs if start < end]


class _TerminationAsExit:
    """Turns SIGTERM and SIGHUP into SystemExit meanwhile, so that cleaning up gets its turn."""

    def __enter__(self) -> None:
        self.restore: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is signal.SIG_DFL:
                self.restore[number] = signal.signal(number, self._exit)

    @staticmethod
    def _exit(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.restore.items():
            signal.signal(number, handler)


class _Flusher:
    """Sends what is written to the disk while more is being made, so that little is left to do.

    Args:
        descriptors: Of the files; they stay open until ``close``.
    """

    def __init__(self, descriptors: list[int]):
        self._descriptors = list(descriptors)
        self._lock, self._wanted = threading.Lock(), threading.Event()
        self._waiting, self._ended = 0, False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def wrote(self, nbytes: int) -> None:
        with self._lock:
            self._waiting += nbytes
            if self._waiting >= _FLUSH_BYTES:
                self._waiting = 0
                self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self._ended:
                return
            self._wanted.clear()
            try:
                for descriptor in self._descriptors:
                    os.fsync(descriptor)
            except OSError as error:  # said once only, so a later call would not say it again
                self._error = error
                return

    def close(self) -> None:
        """Stop.

        Raises:
            OSError: Something could not be written.
        """
        self._ended = True
        self._wanted.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


class CheckpointSink:
    """Writes one checkpoint folder, all or nothing. Use it as a context manager.

    Entering it makes a hidden folder beside the target, reserves the disk space of every tensor
    and writes all headers. Leaving it without an exception checks that every element was written,
    reads everything back and compares checksums, makes the data durable and renames the folder to
    its name. Any exception, Ctrl-C or SIGTERM removes everything that was made, unless the
    checkpoint can be continued.

    A checkpoint with a ``fingerprint`` can be continued: what an interrupted process wrote stays
    in the hidden folder, with a journal of the chunks that are in place, and a later sink with the
    same fingerprint goes on from there. Only errors in the data (``ValueError``) remove it.

    Several processes, on machines that share the folder, may write one checkpoint: rank 0 enters
    first and leaves last, and each of the others is given its rank. Who waits for whom is up to
    the caller.

    Args:
        path: Target folder. Missing parents are made.
        tensors: What will be written: objects with ``name``, ``dtype`` and ``shape``, or such
            triples. Shards are filled in this order.
        max_shard_size: Bytes of tensor data in a file at most, as a number or as ``5GB``; a larger
            tensor gets a file of its own.
        metadata: Further text for the headers; ``format: pt`` is always there.
        overwrite: Replace an existing checkpoint folder, at publication and not before; drop what
            an interrupted process left, unless ``resume``.
        fingerprint: Says what the contents follow from; equal fingerprints mean equal bytes.
        resume: Go on with what an interrupted process left, if there is something.
        rank: Of this process; all but 0 only add chunks.
        threads: How many read back at the end.

    Raises:
        CheckpointError: Two tensors share a name, or a dtype has no name in the format; on
            entering with ``resume``: what is there has another fingerprint.
        FileExistsError: The target exists and may not be replaced, or an interrupted checkpoint is
            there and nothing was said about it.
        OSError: On entering: the disk has no room, or another process writes the same checkpoint.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Iterable[Any],
        *,
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        fingerprint: str | None = None,
        resume: bool = False,
        rank: int = 0,
        threads: int = 1,
    ):
        self.path = Path(path)
        self._target = Path(os.path.realpath(self.path))
        self._overwrite, self._resume = overwrite, resume
        self._fingerprint, self._rank, self._threads = fingerprint, rank, threads
        self._metadata = {**(metadata or {}), "format": "pt"}
        self._tensors: dict[str, TensorInfo] = {}
        for info in map(_as_info, tensors):
            if info.name in self._tensors:
                raise CheckpointError(f"tensor {info.name!r} is planned twice")
            self._tensors[info.name] = info
        self._shards = _plan_shards(list(self._tensors.values()), parse_size(max_shard_size))
        count = len(self._shards)
        self._files = (
            [SINGLE]
            if count == 1
            else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self._coverage = {name: _Coverage() for name in self._tensors}
        self._chunks: list[Chunk] = []
        self.notes: dict[str, Any] = {}  # by tensor; an interrupted merge keeps them
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._place: dict[str, tuple[int, int]] = {}  # name -> descriptor, byte offset in its file
        self._folder: Path | None = None
        self._journal: Journal | None = None
        self._flusher: _Flusher | None = None
        self._made_parents: list[Path] = []
        self._resumed = False
        self._termination = _TerminationAsExit()
        if rank == 0:
            self._check_target()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self._tensors.values())

    @property
    def done_bytes(self) -> int:
        """Bytes that are in place, by this process or by an interrupted one before it."""
        sizes = {name: t.dtype.itemsize for name, t in self._tensors.items()}
        with self._lock:
            return sum((end - start) * sizes[name] for name, start, end, _ in self._chunks)

    @property
    def folder(self) -> Path:
        """The hidden folder, while the sink is open."""
        if self._folder is None:
            raise ValueError("the sink is not open: use it in a with statement")
        return self._folder

    def gaps(self, name: str) -> list[tuple[int, int]]:
        """Return the stretches of tensor ``name`` that are still to be written, in order."""
        with self._lock:
            return self._coverage[name].gaps(self._planned(name).numel)

    def _check_target(self) -> None:
        target = self._target
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise FileExistsError(errno.EEXIST, "exists and is no folder", str(self.path))
        children = list(target.iterdir())
        if not children:
            return
        if not self._overwrite:
            raise FileExistsError(
                errno.EEXIST,
                "exists and is not empty; overwriting must be asked for",
                str(self.path),
            )
        names = {child.name for child in children}
        foreign = [c for c in children if c.is_dir() and c.name != TEMPLATES]
        if not names & {SINGLE, INDEX, "config.json"} or foreign:
            raise FileExistsError(
                errno.EEXIST,
                "does not look like a checkpoint that a merge wrote; remove it yourself",
                str(self.path),
            )

    def __enter__(self) -> "CheckpointSink":
        self._termination.__enter__()
        try:
            if self._rank:
                self._join()
            elif not self._continue():
                self._begin()
            self._flusher = _Flusher(self._descriptors)
        except BaseException:
            self._leave(keep=self._rank > 0 or self._resumed)
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        wrong_data = kind is not None and issubclass(kind, ValueError)
        keep = self._rank > 0 or (self._fingerprint is not None and not wrong_data)
        try:
            if kind is None and self._rank == 0:
                self._publish()
        except ValueError:
            keep = False
            raise
        finally:
            self._leave(keep=keep and bool(self._chunks or self._rank))

    def _leave(self, *, keep: bool) -> None:
        """Close everything; remove the hidden folder, if it is still there, unless ``keep``."""
        with contextlib.suppress(OSError):
            self._stop_flusher()
        with contextlib.suppress(OSError):
            self._close_files(durable=False)
        if self._folder is not None and not keep:
            shutil.rmtree(self._folder, ignore_errors=True)
            for folder in reversed(self._made_parents):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._folder, self._made_parents = None, []
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._termination.__exit__()

    def _stop_flusher(self) -> None:
        if self._flusher is not None:
            flusher, self._flusher = self._flusher, None
            flusher.close()

    @property
    def _partial(self) -> Path:
        suffix = "" if self._fingerprint is not None else "-" + secrets.token_hex(4)
        return self._target.with_name(f".{self._target.name}.partial{suffix}")

    def _begin(self) -> None:
        self._make_folder()
        if self._fingerprint is not None:
            self._journal = self._open_journal(self._folder)
        self._check_space()
        for file, shard in zip(self._files, self._shards, strict=True):
            self._reserve(file, shard)
        if self._journal is not None:
            self._journal.begin(self._fingerprint)

    def _continue(self) -> bool:
        """Take up what an interrupted process left; False if there is nothing to take up."""
        folder = self._partial
        if self._fingerprint is None or not folder.is_dir():
            return False
        fingerprint, chunks, notes = read_journal(folder / _JOURNAL.format(0))
        journal = self._open_journal(folder)  # refuses if the other process is alive
        if fingerprint is None or not chunks or (self._overwrite and not self._resume):
            journal.close()
            shutil.rmtree(folder)
            return False
        if not self._resume:
            journal.close()
            raise FileExistsError(
                errno.EEXIST,
                "an interrupted merge into it can be continued; resume it, or overwrite it to "
                "start over",
                str(self.path),
            )
        if fingerprint != self._fingerprint:
            journal.close()
            raise CheckpointError(
                f"{self.path}: cannot resume: the recipe, an input or an option has changed since "
                "the merge was interrupted; overwrite it to start over"
            )
        self._folder, self._journal, self._resumed = folder, journal, True
        self._open_files()
        for path in folder.glob(_JOURNAL.format("*")):
            if path.name != _JOURNAL.format(0):
                _, more_chunks, more_notes = read_journal(path)
                chunks, notes = chunks + more_chunks, {**notes, **more_notes}
        self._take_over(chunks, check=True)
        self.notes.update(notes)
        keep = {*self._files, _JOURNAL.format(0)}
        for path in folder.iterdir():  # what is not a weight is written anew
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.begin(self._fingerprint, self._chunks, self.notes)
        return True

    def _join(self) -> None:
        folder = self._partial
        fingerprint, chunks, _ = read_journal(folder / _JOURNAL.format(0))
        if self._fingerprint is None or fingerprint != self._fingerprint:
            raise CheckpointError(f"{self.path}: rank 0 prepared another merge than this process")
        self._folder = folder
        self._journal = self._open_journal(folder)
        self._journal.begin(self._fingerprint)
        self._open_files()
        self._take_over(chunks, check=False)

    def _open_journal(self, folder: Path) -> Journal:
        try:
            return Journal(folder / _JOURNAL.format(self._rank))
        except BlockingIOError:
            raise OSError(
                errno.EBUSY, "another process is writing this checkpoint", str(self.path)
            ) from None

    def _take_over(self, chunks: Iterable[Chunk], *, check: bool) -> None:
        """Count ``chunks`` as written; with ``check``, only those whose bytes are still right."""
        chunks = [c for c in chunks if c[0] in self._tensors]
        chunks = [c for c in chunks if 0 <= c[1] < c[2] <= self._tensors[c[0]].numel]
        right = self._all_right(chunks) if check else [True] * len(chunks)
        for chunk, whole in zip(chunks, right, strict=True):
            if whole and self._coverage[chunk[0]].add(chunk[1], chunk[2]):
                self._chunks.append(chunk)

    def collect(self) -> None:
        """Rank 0: count what the other ranks have written; call it when they are done."""
        for path in sorted(self._folder.glob(_JOURNAL.format("*"))):
            if path.name != _JOURNAL.format(0):
                _, chunks, notes = read_journal(path)
                self._take_over(chunks, check=False)
                self.notes.update(notes)

    def _make_folder(self) -> None:
        parent = self._target.parent
        missing = []
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            folder.mkdir()
            self._made_parents.append(folder)
        self._folder = self._partial
        self._folder.mkdir()

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._folder).free
        needed = self.total_bytes + _SPARE_BYTES
        if needed > free:
            self._no_room(f"needs {format_size(needed)}, only {format_size(free)} are free")

    def _no_room(self, reason: str) -> None:
        raise OSError(errno.ENOSPC, f"no room for the checkpoint: {reason}", str(self.path))

    def _reserve(self, file: str, shard: list[TensorInfo]) -> None:
        header = encode_header(shard, self._metadata)
        size = len(header) + sum(t.nbytes for t in shard)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self._folder / file, flags, 0o666)
        self._descriptors.append(descriptor)
        try:
            _allocate(descriptor, size)
            _write_all(descriptor, header, 0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._no_room(f"could not reserve {format_size(size)} ({error.strerror})")
            raise
        self._set_places(descriptor, len(header), shard)

    def _open_files(self) -> None:
        for file, shard in zip(self._files, self._shards, strict=True):
            header = encode_header(shard, self._metadata)
            flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(self._folder / file, flags)
            self._descriptors.append(descriptor)
            size = len(header) + sum(t.nbytes for t in shard)
            if os.fstat(descriptor).st_size != size or os.pread(descriptor, len(header), 0) != (
                header
            ):
                raise CheckpointError(f"{self._folder / file}: not what an earlier run wrote")
            self._set_places(descriptor, len(header), shard)

    def _set_places(self, descriptor: int, position: int, shard: list[TensorInfo]) -> None:
        for tensor in shard:
            self._place[tensor.name] = (descriptor, position)
            position += tensor.nbytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the whole of tensor ``name``.

        Raises:
            ValueError: Its shape or dtype is not the planned one, or a part was written before.
        """
        info = self._planned(name)
        if tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"tensor {name!r}: expected shape {list(info.shape)}, got {list(tensor.shape)}"
            )
        self.write_at(name, 0, tensor.reshape(-1))

    def write_at(self, name: str, start: int, chunk: Tensor) -> None:
        """Write elements ``start`` to ``start + len(chunk)`` of tensor ``name``.

        Threads may write different chunks at once.

        Args:
            name: A planned tensor.
            start: Flat, row-major index of the first element.
            chunk: ``[n]``, of the planned dtype, on any device.

        Raises:
            ValueError: The dtype or range is not the planned one, or a part was written before.
        """
        info = self._planned(name)
        if chunk.dtype != info.dtype:
            raise ValueError(
                f"tensor {name!r}: expected {dtype_name(info.dtype)}, got {dtype_name(chunk.dtype)}"
            )
        if chunk.dim() != 1:
            raise ValueError(f"tensor {name!r}: expected a flat chunk, got {list(chunk.shape)}")
        end = start + chunk.numel()
        if not 0 <= start <= end <= info.numel:
            raise ValueError(
                f"tensor {name!r}: expected a part of [0, {info.numel}), got [{start}, {end})"
            )
        if chunk.numel() == 0:
            return
        with self._lock:
            if not self._coverage[name].add(start, end):
                raise ValueError(f"tensor {name!r}: a part of [{start}, {end}) was written before")
        descriptor, offset = self._place[name]
        raw = chunk.detach().cpu().contiguous().view(torch.uint8).numpy()
        _write_all(descriptor, raw, offset + start * info.dtype.itemsize)
        written = (name, start, end, zlib.crc32(raw))
        with self._lock:
            self._chunks.append(written)
        if self._flusher is not None:
            self._flusher.wrote(raw.nbytes)
        if self._journal is not None:
            self._journal.add(written)

    def note(self, name: str, note: Any) -> None:
        """Keep ``note``, which JSON can hold, on tensor ``name`` in ``notes``.

        Like chunks, notes outlive an interruption and reach rank 0 from the other ranks.
        """
        with self._lock:
            self.notes[name] = note
        if self._journal is not None:
            self._journal.add_note(name, note)

    def _planned(self, name: str) -> TensorInfo:
        if self._folder is None:
            raise ValueError("the sink is not open: use it in a with statement")
        if name not in self._tensors:
            raise ValueError(f"tensor {name!r} was not planned")
        return self._tensors[name]

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, UTF-8, into the folder.

        Raises:
            ValueError: ``name`` leaves the folder.
            FileExistsError: The file was written before.
        """
        with self._new_path(name).open("x", encoding="utf-8") as file:
            file.write(text)

    def copy_file(self, source: str | Path, name: str | None = None) -> None:
        """Copy ``source`` (its target, if it is a symbolic link) into the folder.

        Raises:
            ValueError: ``name`` leaves the folder, or ``source`` is no regular file.
            FileExistsError: The file was written before.
        """
        source = Path(source)
        if not stat.S_ISREG(source.stat().st_mode):
            raise ValueError(f"{source}: expected a regular file")
        path = self._new_path(name or source.name)
        with source.open("rb") as reader, path.open("xb") as writer:
            shutil.copyfileobj(reader, writer)

    def _new_path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if self._folder is None:
            raise ValueError("the sink is not open: use it in a with statement")
        if not parts or any(p in ("/", "..") or "\\" in p or "\0" in p for p in parts):
            raise ValueError(f"expected a file name inside the folder, got {name!r}")
        path = self._folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _publish(self) -> None:
        for name, covered in self._coverage.items():
            numel = self._tensors[name].numel
            if not covered.complete(numel):
                first = covered.gaps(numel)[0][0]
                raise CheckpointError(
                    f"tensor {name!r}: element {first} of {numel} was never written"
                )
        if len(self._files) > 1:
            self.write_text(INDEX, _index_text(self._files, self._shards))
        self._read_back()
        self._stop_flusher()
        self._close_files(durable=True)
        for path in self._folder.glob(_JOURNAL.format("*")):
            path.unlink()
        for path in sorted(self._folder.rglob("*")):
            if path.name not in self._files:
                _sync(path)
        _sync(self._folder)
        self._check_target()
        with self._old_folder_aside():
            os.rename(self._folder, self._target)
            self._folder = None
        self._made_parents = []
        _sync(self._target.parent)

    def _read_back(self) -> None:
        """Check that the files hold what was written.

        Raises:
            OSError: They do not: the disk or its driver is at fault.
        """
        for file, shard, descriptor in zip(
            self._files, self._shards, self._descriptors, strict=True
        ):
            header = encode_header(shard, self._metadata)
            if os.pread(descriptor, len(header), 0) != header:
                raise OSError(errno.EIO, "the header reads back wrong", str(self._folder / file))
        for (name, start, end, _), right in zip(
            self._chunks, self._all_right(self._chunks), strict=True
        ):
            if not right:
                raise OSError(
                    errno.EIO,
                    f"tensor {name!r}: elements {start} to {end} read back other than written",
                    str(self.path),
                )

    def _all_right(self, chunks: list[Chunk]) -> Iterator[bool]:
        """Say for each of ``chunks`` whether the files hold bytes of its checksum."""

        def right(chunk: Chunk) -> bool:
            name, start, end, expected = chunk
            descriptor, offset = self._place[name]
            itemsize = self._tensors[name].dtype.itemsize
            position, stop, found = offset + start * itemsize, offset + end * itemsize, 0
            while position < stop:
                data = os.pread(descriptor, min(_READ_BYTES, stop - position), position)
                if not data:
                    return False
                found, position = zlib.crc32(data, found), position + len(data)
            return found == expected

        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(right, chunks)

    @contextlib.contextmanager
    def _old_folder_aside(self):
        """Move a folder to be replaced out of the way; back again if the body fails."""
        if not (self._target.is_dir() and any(self._target.iterdir())):
            yield
            return
        aside = self._target.with_name(f".{self._target.name}.replaced-{secrets.token_hex(4)}")
        os.rename(self._target, aside)
        try:
            yield
        except BaseException:
            if not self._target.exists():
                os.rename(aside, self._target)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _close_files(self, *, durable: bool) -> None:
        while self._descriptors:
            descriptor = self._descriptors.pop()
            try:
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Give the file its final size, with its blocks reserved where the system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view[: 2**30], offset)
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index_text(files: list[str], shards: list[list[TensorInfo]]) -> str:
    tensors = [t for shard in shards for t in shard]
    index = {
        "metadata": {
            "total_size": sum(t.nbytes for t in tensors),
            "total_parameters": sum(t.numel for t in tensors),
        },
        "weight_map": {
            t.name: file for file, shard in zip(files, shards, strict=True) for t in shard
        },
    }
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"
