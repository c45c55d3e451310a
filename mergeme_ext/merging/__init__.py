"""Merging checkpoints by named methods, as a stream."""

from mergeme_ext.merging.engine import MergePlan, merge, merge_chunks, merge_tensor, plan_merge
from mergeme_ext.merging.registry import get, names
from mergeme_ext.merging.spec import MergeSpec, load_merge_spec

__all__ = [
    "MergePlan",
    "MergeSpec",
    "get",
    "load_merge_spec",
    "merge",
    "merge_chunks",
    "merge_tensor",
    "names",
    "plan_merge",
]
