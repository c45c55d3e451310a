"""Fused kernels, streaming merges and Mixture-of-Experts assembly for PyTorch."""

from mergeme_ext import (
    _load,  # noqa: F401  (loads the extension: registers torch.ops.mergeme)
    merging,
    moe,
)
from mergeme_ext._version import __version__
from mergeme_ext.ops import (
    apply_sparse_delta,
    apply_sparse_delta_,
    combine_rows,
    drop_by_rank,
    first_nonfinite,
    gram,
    grouped_experts,
    grouped_experts_fp8,
    grouped_matmul_fp8,
    grouped_matmul_nn,
    grouped_matmul_nt,
    grouped_matmul_tn,
    magnitude_threshold,
    masked_norms,
    merge_task_vectors,
    quantize_fp8,
    router_statistics,
    sort_by_expert,
    topk_gating,
    weighted_sum,
)

__all__ = [
    "__version__",
    "apply_sparse_delta",
    "apply_sparse_delta_",
    "combine_rows",
    "drop_by_rank",
    "first_nonfinite",
    "gram",
    "grouped_experts",
    "grouped_experts_fp8",
    "grouped_matmul_fp8",
    "grouped_matmul_nn",
    "grouped_matmul_nt",
    "grouped_matmul_tn",
    "magnitude_threshold",
    "masked_norms",
    "merge_task_vectors",
    "merging",
    "moe",
    "quantize_fp8",
    "router_statistics",
    "sort_by_expert",
    "topk_gating",
    "weighted_sum",
]
