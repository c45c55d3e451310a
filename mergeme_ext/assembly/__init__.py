"""Dense checkpoints in, Mixture-of-Experts checkpoints out, as a stream."""

from mergeme_ext.assembly.recipe import ExpertSpec, MergeChoice, MoESpec, load_moe_spec
from mergeme_ext.assembly.upcycle import MoEPlan, build_moe, plan_moe

__all__ = [
    "ExpertSpec",
    "MergeChoice",
    "MoEPlan",
    "MoESpec",
    "build_moe",
    "load_moe_spec",
    "plan_moe",
]
