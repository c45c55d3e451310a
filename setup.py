"""Drives CMake through ninja. Source lists and compiler flags are in CMakeLists.txt.

Switches, read from the environment:
    MERGEME_CUDA          auto (default): on when nvcc is found and torch is a CUDA build; 0 or 1
    MERGEME_SIMT          1 builds the test module that runs the CUDA sources on the host
    MERGEME_PTX           auto (default): with MERGEME_SIMT=1, in place, also the kernels' PTX
                          if nvcc is found; 0 or 1
    TORCH_CUDA_ARCH_LIST  torch's form, such as "8.0;9.0+PTX"; default 8.0+PTX;8.6;8.9;9.0a
    MERGEME_CMAKE_ARGS    further arguments for cmake
    MAX_JOBS, DEBUG       as for torch's own extensions
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
INSTALL = "pip install --no-build-isolation ."
DEFAULT_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a"


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SystemExit(
            f"mergeme_ext: building needs {module}, which this Python does not have. Run\n"
            f"    pip install torch pybind11 ninja cmake numpy && {INSTALL}"
        )


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder; asks nvcc, since the one on the path may be a wrapper script."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    asked = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"_HERE_=(\S+)", asked.stderr + asked.stdout)
    return Path(found[1]).parent if found else Path(nvcc).resolve().parent.parent


def cmake_architectures(torch_list: str) -> str:
    """Translate torch's architecture list, "8.0;9.0+PTX", to CMake's, "80-real;90"."""
    out = []
    for item in re.split(r"[;, ]+", torch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(
                f"mergeme_ext: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got {torch_list!r}"
            )
        major, minor, suffix, ptx = match.groups()
        out.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(out)


def cuda_arguments(torch_cuda: str | None) -> list[str]:
    switch = os.environ.get("MERGEME_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"mergeme_ext: expected MERGEME_CUDA to be auto, 0 or 1, got {switch!r}")
    toolkit = None if switch == "0" else find_toolkit()
    if switch == "1" and toolkit is None:
        raise SystemExit(
            "mergeme_ext: MERGEME_CUDA=1 needs nvcc: set CUDA_HOME to the toolkit's folder"
        )
    if toolkit is None or (switch == "auto" and torch_cuda is None):
        return ["-DMERGEME_CUDA=OFF"]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return [
        "-DMERGEME_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={toolkit / 'bin' / 'nvcc'}",
        f"-DCUDAToolkit_ROOT={toolkit}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(wanted)}",
    ]


def ptx_arguments(inplace: bool) -> list[str]:
    switch = os.environ.get("MERGEME_PTX", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"mergeme_ext: expected MERGEME_PTX to be auto, 0 or 1, got {switch!r}")
    toolkit = None if switch == "0" else find_toolkit()
    if switch == "1" and toolkit is None:
        raise SystemExit(
            "mergeme_ext: MERGEME_PTX=1 needs nvcc: set CUDA_HOME to the toolkit's folder"
        )
    # For tests in the source tree; never part of a package.
    if toolkit is None or not inplace or os.environ.get("MERGEME_SIMT") != "1":
        return ["-DMERGEME_PTX=OFF"]
    return ["-DMERGEME_PTX=ON", f"-DMERGEME_NVCC={toolkit / 'bin' / 'nvcc'}"]


class CMakeBuild(build_ext):
    def run(self):
        for module in ("torch", "pybind11", "ninja", "cmake"):
            need(module)
        import pybind11
        import torch

        torch_root = Path(torch.__file__).parent
        includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        build = Path(self.build_temp).resolve()
        if self.inplace and ROOT not in build.parents:
            # An editable install builds in a temporary folder; here it goes on where the last
            # build in the tree stopped.
            build = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        target = ROOT / "mergeme_ext" if self.inplace else Path(self.build_lib) / "mergeme_ext"
        arguments = [
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_INCLUDE_DIRS={';'.join(map(str, includes))}",
            f"-DTORCH_LIBRARY_DIR={torch_root / 'lib'}",
            f"-DMERGEME_TORCH_VERSION={torch.__version__}",
            f"-DMERGEME_SIMT={'ON' if os.environ.get('MERGEME_SIMT') == '1' else 'OFF'}",
            *cuda_arguments(torch.version.cuda),
            *ptx_arguments(self.inplace),
            *os.environ.get("MERGEME_CMAKE_ARGS", "").split(),
        ]
        environment = dict(os.environ)
        if ccache := shutil.which("ccache"):
            arguments += [f"-DCMAKE_{x}_COMPILER_LAUNCHER={ccache}" for x in ("CXX", "CUDA")]
            environment.setdefault(
                "CCACHE_SLOPPINESS", "pch_defines,time_macros,include_file_mtime"
            )
        cmake = [sys.executable, "-m", "cmake"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            [*cmake, "-S", str(ROOT), "-B", str(build), *arguments],
            [*cmake, "--build", str(build), "--parallel", jobs],
            [*cmake, "--install", str(build), "--prefix", str(target.resolve())],
        ):
            subprocess.run(command, check=True, env=environment)


setup(ext_modules=[Extension("mergeme_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
