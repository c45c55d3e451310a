"""Loads the compiled extension, or says in one sentence how to mend the build."""

import torch

COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall ."

try:
    from mergeme_ext import _C
except ImportError as error:
    if "undefined symbol" in str(error) or "cannot open shared object" in str(error):
        raise ImportError(
            f"mergeme_ext was built against another torch than the one installed "
            f"({torch.__version__}); in its source folder, run: {COMMAND} ({error})"
        ) from error
    raise ImportError(
        f"mergeme_ext's compiled half is missing; in its source folder, run: {COMMAND} ({error})"
    ) from error


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


if _release(_C.build_info()["torch"]) != _release(torch.__version__):
    raise ImportError(
        f"mergeme_ext was built against torch {_C.build_info()['torch']} but torch "
        f"{torch.__version__} is installed; in its source folder, run: {COMMAND}"
    )
