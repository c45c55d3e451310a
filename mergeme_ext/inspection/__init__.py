"""Figures to look at before a merge: how models differ from their base and from each other."""

from mergeme_ext.inspection.figures import Figures
from mergeme_ext.inspection.inspect import Inspection, StandOut, TensorFigures, inspect_models
from mergeme_ext.inspection.spectra import Spectrum

__all__ = [
    "Figures",
    "Inspection",
    "Spectrum",
    "StandOut",
    "TensorFigures",
    "inspect_models",
]
