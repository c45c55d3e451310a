import pytest
import torch
import yaml

from mergeme_ext.merging import MergeSpec, load_merge_spec
from mergeme_ext.recipes import RecipeError

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters:
      weight: 1e-1
      density: 0.25
parameters:
  density: 0.5
  lambda: 1/n
  normalize: false
dtype: float16
out_dtype: bfloat16
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()

    def read(text):
        (tmp_path / "r.yaml").write_text(text)
        return load_merge_spec("r.yaml")

    return read


def test_reads_a_recipe(load):
    spec = load(GOOD)
    assert spec.method == "ties" and spec.base.name == "base"
    assert [m.name for m in spec.models] == ["a", "b"]
    assert spec.parameters == {
        "weights": [0.5, 0.1],
        "density": [0.5, 0.25],
        "normalize": False,
        "lam": "1/n",
    }
    assert spec.dtype == torch.bfloat16


def test_its_document_is_a_recipe_again(load):
    spec = load(GOOD)
    again = load(yaml.safe_dump(spec.document()))
    assert again.document() == spec.document()
    assert (again.parameters, again.dtype) == (spec.parameters, spec.dtype)


def test_document_of_shared_values(tmp_path):
    spec = MergeSpec("linear", [tmp_path / "x" / "a", tmp_path / "y" / "b"], None, {"weights": 1})
    assert spec.document() == {
        "merge_method": "linear",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1},
    }


def test_linear_averages_a_listed_base(load):
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: base}, {model: a}]\n"
    spec = load(text + "parameters: {weight: 1, int8_mask: true}\n")
    assert [m.name for m in spec.models] == ["base", "a"]
    assert spec.base.name == "base" and spec.parameters == {"weights": [1, 1]}


ERRORS = [
    (
        "weight: 0.5}",
        "densty: 0.5, weight: 1}",
        r"r.yaml:6: unknown key 'densty' in models\[1\].parameters; did you mean 'density'\?",
    ),
    (
        "  density: 0.5",
        "  densty: 0.5",
        r"r.yaml:12: unknown key 'densty' in parameters; did you mean 'density'\?",
    ),
    ("dtype: float16", "dytpe: float16", r"r.yaml:15: unknown key 'dytpe'; did you mean 'dtype'\?"),
    (
        "  - model: a",
        "  - modle: a",
        r"r.yaml:5: unknown key 'modle' in models\[1\]; did you mean 'model'\?",
    ),
    ("ties", "tise", r"r.yaml:1: unknown merge_method 'tise'; did you mean 'ties'\?"),
    ("merge_method: ties\n", "", "r.yaml:1: key 'merge_method' is missing"),
    ("base_model: base\n", "", "r.yaml:1: ties needs a base_model"),
    (
        "density: 0.25",
        "density: 1.7",
        r"r.yaml:10: expected models\[2\].parameters.density to be a fraction in \(0, 1\], got 1.7",
    ),
    ("density: 0.25", "density: 0", r"to be a fraction in \(0, 1\], got 0"),
    ("density: 0.25", "density: -0.3", r"to be a fraction in \(0, 1\], got -0.3"),
    (
        "density: 0.25",
        "density: [0.1, 0.5]",
        r"r.yaml:10: models\[2\].parameters.density: lists .* are not supported yet",
    ),
    (
        "weight: 0.5",
        "weight: .nan",
        r"r.yaml:6: expected models\[1\].parameters.weight to be a finite number, got nan",
    ),
    ("weight: 0.5", "density: 0.5", r"r.yaml:6: ties needs parameter 'weight' of each model"),
    (
        "weight: 0.5",
        "weight: 1, lambda: 1",
        r"r.yaml:6: key 'lambda' in models\[1\].parameters: is one for the whole merge",
    ),
    (
        "  lambda: 1/n",
        "  lambda: n",
        r"r.yaml:13: expected parameters.lambda to be a finite number or 1/n .*, got 'n'",
    ),
    (
        "  normalize: false",
        "  normalize: 0",
        r"r.yaml:14: expected parameters.normalize to be true or false, got 0",
    ),
    ("model: b\n", "model: a\n", r"r.yaml:7: models\[2\].model is models\[1\].model again"),
    ("model: b\n", "model: c\n", r"r.yaml:7: models\[2\].model: found no folder 'c'"),
    (
        "  - model: base\n",
        "  - model: base\n    parameters: {weight: 1}\n",
        "the base takes no parameters",
    ),
    (
        "out_dtype: bfloat16",
        "out_dtype: int8",
        "r.yaml:16: unknown out_dtype 'int8'; known are bfl",
    ),
    ("dtype: float16", "slices: []", "r.yaml:15: key 'slices': layer ranges are not supported yet"),
    (
        "dtype: float16",
        "tokenizer_source: union",
        "key 'tokenizer_source': merging vocabularies is not",
    ),
    (
        GOOD[GOOD.index("  - model: a") : GOOD.index("parameters:\n  density")],
        "",
        "r.yaml:3: ties needs a model besides the base",
    ),
]


@pytest.mark.parametrize("old, new, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(load, old, new, message):
    assert GOOD.count(old) >= 1
    with pytest.raises(RecipeError, match=message):
        load(GOOD.replace(old, new, 1))


def test_parameter_of_another_method(load):
    with pytest.raises(RecipeError, match="unknown key 'density' in parameters; known are normali"):
        load("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, density: 1}\n")
    with pytest.raises(RecipeError, match=r"r.yaml:1: linear needs parameter 'weight' of each"):
        load("merge_method: linear\nmodels: [{model: a}]\n")
