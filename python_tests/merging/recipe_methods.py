"""Stand-ins for merge methods, so that tests of recipes need only what recipes are about."""

from collections.abc import Sequence
from typing import Annotated

from mergeme_ext.merging import registry
from mergeme_ext.merging.parameters import Kind, Normalize, Seed, Weights
from mergeme_ext.merging.registry import Scope, merge_method
from mergeme_ext.recipes import as_number


def finite(value, num_models):
    if as_number(value) is None:
        raise ValueError("a finite number")
    return as_number(value)


T = Annotated[float, Kind("t", finite)]
Scale = Annotated[Sequence[float], Kind("scale", finite, per_model=True)]


def install(monkeypatch):
    """Register the stand-ins for the time of a test."""
    methods = dict(registry._METHODS)
    for name in ("slerp", "passthrough", "spherical_mean", "fisher"):
        methods.pop(name, None)
    monkeypatch.setattr(registry, "_METHODS", methods)

    @merge_method("slerp", paper="", scope=Scope.TENSOR, num_models=(1, 1))
    def slerp(base, tensors, *, t: T):
        return lambda base, tensors, offset: tensors[0]

    @merge_method("passthrough", paper="", scope=Scope.ELEMENT, needs_base=False, num_models=(1, 1))
    def passthrough(base, tensors, *, scale: Scale = 1.0):
        return lambda base, tensors, offset: tensors[0]

    @merge_method("spherical_mean", paper="", scope=Scope.TENSOR, needs_base=False, takes_base=True)
    def spherical_mean(base, tensors, *, weights: Weights, normalize: Normalize = True):
        return lambda base, tensors, offset: tensors[0]

    @merge_method(
        "fisher", paper="", scope=Scope.ELEMENT, needs_base=False, statistics="fisher_info"
    )
    def fisher(base, tensors, *, weights: Weights = 1.0, seed: Seed = 0, statistics=None):
        return lambda base, tensors, offset: tensors[0]
