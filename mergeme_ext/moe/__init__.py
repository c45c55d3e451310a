"""Mixture-of-Experts modules over the ops: router, experts, the layer of both, and losses."""

from mergeme_ext.moe.experts import Experts, per_expert_state_dict
from mergeme_ext.moe.float8 import Float8Experts
from mergeme_ext.moe.layer import MoELayer
from mergeme_ext.moe.losses import (
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_z_loss,
)
from mergeme_ext.moe.parallel import ParallelExperts, full_state_dict, parallel_parameter_names
from mergeme_ext.moe.router import Routing, TopKRouter

__all__ = [
    "Experts",
    "Float8Experts",
    "MoELayer",
    "ParallelExperts",
    "Routing",
    "TopKRouter",
    "full_state_dict",
    "load_balancing_loss",
    "parallel_parameter_names",
    "per_expert_state_dict",
    "pooled_load_balancing_loss",
    "router_z_loss",
]
