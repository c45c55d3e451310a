"""What merge methods can be told: each parameter's name in recipes, its values, how it is checked.

A method's keyword-only arguments are its parameters. Annotating one with a type from here gives it
its name in recipes and its check.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mergeme_ext.recipes import as_number

__all__ = [
    "ActiveAbove",
    "ArcPlace",
    "ClampT",
    "Clip",
    "Compat",
    "Density",
    "Elect",
    "FilterWise",
    "Gamma",
    "Inter",
    "Kind",
    "Lambda",
    "MaxIter",
    "NearDistance",
    "NonDiagonalRatio",
    "Normalize",
    "NormalizeWeights",
    "NuslerpFlatten",
    "NuslerpRowWise",
    "RankWindow",
    "Rescale",
    "RescaleStat",
    "Ridge",
    "Scales",
    "ScopeOption",
    "Seed",
    "SelectTopk",
    "SignTie",
    "SmallConstant",
    "SmallestNorm",
    "Task",
    "Tolerance",
    "TrimScope",
    "UniformBelow",
    "UniqueGain",
    "UniqueGainLimit",
    "Weights",
]

RESCALES = ("none", "inverse_prob", "l1", "l2", "linf")


@dataclass(frozen=True)
class Kind:
    """A parameter's meaning: its key in recipes, and the check every value passes.

    ``check`` takes a value and the number of models; it returns the value to use, or raises
    ValueError with a text that continues "expected NAME to be".
    """

    key: str
    check: Callable[[Any, int], Any]
    per_model: bool = False


def _finite(value: Any, num_models: int) -> float:
    number = as_number(value)
    if number is None:
        raise ValueError("a finite number")
    return number


def _density(value: Any, num_models: int) -> float:
    number = as_number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError("a fraction in (0, 1]")
    return number


def _lambda(value: Any, num_models: int) -> float:
    if value == "1/n":
        return 1 / num_models
    number = as_number(value)
    if number is None:
        raise ValueError("a finite number or 1/n (one over the number of models but the base)")
    return number


def _flag(value: Any, num_models: int) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _rescale(value: Any, num_models: int) -> str:
    if isinstance(value, bool):  # the common recipes' flag means matching the l1 norm
        return "l1" if value else "none"
    if value not in RESCALES:
        raise ValueError(f"one of {', '.join(RESCALES)} (true is l1, false is none)")
    return value


def _elect(value: Any, num_models: int) -> str:
    if value not in ("sum", "count"):
        raise ValueError("sum or count")
    return value


def _one_of(*names: str) -> Callable[[Any, int], str]:
    def check(value: Any, num_models: int) -> str:
        if value not in names:
            raise ValueError(f"{', '.join(names[:-1])} or {names[-1]}")
        return value

    return check


def _interval(low: float, high: float, requirement: str, *, open_high: bool = False):
    def check(value: Any, num_models: int) -> float:
        number = as_number(value)
        if number is None or not low <= number <= high or (open_high and number == high):
            raise ValueError(requirement)
        return number

    return check


def _task(value: Any, num_models: int) -> int | str:
    if value == "unified":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_models:
        raise ValueError(f"unified, or a model's place in [0, {num_models})")
    return value


def _seed(value: Any, num_models: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError("a whole number in [0, 2^64)")
    return value


def _positive(value: Any, num_models: int) -> float:
    number = as_number(value)
    if number is None or number <= 0:
        raise ValueError("a finite number above 0")
    return number


def _count(value: Any, num_models: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


Weights = Annotated[Sequence[float], Kind("weight", _finite, per_model=True)]
Density = Annotated[Sequence[float], Kind("density", _density, per_model=True)]
Lambda = Annotated[float, Kind("lambda", _lambda)]
Normalize = Annotated[bool, Kind("normalize", _flag)]
Rescale = Annotated[str, Kind("rescale", _rescale)]
Elect = Annotated[str, Kind("elect", _elect)]
Seed = Annotated[int, Kind("seed", _seed)]
TrimScope = Annotated[str, Kind("trim_scope", _one_of("auto", "tensor", "model"))]
SignTie = Annotated[str, Kind("sign_tie", _one_of("auto", "plus", "majority"))]
Compat = Annotated[str, Kind("compat", _one_of("mergekit", "paper"))]
SmallConstant = Annotated[float, Kind("f0", _interval(0, math.inf, "a number of at least 0"))]
NonDiagonalRatio = Annotated[
    float, Kind("non_diagonal_ratio", _interval(0, 1, "a number in [0, 1]"))
]
Ridge = Annotated[float, Kind("ridge", _interval(0, math.inf, "a number of at least 0"))]
Task = Annotated[int | str, Kind("task", _task)]
RescaleStat = Annotated[str, Kind("rescale_stat", _one_of("mean_of_means", "global_sum"))]
Inter = Annotated[str, Kind("inter", _one_of("sum", "sign_mm"))]
Clip = Annotated[float, Kind("clip", _interval(0, 0.5, "a fraction in [0, 0.5)", open_high=True))]
ScopeOption = Annotated[str, Kind("scope", _one_of("model", "tensor"))]

# What works with angles and norms.

ArcPlace = Annotated[float, Kind("t", _finite)]
ClampT = Annotated[bool, Kind("clamp_t", _flag)]
FilterWise = Annotated[bool, Kind("filter_wise", _flag)]
MaxIter = Annotated[int, Kind("max_iter", _count)]
NormalizeWeights = Annotated[bool, Kind("normalize_weights", _flag)]
NuslerpFlatten = Annotated[bool, Kind("nuslerp_flatten", _flag)]
NuslerpRowWise = Annotated[bool, Kind("nuslerp_row_wise", _flag)]
SmallestNorm = Annotated[float, Kind("eps", _positive)]
Tolerance = Annotated[float, Kind("tol", _positive)]

# What thins and masks task vectors, and what compares weights with a threshold.
_FRACTION = _interval(0, 1, "a fraction in [0, 1]")
_AT_LEAST_0 = _interval(0, math.inf, "a finite number of at least 0")
Gamma = Annotated[Sequence[float], Kind("gamma", _FRACTION, per_model=True)]
RankWindow = Annotated[Sequence[float], Kind("epsilon", _FRACTION, per_model=True)]
SelectTopk = Annotated[float, Kind("select_topk", _FRACTION)]
UniformBelow = Annotated[str, Kind("uniform_below", _one_of("absolute", "relative"))]
ActiveAbove = Annotated[float, Kind("epsilon", _AT_LEAST_0)]
UniqueGain = Annotated[float, Kind("r", _AT_LEAST_0)]
UniqueGainLimit = Annotated[float, Kind("alpha", _AT_LEAST_0)]
NearDistance = Annotated[float, Kind("t", _AT_LEAST_0)]
Scales = Annotated[Sequence[float], Kind("scale", _finite, per_model=True)]
