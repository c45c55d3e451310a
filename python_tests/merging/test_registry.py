import importlib
import pkgutil

import pytest
import torch

import mergeme_ext.merging.methods as methods
from mergeme_ext.merging import get, names, registry
from mergeme_ext.merging.parameters import Weights
from mergeme_ext.merging.registry import Scope, merge_method

MODULES = [module.name for module in pkgutil.iter_modules(methods.__path__)]


def test_every_module_registers_the_method_it_is_named_after():
    assert sorted(methods.__all__) == sorted(MODULES) == names()
    for name in MODULES:
        module = importlib.import_module(f"mergeme_ext.merging.methods.{name}")
        method = get(name)
        assert method.function is getattr(module, name)
        assert ("arXiv:" in method.paper or "no paper" in method.paper) and method.function.__doc__


def test_unknown_names():
    with pytest.raises(ValueError, match=r"among \['arcee_fusion', .*\], got 'tise'"):
        get("tise")
    with pytest.raises(TypeError, match=r"ties: expected parameters among .*, got \['densty'\]"):
        get("ties")(torch.zeros(1), [torch.zeros(1)], weights=1, densty=1)
    with pytest.raises(TypeError, match="ties: expected parameter weights, which has no default"):
        get("ties")(torch.zeros(1), [torch.zeros(1)])


BAD_VALUES = [
    ({"density": 1.7}, r"expected density\[0\] to be a fraction in \(0, 1\], got 1.7"),
    ({"density": [0.5, 0]}, r"expected density\[1\] to be a fraction in \(0, 1\], got 0"),
    ({"density": [0.5]}, "expected density to hold 2 values, one for each model, got 1"),
    ({"density": "x"}, r"expected density\[0\] to be a fraction in \(0, 1\], got 'x'"),
    ({"weights": [1, float("nan")]}, r"expected weights\[1\] to be a finite number, got nan"),
    ({"weights": True}, r"expected weights\[0\] to be a finite number, got True"),
    ({"lam": float("inf")}, "expected lam to be a finite number or 1/n .*, got inf"),
    ({"lam": "2/n"}, "expected lam to be a finite number or 1/n .*, got '2/n'"),
    ({"normalize": 1}, "expected normalize to be true or false, got 1"),
    ({"rescale": "l3"}, "expected rescale to be one of none, inverse_prob, .*, got 'l3'"),
    ({"elect": "both"}, "expected elect to be sum or count, got 'both'"),
    ({"seed": -1}, r"expected seed to be a whole number in \[0, 2\^64\), got -1"),
    ({"seed": 1.5}, "expected seed to be a whole number"),
]


@pytest.mark.parametrize("parameters, message", BAD_VALUES, ids=str)
def test_bad_values(parameters, message):
    with pytest.raises(ValueError, match=f"^dare_ties: {message}"):
        get("dare_ties").bind(2, {"weights": 1, **parameters})


def test_values_are_brought_into_form():
    bound = get("dare_ties").bind(4, {"weights": "1e-3", "lam": "1/n", "rescale": True})
    assert bound["weights"] == [0.001] * 4 and bound["lam"] == 0.25 and bound["rescale"] == "l1"
    assert bound["density"] == [1.0] * 4 and bound["seed"] == 0
    assert get("ties").bind(1, {"weights": 1, "rescale": False})["rescale"] == "none"


def test_registration_is_checked(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    with pytest.raises(ValueError, match="'ties' is registered twice"):
        merge_method("ties", paper="", scope=Scope.ELEMENT)(lambda base, tensors: None)

    def bare(base, tensors, *, weights: Weights, extra: float = 1.0):
        pass

    with pytest.raises(TypeError, match=r"bare: annotate extra with a type of parameters.py"):
        merge_method("bare", paper="", scope=Scope.ELEMENT)(bare)
