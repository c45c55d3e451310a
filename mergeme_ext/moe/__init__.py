"""Mixture-of-Experts modules over the ops: router, experts, the layer of both, and losses."""

from mergeme_ext.moe.experts import Experts, per_expert_state_dict
from mergeme_ext.moe.layer import MoELayer
from mergeme_ext.moe.losses import (
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_z_loss,
)
from mergeme_ext.moe.parallel import ParallelExperts, full_state_dict
from mergeme_ext.moe.router import TopKRouter

__all__ = [
    "Experts",
    "MoELayer",
    "ParallelExperts",
    "TopKRouter",
    "full_state_dict",
    "load_balancing_loss",
    "per_expert_state_dict",
    "pooled_load_balancing_loss",
    "router_z_loss",
]
