"""The GPU of this machine, before anything is built: there or not, its architecture, its clocks.

    python -m benchmarks.gpu_machine                  # what is there; refuses without a GPU or nvcc
    python -m benchmarks.gpu_machine --architectures  # as TORCH_CUDA_ARCH_LIST, such as 9.0a

Standard library only, so that it runs before the virtual environment is made.
"""

import argparse
import os
import shutil
import subprocess
import sys

__all__ = ["MissingGpuError", "architectures", "clocks", "find_nvcc", "query"]

_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")


class MissingGpuError(RuntimeError):
    """No GPU here, or nothing to compile for it with."""


def query(*fields: str) -> list[str]:
    """Fields of the first GPU, as nvidia-smi prints them.

    Raises:
        MissingGpuError: There is no GPU, or no driver.
    """
    if (program := shutil.which("nvidia-smi")) is None:
        raise MissingGpuError("no GPU: nvidia-smi, which comes with the driver, is not on the PATH")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise MissingGpuError(f"no GPU: nvidia-smi says {(done.stdout + done.stderr).strip()!r}")
    return [value.strip() for value in lines[0].split(",")]


def find_nvcc() -> str:
    """nvcc, where setup.py looks for it.

    Raises:
        MissingGpuError: It is not there.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if not found:
        raise MissingGpuError(
            "no nvcc: install the CUDA toolkit (12.4 or newer; nvcc, headers, cudart) and put nvcc "
            "on the PATH or its folder in CUDA_HOME"
        )
    return found


def architectures(capability: str) -> str:
    """TORCH_CUDA_ARCH_LIST for one GPU: compute capability 9.0 has instructions of its own."""
    return "9.0a" if capability == "9.0" else f"{capability}+PTX"


def clocks() -> dict[str, str]:
    """Clocks in MHz, degrees and watts, now."""
    return dict(zip(_CLOCKS, query(*_CLOCKS), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", action="store_true", help="only those, for the build")
    args = parser.parse_args()
    try:
        name, capability, driver = query("name", "compute_cap", "driver_version")
        nvcc = find_nvcc()
    except MissingGpuError as error:
        print(f"gpu_machine: {error}. make test needs none.", file=sys.stderr)
        return 2
    if args.architectures:
        print(architectures(capability))
    else:
        print(f"{name}, compute capability {capability}, driver {driver}, {nvcc}")
        print(", ".join(f"{k} {v}" for k, v in clocks().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
