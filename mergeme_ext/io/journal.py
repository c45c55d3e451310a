"""What an unfinished checkpoint already holds: one line per chunk, so that a merge can go on."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on this system: nobody is kept out
    fcntl = None

__all__ = ["Chunk", "Journal", "read_journal"]

# Tensor name, first element, end, CRC-32 of the bytes.
Chunk = tuple[str, int, int, int]

_VERSION = 1


class Journal:
    """An append-only file of chunks that are in place; locked while its writer lives.

    Args:
        path: The file; made if it is missing.

    Raises:
        BlockingIOError: Another process holds it.
    """

    def __init__(self, path: Path):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = os.open(path, flags, 0o666)
        try:
            _lock(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise

    def begin(
        self, fingerprint: str, chunks: Iterable[Chunk] = (), notes: Mapping[str, Any] | None = None
    ) -> None:
        """Start anew with what the checkpoint is made of, and with what is there already."""
        os.ftruncate(self._descriptor, 0)
        lines = [json.dumps({"version": _VERSION, "fingerprint": fingerprint})]
        lines += [json.dumps(chunk, ensure_ascii=False) for chunk in chunks]
        lines += [json.dumps({"note": note}, ensure_ascii=False) for note in (notes or {}).items()]
        self._append("\n".join(lines) + "\n")

    def add(self, chunk: Chunk) -> None:
        """Note that ``chunk`` is in place."""
        self._append(json.dumps(chunk, ensure_ascii=False) + "\n")

    def add_note(self, name: str, note: Any) -> None:
        """Keep ``note`` on tensor ``name``."""
        self._append(json.dumps({"note": [name, note]}, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        # One call per line: the file is opened for appending, so lines of threads do not mix.
        data = text.encode("utf-8", "surrogatepass")
        while data:
            data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems know no locks.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def read_journal(path: Path) -> tuple[str | None, list[Chunk], dict[str, Any]]:
    """Return fingerprint (None if there is none yet), chunks and notes of the journal at ``path``.

    A line that was cut off, as by a kill, ends what is read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    except FileNotFoundError:
        return None, [], {}
    fingerprint, chunks, notes = None, [], {}
    for number, line in enumerate(lines[:-1]):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if number == 0:
            if not isinstance(entry, dict) or entry.get("version") != _VERSION:
                break
            fingerprint = entry.get("fingerprint")
        elif isinstance(entry, list) and [type(x) for x in entry] == [str, int, int, int]:
            chunks.append(tuple(entry))
        elif isinstance(entry, dict) and isinstance(entry.get("note"), list):
            notes[entry["note"][0]] = entry["note"][1]
        else:
            break
    return fingerprint, chunks, notes
