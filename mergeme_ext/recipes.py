"""Strict YAML recipes: every error names the file, the line, and what was probably meant."""

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["RecipeError", "Section", "as_number", "load_recipe", "load_recipes", "nearest"]

_REQUIRED: Any = object()
_MERGE_KEY = "tag:yaml.org,2002:merge"


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message begins with ``file:line:``."""


def load_recipe(path: str | Path) -> "Section":
    """Return the mapping at the top of the YAML file at ``path``.

    Raises:
        RecipeError: The file is missing, is not YAML, or holds no mapping, or several documents.
    """
    first, *more = load_recipes(path)
    if more:
        raise more[0].error("expected one document, got another; they are parted by ---")
    return first


def load_recipes(path: str | Path) -> "list[Section]":
    """Return the mapping of each document of the YAML file at ``path``.

    Raises:
        RecipeError: The file is missing, is not YAML, or a document holds no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: expected a YAML file in UTF-8, got other bytes") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    nodes = [node for node in nodes if node is not None and not _is_nothing(node)]
    if not nodes:
        raise RecipeError(f"{path}:1: the recipe is empty")
    return [Section(path, node, "") for node in nodes]


def _is_nothing(node: yaml.Node) -> bool:
    """Whether it is what stands between ``---`` and the next one, or the end: nothing."""
    return isinstance(node, yaml.ScalarNode) and node.value == ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the nearest of ``known``, or else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if known else ""


class Section:
    """One mapping of a recipe. Reading a value checks its type; errors carry the line.

    Attributes:
        file: The recipe's path.
        where: Place in the recipe, such as ``models[1].parameters``; empty at the top.
        line: Line on which it begins, from 1.
    """

    def __init__(self, file: Path, node: yaml.Node, where: str):
        self.file, self.where, self.line = file, where, node.start_mark.line + 1
        self._nodes: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self.error(f"expected {where or 'the recipe'} to be a mapping, got {_kind(node)}")
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error_at(key, f"expected a word as key{self._in()}, got {_kind(key)}")
            if key.tag == _MERGE_KEY:
                merged = self._merged(value) | merged
                continue
            if key.value in self._nodes:
                raise self._error_at(key, f"key {key.value!r} appears twice{self._in()}")
            self._nodes[key.value] = (key, value)
        self._nodes = merged | self._nodes

    def _merged(self, node: yaml.Node) -> "dict[str, tuple[yaml.Node, yaml.Node]]":
        """Return what ``<<: *name`` brings in; of several mappings the first goes first."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for part in parts:
            out = Section(self.file, part, f"{self.where}.<<".lstrip("."))._nodes | out
        return out

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    @property
    def keys(self) -> list[str]:
        """The keys present, in order."""
        return list(self._nodes)

    def _in(self) -> str:
        return f" in {self.where}" if self.where else ""

    def _error_at(self, node: yaml.Node | None, message: str) -> RecipeError:
        line = self.line if node is None else node.start_mark.line + 1
        return RecipeError(f"{self.file}:{line}: {message}")

    def error(self, message: str, key: str | None = None) -> RecipeError:
        """Return (raise it yourself) an error at ``key``'s line, or at the section's."""
        return self._error_at(self._nodes[key][0] if key in self._nodes else None, message)

    def path_of(self, key: str) -> str:
        """Return ``key`` with its place, such as ``models[1].parameters.density``."""
        return f"{self.where}.{key}" if self.where else key

    def allow_only(
        self,
        known: Iterable[str],
        *,
        tolerated: Iterable[str] = (),
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse keys not in ``known``.

        Args:
            known: Keys with a meaning; the nearest of them is proposed for an unknown one.
            tolerated: Keys that may be there but are not proposed.
            refused: From further keys to the reason to give for refusing them.

        Raises:
            RecipeError: With the line of the first such key and the nearest known one.
        """
        known, tolerated = list(known), set(tolerated)
        for key in self._nodes:
            if key in known or key in tolerated:
                continue
            if refused and key in refused:
                raise self.error(f"key {key!r}{self._in()}: {refused[key]}", key)
            raise self.error(f"unknown key {key!r}{self._in()}{nearest(key, known)}", key)

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value of ``key`` as plain Python: text, numbers, lists, dicts, None."""
        if key not in self._nodes:
            if default is _REQUIRED:
                raise self.error(f"key {key!r} is missing{self._in()}")
            return default
        try:
            loader = yaml.SafeLoader("")
            return loader.construct_document(self._nodes[key][1])
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problem = getattr(error, "problem", None) or error
            raise self.error(f"{self.path_of(key)}: {problem}", key) from None

    def expect(self, key: str, requirement: str, got: Any) -> RecipeError:
        """Return (raise it yourself) the error "expected KEY to be REQUIREMENT, got GOT"."""
        shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
        return self.error(f"expected {self.path_of(key)} to be {requirement}, got {shown}", key)

    def error_inside(
        self, key: str, place: Sequence[int | str], before: str, after: str
    ) -> RecipeError:
        """Return (raise it yourself) an error at a part of ``key``'s value.

        Args:
            key: Of this section.
            place: The way from the value to the part: positions in lists, keys of mappings.
            before: What to say before the part's name.
            after: What to say after it.
        """
        node, name = self._nodes[key][1], self.path_of(key)
        line = self._nodes[key][0]  # text values may begin on a later line than their key
        for step in place:
            name += f"[{step}]" if isinstance(step, int) else f".{step}"
            if isinstance(step, int):
                node = node.value[step]
            else:
                node = next(value for word, value in node.value if word.value == step)
            line = node
        return self._error_at(line, f"{before} {name}{after}")

    def holds_mapping(self, key: str) -> bool:
        """Whether the value of ``key`` is a mapping."""
        return key in self._nodes and isinstance(self._nodes[key][1], yaml.MappingNode)

    def text(
        self, key: str, default: Any = _REQUIRED, *, choices: Sequence[str] | None = None
    ) -> Any:
        """Return a text; one of ``choices``, if given."""
        value = self.value(key, default)
        if key not in self._nodes:
            return value
        if choices is not None and value not in choices:
            if isinstance(value, str):
                hint = nearest(value, choices)
                raise self.error(f"unknown {self.path_of(key)} {value!r}{hint}", key)
            raise self.expect(key, f"one of {', '.join(choices)}", value)
        if not isinstance(value, str) or not value:
            raise self.expect(key, "text", value)
        return value

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        open_low: bool = False,
    ) -> Any:
        """Return a finite float in [low, high], or (low, high] if ``open_low``."""
        value = self.value(key, default)
        if key not in self._nodes:
            return value
        number = as_number(value)
        inside = number is not None and low <= number <= high and not (open_low and number == low)
        if not inside:
            raise self.expect(key, _range("a number", low, high, open_low), value)
        return number

    def integer(
        self, key: str, default: Any = _REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> Any:
        """Return a whole number in [low, high]."""
        value = self.value(key, default)
        if key not in self._nodes:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.expect(key, _range("a whole number", low, high, False), value)
        return value

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return true or false."""
        value = self.value(key, default)
        if key in self._nodes and not isinstance(value, bool):
            raise self.expect(key, "true or false", value)
        return value

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a list of texts."""
        value = self.value(key, default)
        if key in self._nodes and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise self.expect(key, "a list of texts", value)
        return value

    def section(self, key: str) -> "Section | None":
        """Return the mapping under ``key``; None if there is none."""
        if key not in self._nodes:
            return None
        return Section(self.file, self._nodes[key][1], self.path_of(key))

    def sections(self, key: str) -> "list[Section]":
        """Return the list of mappings under ``key``.

        Raises:
            RecipeError: It is missing, empty, or something else.
        """
        if key not in self._nodes:
            raise self.error(f"key {key!r} is missing{self._in()}")
        node = self._nodes[key][1]
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.error(
                f"expected {self.path_of(key)} to be a list of mappings, got {_kind(node)}", key
            )
        return [
            Section(self.file, item, f"{self.path_of(key)}[{i}]")
            for i, item in enumerate(node.value)
        ]

    def find_folder(self, written: str) -> Path | None:
        """Return the folder called ``written``; None if there is none.

        A relative path is looked up from the recipe's folder, then from the current one.
        """
        path = Path(written).expanduser()
        return next((p for p in (self.file.parent / path, path) if os.path.isdir(p)), None)

    def folder(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return an existing folder's path; see ``find_folder``.

        Raises:
            RecipeError: There is no such folder.
        """
        value = self.text(key, default)
        if key not in self._nodes:
            return value
        if (found := self.find_folder(value)) is not None:
            return found
        raise self.error(
            f"{self.path_of(key)}: found no folder {value!r}, neither from the recipe's folder nor "
            "from here; models are local folders, download one from the hub first",
            key,
        )


def as_number(value: Any) -> float | None:
    """Return ``value`` as a finite float; None if it is not one.

    YAML 1.1 reads ``1e-3`` as text, so text is tried too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _range(kind: str, low: float, high: float, open_low: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return "a finite number" if kind == "a number" else kind
    if math.isinf(high):
        return f"{kind} {'above' if open_low else 'of at least'} {low:g}"
    if math.isinf(low):
        return f"{kind} of at most {high:g}"
    return f"{kind} in {'(' if open_low else '['}{low:g}, {high:g}]"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return repr(node.value) if node.value else "nothing"
