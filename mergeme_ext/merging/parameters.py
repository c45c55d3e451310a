"""What merge methods can be told: each parameter's name in recipes, its values, how it is checked.

A method's keyword-only arguments are its parameters. Annotating one with a type from here gives it
its name in recipes and its check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mergeme_ext.recipes import as_number

__all__ = [
    "ActiveAbove",
    "Density",
    "Elect",
    "Gamma",
    "Kind",
    "Lambda",
    "NearDistance",
    "Normalize",
    "RankWindow",
    "Rescale",
    "Scales",
    "Seed",
    "SelectTopk",
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


def _fraction(value: Any, num_models: int) -> float:
    number = as_number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError("a fraction in [0, 1]")
    return number


def _non_negative(value: Any, num_models: int) -> float:
    number = as_number(value)
    if number is None or number < 0:
        raise ValueError("a finite number of at least 0")
    return number


def _uniform_below(value: Any, num_models: int) -> str:
    if value not in ("absolute", "relative"):
        raise ValueError("absolute or relative")
    return value


def _seed(value: Any, num_models: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError("a whole number in [0, 2^64)")
    return value


Weights = Annotated[Sequence[float], Kind("weight", _finite, per_model=True)]
Density = Annotated[Sequence[float], Kind("density", _density, per_model=True)]
Lambda = Annotated[float, Kind("lambda", _lambda)]
Normalize = Annotated[bool, Kind("normalize", _flag)]
Rescale = Annotated[str, Kind("rescale", _rescale)]
Elect = Annotated[str, Kind("elect", _elect)]
Seed = Annotated[int, Kind("seed", _seed)]

# What thins and masks task vectors, and what compares weights with a threshold.
Gamma = Annotated[Sequence[float], Kind("gamma", _fraction, per_model=True)]
RankWindow = Annotated[Sequence[float], Kind("epsilon", _fraction, per_model=True)]
SelectTopk = Annotated[float, Kind("select_topk", _fraction)]
UniformBelow = Annotated[str, Kind("uniform_below", _uniform_below)]
ActiveAbove = Annotated[float, Kind("epsilon", _non_negative)]
UniqueGain = Annotated[float, Kind("r", _non_negative)]
UniqueGainLimit = Annotated[float, Kind("alpha", _non_negative)]
NearDistance = Annotated[float, Kind("t", _non_negative)]
Scales = Annotated[Sequence[float], Kind("scale", _finite, per_model=True)]
