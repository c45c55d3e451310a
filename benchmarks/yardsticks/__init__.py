"""Grouped kernels of others that ours are held to, compiled by the same nvcc on the same day.

Their headers come with packages that are looked up, not imported: ``nvidia-cutlass`` (CUTLASS) and
``kt-kernel`` or ``sgl-kernel`` (DeepGEMM, with the CUTLASS headers it needs); their licences are
BSD-3 and MIT. Nothing of them is part of this repository.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.device_code import Unit, package_folder

__all__ = ["CUTLASS", "DEEP_GEMM", "YARDSTICKS", "Yardstick", "find_headers", "units"]

CUTLASS = "CUTLASS"
DEEP_GEMM = "DeepGEMM"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Yardstick:
    """One kernel of another library."""

    library: str
    name: str
    source: str
    arches: tuple[str, ...]
    defines: tuple[str, ...] = ()
    standard: str = "c++17"


YARDSTICKS = (
    Yardstick(CUTLASS, "2.x grouped nt 128x128x32", "cutlass_sm80.cu", ("80", "90a")),
    # Asserts are calls, around which ptxas would serialise wgmma.
    Yardstick(CUTLASS, "3.x grouped nt 128x256x64", "cutlass_sm90.cu", ("90a",), ("NDEBUG",)),
    Yardstick(
        DEEP_GEMM, "bf16 m-grouped nt 128x256x64", "deep_gemm_bf16.cu", ("90a",), (), "c++20"
    ),
    Yardstick(
        DEEP_GEMM,
        "bf16 m-grouped nt 128x128x64",
        "deep_gemm_bf16.cu",
        ("90a",),
        ("TILE_N=128", "STAGES=6"),
        "c++20",
    ),
    Yardstick(DEEP_GEMM, "fp8 m-grouped nt 128x128x128", "deep_gemm_fp8.cu", ("90a",), (), "c++20"),
)


def find_headers() -> dict[str, Path]:
    """Folders of headers by library, of those that are installed."""
    places = {
        CUTLASS: [("cutlass_library", "source/include")],
        DEEP_GEMM: [("deep_gemm", "include"), ("sgl_kernel", "include")],
    }
    wanted = {CUTLASS: "cutlass/cutlass.h", DEEP_GEMM: "deep_gemm/impls/sm90_bf16_gemm.cuh"}
    found = {}
    for library, candidates in places.items():
        for package, inside in candidates:
            folder = package_folder(package, inside)
            if folder and (folder / wanted[library]).is_file():
                found.setdefault(library, folder)
    return found


def units(headers: dict[str, Path]) -> dict[Unit, Yardstick]:
    """What to compile for the yardsticks whose headers are at hand."""
    return {
        Unit(
            f"yardstick{number}",
            _HERE / y.source,
            y.arches,
            (
                f"-std={y.standard}",
                "--expt-relaxed-constexpr",
                f"-I{headers[y.library]}",
                *(f"-D{define}" for define in y.defines),
            ),
        ): y
        for number, y in enumerate(YARDSTICKS)
        if y.library in headers
    }
