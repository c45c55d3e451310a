"""Mixture-of-Experts modules over the ops: router, experts, and the layer of both."""

from mergeme_ext.moe.experts import Experts, per_expert_state_dict
from mergeme_ext.moe.layer import MoELayer
from mergeme_ext.moe.parallel import ParallelExperts, full_state_dict
from mergeme_ext.moe.router import TopKRouter

__all__ = [
    "Experts",
    "MoELayer",
    "ParallelExperts",
    "TopKRouter",
    "full_state_dict",
    "per_expert_state_dict",
]
