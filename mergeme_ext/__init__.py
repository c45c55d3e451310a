"""Fused kernels, streaming merges and Mixture-of-Experts assembly for PyTorch."""

from mergeme_ext import _load  # noqa: F401  (loads the extension: registers torch.ops.mergeme)
from mergeme_ext._version import __version__
from mergeme_ext.ops import apply_sparse_delta, apply_sparse_delta_, sort_by_expert, topk_gating

__all__ = [
    "__version__",
    "apply_sparse_delta",
    "apply_sparse_delta_",
    "sort_by_expert",
    "topk_gating",
]
