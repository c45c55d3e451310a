import hashlib
import subprocess
import zipfile

import pytest

from mergeme_ext.demo import packages
from mergeme_ext.demo.packages import Package, PackageError, fetch


def make_wheel(folder, content="x"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("some_data/file.txt"), content)
    return path


@pytest.fixture
def package(tmp_path):
    digest = hashlib.sha256(make_wheel(tmp_path / "origin").read_bytes()).hexdigest()
    return Package("some-data", "1.0", digest, megabytes=1)


def pip_that(monkeypatch, act):
    calls = []

    def run(command, **options):
        calls.append(command)
        return act(command)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_downloads_once(tmp_path, monkeypatch, package):
    def download(command):
        make_wheel(tmp_path / "cache")
        return subprocess.CompletedProcess(command, 0, "", "")

    calls = pip_that(monkeypatch, download)
    for _ in range(2):
        assert fetch(package, tmp_path / "cache").name == "some_data-1.0-py3-none-any.whl"
    assert len(calls) == 1 and calls[0][-1] == "some-data==1.0" and "--no-deps" in calls[0]
    with packages.open_wheel(package, tmp_path / "cache") as wheel:
        assert wheel.read("some_data/file.txt") == b"x"


def test_another_content_is_refused_and_removed(tmp_path, package):
    path = make_wheel(tmp_path / "cache", "y")
    with pytest.raises(PackageError, match=r"expected SHA-256 .*, got .*; the file was removed"):
        fetch(package, tmp_path / "cache")
    assert not path.exists()


def test_pip_says_why(tmp_path, monkeypatch, package):
    stderr = "WARNING: retrying\nERROR: No matching distribution found for some-data==1.0\n"
    pip_that(monkeypatch, lambda c: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(PackageError, match=r"some-data==1\.0 failed: ERROR: No matching distrib"):
        fetch(package, tmp_path / "cache")


def test_pip_that_hangs(tmp_path, monkeypatch, package):
    def hang(command):
        raise subprocess.TimeoutExpired(command, 1)

    pip_that(monkeypatch, hang)
    with pytest.raises(PackageError, match="took longer than"):
        fetch(package, tmp_path / "cache")
