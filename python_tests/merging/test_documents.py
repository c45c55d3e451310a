"""Recipes with several documents, and one recipe of each kind that people share."""

import pytest
import yaml

from mergeme_ext.merging import ModelRef, load_merge_spec, load_merge_specs
from mergeme_ext.merging.spec import ModelToken
from mergeme_ext.recipes import RecipeError
from python_tests.merging import recipe_methods


@pytest.fixture
def load(tmp_path, monkeypatch):
    recipe_methods.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for owner_name in HUB:
        model = tmp_path / "cache" / f"models--{owner_name.replace('/', '--')}"
        (model / "snapshots" / "c0ffee").mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs/main").write_text("c0ffee")

    def read(text):
        (tmp_path / "r.yaml").write_text(text)
        return load_merge_specs("r.yaml")

    return read


HUB = ["meta/base-13b", "one/orca-13b", "two/platypus-13b", "three/math-13b"]

MULTI = """\
name: result
merge_method: ties
base_model: meta/base-13b
models:
  - model: middle
    parameters: {weight: 1}
  - model: start+three/math-13b
    parameters: {weight: 1}
tokenizer:
  source: start
  tokens:
    <a>: {source: middle}
    <b>: {source: {kind: model_token, model: start, token_id: 1}}
---
name: middle
merge_method: linear
models: [{model: start}, {model: one/orca-13b}]
parameters: {weight: 1}
---
name: start
merge_method: linear
models: [{model: one/orca-13b}, {model: two/platypus-13b}]
parameters: {weight: 1}
"""


def test_documents_come_in_the_order_of_their_needs(load):
    specs = load(MULTI)
    assert [s.name for s in specs] == ["start", "middle", "result"]
    assert [s.documents for s in specs] == [(), ("start",), ("middle", "start")]
    start, middle = specs[1].models[0], specs[2].models[0]
    assert (start.document, middle.document) == ("start", "middle")
    assert specs[2].models[1].document == "start" and specs[2].models[1].adapter is not None


def test_results_of_others_are_put_in(load, tmp_path):
    spec = load(MULTI)[2]
    folders = {"start": tmp_path / "x1", "middle": tmp_path / "x2"}
    filled = spec.with_documents(folders)
    assert [m.path for m in filled.models] == [tmp_path / "x2", tmp_path / "x1"]
    assert [m.name for m in filled.models] == ["middle", "start+three/math-13b"]
    assert filled.models[1].adapter == spec.models[1].adapter
    # The tokenizer's "start" is the one that is merged, with its adapter.
    lora = spec.models[1].adapter
    assert filled.tokenizer.source == ModelRef(tmp_path / "x1", lora, document="start")
    assert filled.tokenizer.tokens["<a>"].source.path == tmp_path / "x2"
    token = filled.tokenizer.tokens["<b>"].source
    assert isinstance(token, ModelToken) and token.model.path == tmp_path / "x1"
    assert filled.document() == spec.document()
    assert spec.models[0].path != tmp_path / "x2"  # it is unchanged
    with pytest.raises(KeyError):
        spec.with_documents({"start": tmp_path})


def test_documents_are_written_out_again(load):
    specs = load(MULTI)
    again = load(yaml.safe_dump_all([s.document() for s in specs]))
    assert again == specs


def test_a_nameless_document_is_the_result(load):
    nameless = MULTI.replace("name: result\n", "")
    assert [s.name for s in load(nameless)] == ["start", "middle", None]
    with pytest.raises(RecipeError, match=r"r.yaml: expected one merge, got 3 documents"):
        load_merge_spec("r.yaml")


def test_a_document_goes_before_a_folder(load, tmp_path):
    (tmp_path / "start").mkdir()
    specs = load(MULTI)
    assert specs[1].models[0].document == "start"
    alone = load(MULTI.split("---\n")[2].replace("two/platypus-13b", "./start"))
    assert alone[0].models[1].document is None and alone[0].documents == ()


LINEAR = "merge_method: linear\nmodels: [{model: %s}]\nparameters: {weight: 1}\n"
ERRORS = [
    (MULTI.replace("one/orca-13b}]", "result}]"), "r.yaml:1: .*circle: 'result' needs 'middle' n"),
    (MULTI.replace("model: start}", "model: strat}"), r"r.yaml:17: .*'strat'.*mean 'start'\?"),
    (MULTI.replace("name: start", "name: middle"), "r.yaml:20: name 'middle' is another document"),
    (
        MULTI.replace("name: result\n", "").replace("name: middle\n", ""),
        "r.yaml:14: key 'name' is missing: of several documents one may lack it",
    ),
    (
        MULTI + "---\nname: idle\n" + LINEAR % "one/orca-13b",
        r"r.yaml:1: no document uses 'result', and the result is 'idle'",
    ),
    ("name: x\n" + LINEAR % "x", "r.yaml:3: .*found no folder 'x'"),
    (MULTI.replace("name: start", "name: 3"), "r.yaml:20: expected name to be text, got 3"),
    ("name: x\n" + LINEAR % "y" + "---\nname: y\n" + LINEAR % "x", "'x' needs 'y' needs 'x'"),
]


@pytest.mark.parametrize("text, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(load, text, message):
    with pytest.raises(RecipeError, match=message):
        load(text)


# One of each kind that people share, as they write it.

SHARED = {
    "linear": """
models:
  - model: one/orca-13b
    parameters:
      weight: 1.0
  - model: two/platypus-13b
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""",
    "slerp with gradients and filters": """
slices:
  - sources:
      - model: one/orca-13b
        layer_range: [0, 40]
      - model: two/platypus-13b
        layer_range: [0, 40]
# or, the equivalent models: syntax
merge_method: slerp
base_model: one/orca-13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "ties": """
models:
  - model: one/orca-13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: two/platypus-13b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: three/math-13b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: meta/base-13b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare": """
models:
  - model: meta/base-13b
    # no parameters necessary for base model
  - model: one/orca-13b
    parameters:
      weight: 0.4
      density: 0.53
  - model: two/platypus-13b
    parameters:
      weight: 0.3
      density: 5.3e-1
merge_method: dare_ties
base_model: meta/base-13b
parameters:
  int8_mask: true
  lambda: 1.0
dtype: bfloat16
""",
    "passthrough with slices": """
slices:
  - sources:
    - model: one/orca-13b
      layer_range: [0, 24]
  - sources:
    - model: two/platypus-13b
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
    "passthrough that deepens with layers of no effect": """
slices:
  - sources:
      - model: one/orca-13b
        layer_range: [0, 24]
  - sources:
      - model: one/orca-13b
        layer_range: [23, 24]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources:
      - model: one/orca-13b
        layer_range: [24, 40]
merge_method: passthrough
dtype: bfloat16
""",
    "tokenizer union": """
merge_method: linear
models:
  - model: one/orca-13b
    parameters: {weight: 0.5}
  - model: two/platypus-13b
    parameters: {weight: 0.5}
dtype: bfloat16
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: one/orca-13b
    <|im_end|>:
      source:
        kind: model_token
        model: two/platypus-13b
        token: "</s>"
      force: true
chat_template: auto
""",
    "multi-document": """
slices:
  - sources:
      - model: one/orca-13b
        layer_range: [0, 40]
      - model: two/platypus-13b
        layer_range: [0, 40]
merge_method: slerp
base_model: one/orca-13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
dtype: float16
name: gradient-slerp
---
models:
  - model: gradient-slerp
    parameters:
      weight: 0.5
  - model: three/math-13b
    parameters:
      weight: 0.5
merge_method: task_arithmetic
base_model: meta/base-13b
dtype: float16
name: gradient-slerp-math
""",
}


@pytest.mark.parametrize("kind", SHARED)
def test_shared_recipes_load(load, kind):
    specs = load(SHARED[kind])
    assert load(yaml.safe_dump_all([s.document() for s in specs])) == specs
    spec = specs[-1]
    if kind == "ties":
        density = spec.modules[0].slices[0].sources[0].parameters["density"]
        assert [density.at("n", t) for t in (0, 0.25, 1)] == pytest.approx([1, 0.85, 0.1])
    if kind == "multi-document":
        assert [s.name for s in specs] == ["gradient-slerp", "gradient-slerp-math"]
        assert spec.documents == ("gradient-slerp",)
    if kind == "dare":
        assert [m.name for m in spec.models] == ["one/orca-13b", "two/platypus-13b"]
