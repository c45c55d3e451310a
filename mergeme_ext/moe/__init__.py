"""Mixture-of-Experts modules over the ops: router, experts, and the layer of both."""

from mergeme_ext.moe.experts import Experts
from mergeme_ext.moe.layer import MoELayer
from mergeme_ext.moe.router import TopKRouter

__all__ = ["Experts", "MoELayer", "TopKRouter"]
