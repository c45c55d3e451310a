"""What cannot be built is refused with a clear message, and nothing is left behind."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergeme_ext.merging import Execution
from python_tests.assembly.models import build, edit_config, make

EXPERTS = [{"source_model": "one", "positive_prompts": ["heart"]}]
EXPERTS += [{"source_model": "two", "positive_prompts": ["def"]}]


@pytest.fixture
def models(tmp_path):
    for name in ("base", "one", "two"):
        make(tmp_path / name)
    return tmp_path


def refused(folder, message, recipe=None, **changes):
    """Building raises ``message`` and leaves the folder as it was."""
    recipe = {"base_model": "base", "experts": EXPERTS} | changes if recipe is None else recipe
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=message):
        build(path, folder / "out")
    assert sorted(folder.iterdir()) == before


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def expert(name="one", **changes):
    return {"source_model": name, "positive_prompts": ["heart"]} | changes


RECIPES = [
    ({"gate_mode": "magic"}, r":\d+: unknown gate_mode 'magic'.*hidden, random, zero"),
    ({"gate_mod": "zero"}, r":\d+: unknown key 'gate_mod'; did you mean 'gate_mode'\?"),
    ({"experts_per_token": 3}, r":\d+: expected experts_per_token to be in \[1, 2\].*got 3"),
    ({"experts_per_token": 0}, r"experts_per_token to be .*at least 1, got 0"),
    ({"experts": []}, r":\d+: expected experts to be a list of mappings, got an empty list"),
    ({"experts": [expert(), {"source_model": "two"}]}, r":\d+: expected experts\[1\] to have posi"),
    ({"experts": [expert("nowhere")]}, r"experts\[0\]\.source_model: found no folder 'nowhere'"),
    ({"experts": [expert(weight=2)]}, r"unknown key 'weight' in experts\[0\]"),
    ({"experts": [expert(noise_scale=2)]}, r"'noise_scale' in experts\[0\]: .* not supported yet"),
    ({"shared_experts": []}, "'shared_experts': shared experts are not supported yet"),
    ({"merge": {"method": "tise"}}, r"unknown merge.method 'tise'; did you mean 'ties'\?"),
    ({"merge": {"method": "ties", "parameters": {"density": 1.7}}}, r"density to be .*got 1\.7"),
    ({"merge": {"method": "ties", "parameters": {"densty": 1}}}, "did you mean 'density'"),
    ({"merge": {"parameters": {}}}, "key 'method' is missing in merge"),
    ({"gate_scale": 0}, "gate_scale to be a number above 0, got 0"),
    ({"gate_center": 1}, "gate_center to be true or false, got 1"),
    ({"base_prompts": ["a"]}, "base_prompts are for base_as_expert"),
    ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ({"architecture": "qwen"}, "unknown architecture 'qwen'; known are mixtral"),
    (
        {"experts": [expert("base"), expert("base")], "merge": {"method": "ties"}},
        "besides the base",
    ),
    ({"experts": [expert(positive_prompts=[""]), expert("two")]}, "prompts with text, got ''"),
]


@pytest.mark.parametrize("changes, message", RECIPES)
def test_recipe(models, changes, message):
    refused(models, message, **changes)


FILES = [
    ("p.txt", None, "expected a readable text file, got p.txt: No such file"),
    ("p.txt", b"\n \n", "expected at least one prompt in p.txt, got none"),
    ("p.txt", b"\xff\xfe", "got p.txt: not UTF-8"),
    ("p.jsonl", b'{"text": "a"}\n{"txt": 1}\n', 'object with a "text" in p.jsonl, line 2'),
    ("p.jsonl", b"not json\n", "in p.jsonl, line 1, got 'not json'"),
]


@pytest.mark.parametrize("name, content, message", FILES)
def test_prompts_file(models, name, content, message):
    if content is not None:
        (models / name).write_bytes(content)
    experts = [{"source_model": "one", "prompts_file": name}, expert("two")]
    refused(models, r"experts\[0\]\.prompts_file: .*" + message, experts=experts)


def other_hidden_size(m):
    make(m / "two", hidden_size=16)


def other_width(m):
    make(m / "two", intermediate_size=48)


def other_depth(m):
    make(m / "two", num_hidden_layers=3)


def other_vocabulary(m):
    make(m / "two", vocab_size=40)


def other_heads(m):
    make(m / "two", num_attention_heads=2, num_key_value_heads=1, head_dim=12)


def missing_tensor(m):
    change_tensors(m / "one", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def attention_bias(m):
    make(m / "base", attention_bias=True)


def mlp_bias(m):
    make(m / "two", mlp_bias=True)


def bias_tensor(m):
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(m / "one", lambda t: t.update({name: torch.zeros(24)}))


def foreign_tensor(m):
    name = "model.layers.0.self_attn.q_norm.weight"
    change_tensors(m / "base", lambda t: t.update({name: torch.zeros(6)}))


def untied_head_of_tied_model(m):
    for name in ("base", "one", "two"):
        make(m / name, tie_word_embeddings=True)
    change_tensors(m / "two", lambda t: t.update({"lm_head.weight": torch.zeros(19, 24)}))


def one_tied(m):
    make(m / "two", tie_word_embeddings=True)


def whole_numbers(m):
    name = "model.norm.weight"
    change_tensors(m / "one", lambda t: t.update({name: t[name].int()}))


def config(name, **changes):
    return lambda m: edit_config(m / name, **changes)


def no_tokenizer(m):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (m / "base" / name).unlink()


def truncated(m):
    path = m / "two" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


MODELS = [
    (
        other_hidden_size,
        r"two: expected model.embed_tokens.weight of shape \[19, 24\] as in .*base, got \[19, 16\]",
    ),
    (
        other_width,
        r"gate_proj.weight of shape \[40, 24\] as in .*, got \[48, 24\]",
    ),
    (other_depth, "two: expected num_hidden_layers 2 as in .*base, got 3"),
    (other_vocabulary, r"model.embed_tokens.weight of shape \[19, 24\] as in .*, got \[40, 24\]"),
    (other_heads, "two: expected num_attention_heads 4 as in .*base, got 2"),
    (
        missing_tensor,
        r"expected tensor .*1.mlp.up_proj.weight of shape \[40, 24\], which is missing",
    ),
    (attention_bias, "base: expected attention_bias: false, as Mixtral's layers have no bias"),
    (mlp_bias, "two: expected mlp_bias: false, as Mixtral's layers have no bias"),
    (bias_tensor, "one: cannot use tensor model.layers.0.self_attn.q_proj.bias: Mixtral's layers"),
    (
        foreign_tensor,
        "base: cannot use tensor .*q_norm.weight: it has no place in a LLaMA or Mistral",
    ),
    (untied_head_of_tied_model, "two: expected lm_head.weight to equal model.embed_tokens.weight"),
    (one_tied, "two: expected tie_word_embeddings False as in .*base, got True"),
    (whole_numbers, "one: expected model.norm.weight to be float16, .*, got int32"),
    (
        config("one", model_type="gpt2"),
        "one: expected model_type to be one of .*llama.*, got 'gpt2'",
    ),
    (config("one", hidden_act="gelu"), "one: expected hidden_act silu, got 'gelu'"),
    (config("one", vocab_size=None), r"one: expected config.json to hold \['vocab_size'\]"),
    (
        config("one", vocab_size=20),
        "one: expected vocab_size 19 as in .*base, got 20",
    ),
    (config("two", quantization_config={"bits": 4}), "two: .* no tensor is FP8"),
    (config("two", partial_rotary_factor=0.5), "two: expected partial_rotary_factor 1"),
    (config("two", rope_scaling={"full_attention": {"rope_type": "default"}}), "one set of rope"),
    (
        config("two", layer_types=["full_attention", "sliding_attention"]),
        "the same attention in all",
    ),
    (lambda m: (m / "two" / "config.json").unlink(), "two: expected model_type .* got None"),
    (no_tokenizer, "gate_mode hidden: expected a tokenizer in .*base"),
    (truncated, "truncated"),
]


@pytest.mark.parametrize("spoil, message", MODELS)
def test_models(models, spoil, message):
    spoil(models)
    refused(models, message)


def test_the_target_is_left_alone(models):
    out = models / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    recipe = models / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "base", "experts": EXPERTS}))
    with pytest.raises(FileExistsError):
        build(recipe, out)
    with pytest.raises(FileExistsError):
        build(recipe, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="is one of the inputs"):
        build(recipe, models / "one", overwrite=True)
    with pytest.raises(ValueError, match="chunk_elements of at least 1, got 0"):
        build(recipe, models / "new", execution=Execution(chunk_elements=0))
    assert not (models / "new").exists()
    build(recipe, models / "new")
    again = build(recipe, models / "new", overwrite=True)
    assert json.loads((again / "config.json").read_text())["num_local_experts"] == 2


def test_missing_transformers_is_named(models, monkeypatch):
    recipe = models / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "base", "experts": EXPERTS}))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mergeme_ext\[hf\]', or choose gate_mode"):
        build(recipe, models / "out")
    assert not (models / "out").exists()


def test_an_error_on_the_way_leaves_nothing(models, monkeypatch):
    from mergeme_ext.assembly import upcycle

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    recipe = models / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"base_model": "base", "experts": EXPERTS, "gate_mode": "zero"})
    )
    before = sorted(models.iterdir())
    monkeypatch.setattr(upcycle.CheckpointSink, "write_at", fail)
    with pytest.raises(OSError, match="No space left"):
        build(recipe, models / "out")
    assert sorted(models.iterdir()) == before


def test_what_float16_cannot_hold_is_refused(models):
    """Experts are copied, not merged; their rounding is checked all the same."""

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = 70000

    change_tensors(models / "one", change)
    name = r"model.layers.0.block_sparse_moe.experts.0.w3.weight"
    message = rf"merged tensor '{name}' would hold inf at \[2, 3\]: too large for float16"
    refused(models, message, dtype="float16")
