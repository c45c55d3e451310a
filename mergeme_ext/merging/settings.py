"""Values of parameters as recipes write them: one, a list over the layers, or one per filter."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergeme_ext.recipes import as_number, nearest

__all__ = ["Condition", "Scalar", "Setting", "SettingError", "first_value"]

Scalar = float | int | bool | str
# Takes a scalar; raises ValueError with a text that continues "expected NAME to be".
Check = Callable[[Scalar], Any]

# Positions that mean a step are computed as quotients, so they may fall short of it by a rounding.
_SHORT_OF_A_STEP = 1e-9


class SettingError(ValueError):
    """A value that cannot be a setting.

    Attributes:
        place: Way to the part that is wrong: positions in lists, keys of mappings.
        before: Message before the part's name.
        after: Message after it.
    """

    def __init__(self, place: tuple[int | str, ...], before: str, after: str):
        super().__init__(f"{before} the value{after}")
        self.place, self.before, self.after = place, before, after


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names hold ``filter``, a plain text; None means all."""

    filter: str | None
    value: "Setting"

    def matches(self, name: str) -> bool:
        """Whether it is about the tensor called ``name``."""
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True)
class Setting:
    """A parameter's value as a recipe writes it.

    Attributes:
        anchors: One value; or several, spread evenly over the layers of a slice from the first to
            the last. Between numbers lies a straight line; other values hold until the next.
        conditions: Instead of anchors: the first that matches a tensor's name gives its value.
    """

    anchors: tuple[Scalar, ...] = ()
    conditions: tuple[Condition, ...] = ()

    def at(self, name: str, t: float) -> Scalar | None:
        """Return the value for the tensor called ``name`` at position ``t`` of its slice.

        Args:
            name: The tensor's name.
            t: In [0, 1]: 0 is the slice's first layer, 1 its last.

        Returns:
            The value; None if no condition matches.
        """
        if self.conditions:
            found = next((c for c in self.conditions if c.matches(name)), None)
            return None if found is None else found.value.at(name, t)
        last = len(self.anchors) - 1
        place = min(max(t, 0.0), 1.0) * last
        if not self.is_gradient:
            return self.anchors[min(math.floor(place + _SHORT_OF_A_STEP), last)]
        left = math.floor(place)
        part = place - left
        if part == 0:
            return self.anchors[left]
        return (1 - part) * self.anchors[left] + part * self.anchors[left + 1]

    @property
    def is_gradient(self) -> bool:
        """Whether it is several numbers with straight lines between them."""
        return len(self.anchors) > 1 and all(_is_number(anchor) for anchor in self.anchors)

    def document(self) -> Any:
        """Return it as plain data, as a recipe would have it."""
        if self.conditions:
            return [
                ({} if c.filter is None else {"filter": c.filter}) | {"value": c.value.document()}
                for c in self.conditions
            ]
        return self.anchors[0] if len(self.anchors) == 1 else list(self.anchors)

    @classmethod
    def of(cls, value: Any, check: Check = lambda scalar: None) -> "Setting":
        """Return the setting that plain data describe.

        Args:
            value: A scalar, a list of scalars, a mapping with ``filter`` and ``value``, or a list
                of such mappings. Numbers may be texts: YAML 1.1 takes ``1e-3`` for one.
            check: Every scalar must pass it, and every number between two of a gradient.

        Raises:
            SettingError: ``value`` is something else, or a scalar of it fails.
        """
        if isinstance(value, Mapping):
            return cls(conditions=(_condition(value, check, ()),))
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            return cls(conditions=tuple(_conditions(value, check)))
        return _anchors(value, check, ())


def _conditions(items: Iterable[Any], check: Check) -> Iterable[Condition]:
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise _expected((i,), "a mapping with filter and value, as its neighbours are", item)
        yield _condition(item, check, (i,))


def _condition(item: Mapping[Any, Any], check: Check, place: tuple[int | str, ...]) -> Condition:
    known = ("filter", "value")
    for key in item:
        if key not in known:
            hint = nearest(str(key), known)
            raise SettingError(place, f"unknown key {key!r} in", hint)
    if "value" not in item:
        raise SettingError(place, "key 'value' is missing in", "")
    text = item.get("filter")
    if text is not None and (not isinstance(text, str) or not text):
        raise _expected((*place, "filter"), "a part of tensors' names", text)
    return Condition(text, _anchors(item["value"], check, (*place, "value")))


def _anchors(value: Any, check: Check, place: tuple[int | str, ...]) -> Setting:
    if not isinstance(value, list | tuple):
        return Setting((_scalar(value, check, place),))
    if not value:
        raise _expected(place, "a value or a list of values", value)
    anchors = tuple(_scalar(item, check, (*place, i)) for i, item in enumerate(value))
    setting = Setting(anchors)
    if setting.is_gradient:
        for i, (left, right) in enumerate(itertools.pairwise(anchors)):
            if left != right:
                _check(left + 0.5 * (right - left), check, (*place, i), ", which lies between")
    return setting


def _scalar(value: Any, check: Check, place: tuple[int | str, ...]) -> Scalar:
    if not isinstance(value, Scalar):
        raise _expected(place, "a number, a text, or true or false", value)
    if isinstance(value, str) and (number := as_number(value)) is not None:
        value = number
    _check(value, check, place)
    return value


def _check(value: Scalar, check: Check, place: tuple[int | str, ...], remark: str = "") -> None:
    try:
        check(value)
    except ValueError as error:
        raise _expected(place, str(error), value, remark) from None


def _expected(
    place: tuple[int | str, ...], requirement: str, got: Any, remark: str = ""
) -> SettingError:
    shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
    return SettingError(place, "expected", f" to be {requirement}, got {shown}{remark}")


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def first_value(
    levels: Iterable[Mapping[str, Setting]], key: str, name: str, t: float
) -> Scalar | None:
    """Return the first value that ``levels`` have for ``key``, the most specific level first.

    Args:
        levels: Settings by key in recipes. One whose conditions all fail to match is passed over.
        key: The parameter's.
        name: The tensor's name.
        t: Its position in its slice, in [0, 1].
    """
    for level in levels:
        if key in level and (value := level[key].at(name, t)) is not None:
            return value
    return None
