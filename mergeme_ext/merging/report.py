"""The account of a merge: what became of every input tensor, and what the method noticed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergeme_ext._version import __version__
from mergeme_ext.io import AdaptedSource, dtype_name

if TYPE_CHECKING:
    from mergeme_ext.merging.engine import MergePlan

__all__ = ["REPORT_NAME", "merge_report"]

REPORT_NAME = "mergeme_report.json"


def merge_report(plan: "MergePlan", notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of ``plan``, free of local paths.

    ``inputs`` says for each model which tensors were merged or copied and which were dropped, with
    the reason; together they are all tensors of that model. ``adapter`` says which of them each
    tensor of its adapter went into. ``tensors`` says for each tensor of the result what it is made
    of, and ``notes`` what the method noticed.

    Raises:
        RuntimeError: A tensor of an input is missing from the account.
    """
    used: dict[Any, dict[str, list[str]]] = {ref: {} for ref in plan.sources}
    tensors = {}
    public = _public_names(plan)
    for planned, assignment in zip(plan.tensors, plan.layout.assignments, strict=True):
        action = "copied" if planned.parameters is None else "merged"
        made_of = list(zip(assignment.models, assignment.names, strict=True))
        if assignment.base is not None and plan.method.takes_base:
            made_of.insert(0, (plan.spec.base, assignment.base))
        for ref, name in made_of:
            used[ref].setdefault(name, []).append(planned.name)
        tensors[planned.name] = {
            "action": action,
            "from": [[public[ref], name] for ref, name in made_of],
            "dtype": dtype_name(planned.dtype),
            "shape": list(planned.shape),
        }
        if planned.name in notes:
            tensors[planned.name]["notes"] = notes[planned.name]
    inputs = {}
    for ref, source in plan.sources.items():
        dropped = dict(plan.dropped.get(ref, {}))
        lost = [n for n in source.names if n not in used[ref] and n not in dropped]
        if lost:
            raise RuntimeError(f"{plan.labels[ref]}: tensor {lost[0]!r} is in no account")
        inputs[public[ref]] = {
            "used": {name: targets for name, targets in used[ref].items()},
            "dropped": dropped,
        }
        if isinstance(source, AdaptedSource):
            inputs[public[ref]]["adapter"] = source.applied
    report = {
        "written_by": f"mergeme_ext {__version__}",
        "method": plan.method.name,
        "inputs": inputs,
        "tensors": tensors,
    }
    if plan.vocabulary is not None:
        report["vocabulary"] = list(plan.vocabulary.notes)
    return report


def _public_names(plan: "MergePlan") -> dict[Any, str]:
    """Return names without paths; equal ones are numbered."""
    names: dict[Any, str] = {}
    for ref in plan.sources:
        same = sum(other.name == ref.name for other in names)
        names[ref] = f"{ref.name} ({same + 1})" if same else ref.name
    return names
