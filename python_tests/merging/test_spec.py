import pytest
import torch
import yaml

from mergeme_ext.merging import MergeSpec, ModelRef, load_merge_spec
from mergeme_ext.merging.settings import Setting
from mergeme_ext.merging.spec import ModelToken, TokenizerSpec, TokenRule
from mergeme_ext.recipes import RecipeError
from python_tests.merging import recipe_methods

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
    recipe_methods.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("base", "a", "b", "a+b", "v@1", "lora", "stats"):
        (tmp_path / name).mkdir()
    hub = tmp_path / "cache/models--owner--tuned"
    for commit in ("abc", "def"):
        (hub / "snapshots" / commit).mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc")
    (hub / "refs/v2").write_text("def\n")

    def read(text):
        (tmp_path / "r.yaml").write_text(text)
        return load_merge_spec("r.yaml")

    return read


def plain(settings):
    return {key: setting.document() for key, setting in settings.items()}


def sources_of(spec):
    (module,) = spec.modules
    (piece,) = module.slices
    return piece.sources


def test_reads_a_recipe(load):
    spec = load(GOOD)
    assert spec.method == "ties" and spec.base.name == "base" and spec.name is None
    assert [s.model.name for s in sources_of(spec)] == ["base", "a", "b"]
    assert [m.name for m in spec.models] == ["a", "b"] and spec.lead == spec.base
    assert [plain(s.parameters) for s in sources_of(spec)] == [
        {},
        {"weight": 0.5},
        {"weight": 0.1, "density": 0.25},
    ]
    assert plain(spec.parameters) == {"density": 0.5, "lambda": "1/n", "normalize": False}
    assert (spec.dtype, spec.out_dtype) == (torch.float16, torch.bfloat16)
    assert spec.result_dtype == torch.bfloat16
    assert load(GOOD.replace("out_dtype: bfloat16\n", "")).result_dtype == torch.float16
    assert load(GOOD.replace("dtype: float16\n", "", 1)).dtype is None


SLICES = """\
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [2, 6]}
    parameters: {t: 0.25}
  - sources:
      - {model: b, layer_range: [6, 8]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - value: 0.5
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: a, force: true}
    <|im_end|>:
      source: {kind: model_token, model: b, token: </s>}
    <pad>: {source: {kind: zero}}
    <x>: {source: {kind: model_token, model: a, token_id: 3}}
    <y>: {}
  pad_to_multiple_of: 64
chat_template: chatml
name: mine
"""


def test_reads_slices_and_tokenizer(load):
    spec = load(SLICES)
    (module,) = spec.modules
    assert module.name is None and [len(p.sources) for p in module.slices] == [2, 1]
    assert [s.layers for p in module.slices for s in p.sources] == [(0, 4), (2, 6), (6, 8)]
    assert plain(module.slices[0].parameters) == {"t": 0.25}
    a, b = ModelRef.of("a"), ModelRef.of("b")
    assert spec.references == (a, b) and spec.models == (b,)
    assert spec.tokenizer == TokenizerSpec(
        "union",
        {
            "<|im_start|>": TokenRule(a, force=True),
            "<|im_end|>": TokenRule(ModelToken(b, token="</s>")),
            "<pad>": TokenRule("zero"),
            "<x>": TokenRule(ModelToken(a, token_id=3)),
            "<y>": TokenRule(),
        },
        64,
    )
    assert spec.tokenizer.references == (a, b)
    assert spec.chat_template == "chatml" and spec.name == "mine"


MODULES = """\
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {weight: [1, 0.5]}
  vision_tower:
    models: [{model: a}]
parameters: {weight: 1}
"""


def test_reads_modules(load):
    spec = load(MODULES)
    assert [m.name for m in spec.modules] == ["text_decoder", "vision_tower"]
    text, vision = spec.modules
    assert plain(text.parameters) == {"weight": [1, 0.5]} and not vision.parameters
    assert text.slices[0].is_layered and not vision.slices[0].is_layered


@pytest.mark.parametrize("text", [GOOD, SLICES, MODULES], ids=["models", "slices", "modules"])
def test_its_document_is_a_recipe_again(load, text):
    spec = load(text)
    document = spec.document()
    again = load(yaml.safe_dump(document))
    assert again == spec and again.document() == document


def test_document_of_shared_values(tmp_path):
    models = [tmp_path / "x" / "a", tmp_path / "y" / "b"]
    spec = MergeSpec.of_models("linear", models, None, {"weights": 1})
    assert spec.document() == {
        "merge_method": "linear",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1},
    }
    spec = MergeSpec.of_models("linear", models, None, {"weights": [1, 2]}, dtype=torch.float16)
    assert spec.document()["models"][1] == {"model": "b", "parameters": {"weight": 2}}
    assert spec.document()["dtype"] == "float16"


def test_of_models_counts_the_base_as_the_method_does(load):
    spec = MergeSpec.of_models("ties", ["base", "a", "b"], "base", {"weights": [1, 2]})
    assert [plain(s.parameters) for s in sources_of(spec)] == [{}, {"weight": 1}, {"weight": 2}]
    with pytest.raises(ValueError, match="linear: expected weights to hold 3 values"):
        MergeSpec.of_models("linear", ["base", "a", "b"], "base", {"weights": [1, 2]})


# Model references


@pytest.mark.parametrize(
    "text, path, adapter",
    [
        ("a", "a", None),
        ("./a", "a", None),
        ("a+lora", "a", "lora"),
        ("a+b", "a+b", None),  # a folder of that name goes first
        ("v@1", "v@1", None),
        ("v@1+lora", None, None),  # its @ is part of no whole name
        ("owner/tuned", "cache/models--owner--tuned/snapshots/abc", None),
        ("owner/tuned@v2", "cache/models--owner--tuned/snapshots/def", None),
        ("owner/tuned@def+lora", "cache/models--owner--tuned/snapshots/def", "lora"),
        ("{model: a}", "a", None),
        ("{model: a, lora: lora, override_architecture: null}", "a", "lora"),
        ("{model: {path: a}, lora: {path: lora, revision: null}}", "a", "lora"),
        (
            "{model: {path: owner/tuned, revision: v2}}",
            "cache/models--owner--tuned/snapshots/def",
            None,
        ),
    ],
)
def test_model_references(load, tmp_path, text, path, adapter):
    recipe = f"merge_method: linear\nmodels: [{{model: {text}}}]\nparameters: {{weight: 1}}\n"
    if path is None:
        with pytest.raises(RecipeError, match=r"found no folder 'v', .* at revision '1'"):
            load(recipe)
        return
    (model,) = load(recipe).models
    assert model.path.samefile(tmp_path / path)
    assert (model.adapter is None) == (adapter is None)
    assert adapter is None or model.adapter.samefile(tmp_path / adapter)


def test_names_of_references(tmp_path):
    hub = tmp_path / "models--owner--tuned/snapshots/abc"
    assert ModelRef(hub).name == "owner/tuned"
    assert ModelRef(hub, tmp_path / "lora").name == "owner/tuned+lora"
    assert ModelRef(tmp_path / "a") == ModelRef(tmp_path / "b" / ".." / "a")
    assert ModelRef(tmp_path / "a") != ModelRef(tmp_path / "a", tmp_path / "lora")
    assert len({ModelRef(tmp_path / "a"), ModelRef(tmp_path / "." / "a")}) == 1


# The base


def test_a_base_that_is_not_listed_is_one_more_model(load):
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
    spec = load(text)
    assert [s.model.name for s in sources_of(spec)] == ["a", "base"]
    assert spec.models == (ModelRef.of("a"), ModelRef.of("base"))
    assert load(yaml.safe_dump(spec.document())) == spec
    listed = load(text.replace("{model: a}", "{model: base}, {model: a}"))
    assert [s.model.name for s in sources_of(listed)] == ["base", "a"]
    apart = load(text.replace("linear", "spherical_mean"))
    assert [s.model.name for s in sources_of(apart)] == ["a"]
    own = text.replace("parameters: {weight: 1}\n", "").replace(
        "{model: a}", "{model: a, parameters: {weight: 1}}"
    )
    with pytest.raises(
        RecipeError, match=r"'weight' of each model; base_model is one of them, as linear takes no"
    ):
        load(own)
    with pytest.raises(RecipeError, match="passthrough: expected 1 model, got 2"):
        load(text.replace("linear", "passthrough").replace("weight", "scale"))


def test_slices_do_not_get_a_base_they_do_not_list(load):
    spec = load(
        "merge_method: passthrough\nbase_model: base\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n"
        "  - sources: [{model: b, layer_range: [0, 1]}]\n"
    )
    assert [m.name for m in spec.models] == ["a", "b"] and spec.lead.name == "base"


def test_the_bases_own_parameters_are_tolerated(load):
    spec = load(GOOD.replace("- model: base\n", "- {model: base, parameters: {weight: 1}}\n"))
    assert plain(sources_of(spec)[0].parameters) == {"weight": 1}


def test_required_parameters_may_stand_on_any_level(load):
    head = "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [0, 1]}]\n"
    assert load(head + "    parameters: {weight: 1}\n")
    assert load(head + "parameters: {weight: [{filter: mlp, value: 1}]}\n")
    assert load(head.replace("[0, 1]}", "[0, 1], parameters: {weight: 1}}"))
    with pytest.raises(RecipeError, match=r"r.yaml:3: linear needs parameter 'weight' of each mo"):
        load(head)
    with pytest.raises(RecipeError, match=r"r.yaml:1: slerp needs parameter 't'"):
        load(SLICES[: SLICES.index("parameters:\n")].replace("    parameters: {t: 0.25}\n", ""))


def test_statistics(load, tmp_path):
    text = "merge_method: fisher\nmodels: [{model: a, parameters: {fisher_info: stats}}]\n"
    spec = load(text)
    assert sources_of(spec)[0].statistics.samefile(tmp_path / "stats")
    assert load(yaml.safe_dump(spec.document())) == spec
    with pytest.raises(RecipeError, match=r"'fisher_info' in parameters: is each model's own"):
        load(text + "parameters: {fisher_info: stats}\n")
    with pytest.raises(RecipeError, match=r"parameters.fisher_info: found no folder 'statz'"):
        load(text.replace("stats", "statz"))


def test_vocabulary_sources(load):
    head = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, int8_mask: true}\n"
    assert load(head).tokenizer is None
    assert load(head + "tokenizer_source: union\n").tokenizer == TokenizerSpec("union")
    assert load(head + "tokenizer_source: base\n").tokenizer == TokenizerSpec("base")
    model = TokenizerSpec(ModelRef.of("a"))
    assert load(head + "tokenizer_source: a\n").tokenizer == model
    assert load(head + "tokenizer: {source: a}\n").tokenizer == model
    assert load(head + "tokenizer_source: model:a\n").tokenizer == model
    with pytest.raises(RecipeError, match=r"r.yaml:4: tokenizer: .*b is none of the models to me"):
        load(head + "tokenizer: {source: a, tokens: {x: {source: b}}}\n")
    assert load(head + "tokenizer: {pad_to_multiple_of: 8}\n").tokenizer.source == "union"
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load(f"{head}chat_template: '{template}'\n").chat_template == template


# Errors

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
    ("models:", "modles:", r"r.yaml:3: unknown key 'modles'; did you mean 'mod"),
    ("dtype: float16", "slices: []", "r.yaml:15: expected one of .*, got models and slices"),
    (
        "density: 0.25",
        "density: 1.7",
        r"r.yaml:10: expected models\[2\].parameters.density to be a fraction in \(0, 1\], got 1.7",
    ),
    ("density: 0.25", "density: 0", r"to be a fraction in \(0, 1\], got 0"),
    (
        "density: 0.25",
        "density:\n        - 0.5\n        - -0.3",
        r"r.yaml:12: expected .*parameters.density\[1\] to be a fraction in \(0, 1\], got -0.3",
    ),
    (
        "density: 0.25",
        "density:\n      - {filter: mlp, value: [1, 2]}\n",
        r"r.yaml:11: expected .*density\[0\].value\[1\] to be a fraction in \(0, 1\], got 2",
    ),
    (
        "density: 0.25",
        "density:\n      - {fliter: mlp, value: 1}\n",
        r"r.yaml:11: unknown key 'fliter' in models\[2\].parameters.density\[0\]; did you mean 'fi",
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
        r"r.yaml:6: key 'lambda' in models\[1\].parameters: is one for all models",
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
    ("model: b\n", "model: ./a\n", r"r.yaml:7: models\[2\].model is models\[1\].model again"),
    ("model: b\n", "model: c\n", r"r.yaml:7: models\[2\].model: found no folder 'c', .*'s cache"),
    ("model: b\n", "model: b+none\n", r"r.yaml:7: models\[2\].model: found no folder 'none'"),
    ("model: b\n", "model: b+\n", r"model to be a model, or model\+adapter, got 'b\+'"),
    ("model: b\n", "model: b@main\n", r"'b' is a local folder, which has no revision 'main'"),
    ("model: b\n", "model: owner/tuned@v3\n", r"no folder 'owner/tuned', .* at revision 'v3'"),
    ("model: b\n", "model: {path: b}\n", r"r.yaml:7: key 'path' in .*: goes one level deeper"),
    ("model: b\n", "model: {model: {paht: b}}\n", r"unknown key 'paht' in models\[2\].model.model"),
    (
        "model: b\n",
        "model: {model: b, override_architecture: X}\n",
        "override_architecture: not supported",
    ),
    ("model: b\n", "model: 3\n", r"r.yaml:7: expected models\[2\].model to be text, got 3"),
    ("model: b\n", "model: b\n    layer_range: [0, 1]\n", "ranges of layers go under slices"),
    (
        "out_dtype: bfloat16",
        "out_dtype: int8",
        "r.yaml:16: unknown out_dtype 'int8'; known are bfl",
    ),
    (
        "dtype: float16",
        "chat_template: chatlm",
        r"r.yaml:15: chat_template 'chatlm' is neither .*; did you mean 'chatml'\?",
    ),
    (
        "dtype: float16",
        "tokenizer_source: unoin",
        "r.yaml:15: tokenizer_source: found no folder 'unoin'",
    ),
    ("dtype: float16", "tokenizer: {source: union, tokns: {}}", "did you mean 'tokens'"),
    (
        "dtype: float16",
        "tokenizer: {}\ntokenizer_source: union",
        "r.yaml:16: tokenizer_source is the old form of tokenizer",
    ),
    ("dtype: float16", "tokenizer: {pad_to_multiple_of: 0}", "whole number of at least 1, got 0"),
    (
        "dtype: float16",
        "tokenizer: {tokens: {x: {source: {kind: zreo}}}}",
        r"r.yaml:15: unknown tokenizer.tokens.x.source.kind 'zreo'; did you mean 'zero'\?",
    ),
    (
        "dtype: float16",
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
        "r.yaml:15: expected tokenizer.tokens.x.source to have either token or token_id",
    ),
    ("dtype: float16", "tokenizer: {tokens: {x: {forec: true}}}", "did you mean 'force'"),
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


SLICE_ERRORS = [
    ("[2, 6]", "[2, 5]", r"r.yaml:6: expected slices\[0\].sources\[1\].layer_range to be of 4 lay"),
    ("[2, 6]", "[6, 2]", r"r.yaml:6: expected .*layer_range to be \[first layer, layer after the"),
    ("[2, 6]", "[2, 6.5]", r"to be \[first layer, layer after the last\], as \[0, 16\], got"),
    ("[2, 6]", "6", r"to be \[first layer, layer after the last\], as \[0, 16\], got 6"),
    (", layer_range: [2, 6]", "", r"r.yaml:6: expected all or none of a slice's sources"),
    (", layer_range: [6, 8]", "", r"r.yaml:8: key 'layer_range' is missing in slices\[1\].sourc"),
    ("layer_range: [2", "layer_rnage: [2", "did you mean 'layer_range'"),
    ("- sources:", "- soruces:", r"r.yaml:4: unknown key 'soruces' in slices\[0\]; did you mean"),
    ("parameters: {t: 0.25}", "parameters: {s: 0.25}", r"r.yaml:7: unknown key 's' in slices\[0\]"),
    (
        "- {model: b, layer_range: [6, 8]}",
        "- {model: a, layer_range: [6, 8]}",
        r"r.yaml:8: slerp needs a model besides the base",
    ),
    (
        "- {model: b, layer_range: [6, 8]}",
        "[{model: b, layer_range: [6, 8]}, {model: base, layer_range: [6, 8]}]",
        r"slices\[1\].sources: slerp: expected 1 model besides the base, got 2",
    ),
]


@pytest.mark.parametrize("old, new, message", SLICE_ERRORS, ids=[m for *_, m in SLICE_ERRORS])
def test_errors_of_slices(load, old, new, message):
    assert SLICES.count(old) >= 1
    with pytest.raises(RecipeError, match=message):
        load(SLICES.replace(old, new, 1))


MODULE_ERRORS = [
    ("text_decoder", "text_deocder", r"r.yaml:3: unknown key 'text_deocder' in modules; did you"),
    ("    models: [{model: a}]", "    {}", r"modules.vision_tower to have either models or slices"),
    ("    models: [{model: a}]", "    dtype: x", r"unknown key 'dtype' in modules.vision_tower"),
    (MODULES[MODULES.index("  text") : MODULES.index("param", 200)], "  {}\n", "at least one"),
]


@pytest.mark.parametrize("old, new, message", MODULE_ERRORS, ids=[m for *_, m in MODULE_ERRORS])
def test_errors_of_modules(load, old, new, message):
    assert MODULES.count(old) >= 1
    with pytest.raises(RecipeError, match=message):
        load(MODULES.replace(old, new, 1))


def test_parameter_of_another_method(load):
    with pytest.raises(RecipeError, match="unknown key 'density' in parameters; known are normali"):
        load("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, density: 1}\n")
    with pytest.raises(RecipeError, match=r"r.yaml:2: linear needs parameter 'weight' of each"):
        load("merge_method: linear\nmodels: [{model: a}]\n")


def test_whole_numbers_make_no_gradient(load):
    text = "merge_method: fisher\nmodels: [{model: a}]\nparameters: {seed: [1, 2]}\n"
    with pytest.raises(RecipeError, match=r"parameters.seed\[0\] .*, got 1.5, which lies between"):
        load(text)
    assert load(text.replace("[1, 2]", "3")).parameters["seed"] == Setting((3,))
