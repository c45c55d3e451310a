"""Merging checkpoints by named methods, as a stream."""

from mergeme_ext.merging.engine import Allowances, MergePlan, merge, plan_merge
from mergeme_ext.merging.execution import Execution
from mergeme_ext.merging.layout import Layout, lay_out
from mergeme_ext.merging.recipe import load_merge_spec, load_merge_specs
from mergeme_ext.merging.registry import get, names
from mergeme_ext.merging.spec import MergeSpec, ModelRef

__all__ = [
    "Allowances",
    "Execution",
    "Layout",
    "MergePlan",
    "MergeSpec",
    "ModelRef",
    "get",
    "lay_out",
    "load_merge_spec",
    "load_merge_specs",
    "merge",
    "names",
    "plan_merge",
]
