import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from mergeme_ext.assembly import ExpertSpec, MergeChoice, MoESpec, load_moe_spec
from mergeme_ext.integrations.transformers import use_mergeme_experts
from mergeme_ext.merging import Execution
from python_tests.assembly.models import WORDS, build, edit_config, everything, make
from python_tests.references.mixtral import logits as reference

IDS = torch.tensor([[0, 2, 9, 17, 5, 11, 3, 8, 8, 1]])
MEDICAL, CODE = ["the heart and the liver", "fever dose of"], ["def x return if", "import class a"]


def prompts(**changes):
    return [
        {"source_model": "one", "positive_prompts": MEDICAL},
        {"source_model": "two", "positive_prompts": CODE},
    ]


def write_recipe(folder, name="recipe.yaml", **changes):
    recipe = {"base_model": "base", "experts": prompts()} | changes
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts, untied, float32."""
    folder = tmp_path_factory.mktemp("models")
    make(folder / "base")
    make(folder / "one", like=folder / "base", seed=1)
    make(folder / "two", like=folder / "base", seed=2)
    return folder


def family(folder, **settings):
    make(folder / "base", **settings)
    make(folder / "one", like=folder / "base", seed=1, **settings)
    make(folder / "two", like=folder / "base", seed=2, **(settings | {"shards": True}))
    return folder


def load_stock(folder, **options):
    model, report = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "sharded": {"shards": True},
    "mistral": {"mistral": True, "sliding_window": 4},
    "wide heads": {"head_dim": 10},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loads_in_stock_mixtral(tmp_path, kind):
    settings = KINDS[kind]
    folder = family(tmp_path, **settings)
    out = build(write_recipe(folder), tmp_path / "out")
    stock = load_stock(out, dtype="auto")
    assert stock.dtype == settings.get("dtype", torch.float32)
    assert stock.config.sliding_window == settings.get("sliding_window")
    head = "lm_head.weight" in load_file(out / "model.safetensors")
    assert head == (not settings.get("tie_word_embeddings", False))
    dense = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert stock.num_parameters() == dense.num_parameters() + 2 * (3 * 24 * 40 + 2 * 24)
    expected = stock(IDS).logits
    with use_mergeme_experts(stock):
        ours = stock(IDS).logits
    assert (ours - expected).abs().max() <= 64 * torch.finfo(stock.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_equal_a_float64_loop_over_experts(tmp_path, tied):
    out = build(write_recipe(family(tmp_path, tie_word_embeddings=tied)), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    exact = reference(load_file(out / "model.safetensors"), config, IDS[0])
    stock = load_stock(out)
    theirs = stock(IDS).logits[0]
    with use_mergeme_experts(stock):
        ours = stock(IDS).logits[0]
    error = [(x.double() - exact).abs().max().item() for x in (ours, theirs)]
    assert error[0] <= 2 * error[1] + torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_tensors_are_what_they_should_be(models, tmp_path):
    out = build(write_recipe(models, gate_mode="random"), tmp_path / "out")
    made = load_file(out / "model.safetensors")
    base, one, two = (load_file(models / m / "model.safetensors") for m in ("base", "one", "two"))
    for layer in range(2):
        dense, sparse = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        for e, expert in enumerate((one, two)):
            for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                moved = made.pop(f"{sparse}experts.{e}.{ours}.weight")
                assert torch.equal(moved, expert[f"{dense}{theirs}_proj.weight"])
        rows = made.pop(f"{sparse}gate.weight")
        assert rows.shape == (2, 24) and 0.01 < rows.std() < 0.03
    assert made.keys() == {name for name in base if ".mlp." not in name}
    for name, tensor in made.items():
        mean = (one[name].double() + two[name].double()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=2e-7, atol=1e-8)


@torch.no_grad()
def test_identical_experts_are_the_dense_model(tmp_path):
    make(tmp_path / "base", dtype=torch.float32)
    make(tmp_path / "one", like=tmp_path / "base", seed=1, dtype=torch.float32)
    experts = [{"source_model": "one"}] * 3
    recipe = write_recipe(tmp_path, experts=experts, gate_mode="random", seed=5)
    moe = load_stock(build(recipe, tmp_path / "out"))
    for layer in moe.model.layers:
        layer.mlp.gate.weight.mul_(100)  # any router
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    exact = reference(load_file(tmp_path / "one" / "model.safetensors"), config, IDS[0])
    with use_mergeme_experts(moe):
        ours = moe(IDS).logits[0]
    error = [(x.double() - exact).abs().max().item() for x in (ours, dense(IDS).logits[0])]
    assert error[0] <= 2 * error[1] + 2 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_base_as_expert(models, tmp_path):
    recipe = write_recipe(models, base_as_expert=True)
    out = build(recipe, tmp_path / "out")
    made = load_file(out / "model.safetensors")
    base, one, two = (load_file(models / m / "model.safetensors") for m in ("base", "one", "two"))
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert torch.equal(made[name], base["model.layers.1.mlp.down_proj.weight"])
    # A plain mean has the base in it.
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(m[name].double() for m in (base, one, two)) / 3
    torch.testing.assert_close(made[name].double(), mean, rtol=3e-7, atol=1e-8)
    # Without prompts it is nobody's domain: a centred row of zeros.
    rows = made["model.layers.0.block_sparse_moe.gate.weight"]
    assert not rows[2].any() and rows[:2].any(1).all()
    assert load_stock(out).config.num_local_experts == 3


@pytest.mark.parametrize("listed", [False, True])
def test_base_among_experts_has_no_task_vector(models, tmp_path, listed):
    merge = {"method": "ties", "parameters": {"density": 0.8, "lambda": "1/n", "normalize": False}}
    experts = [{"source_model": m} for m in ("one", "two")]
    plain = write_recipe(models, experts=experts, gate_mode="zero", merge=merge)
    changes = (
        {"experts": [*experts, {"source_model": "base"}]} if listed else {"base_as_expert": True}
    )
    recipe = write_recipe(
        models, "b.yaml", **({"experts": experts, "gate_mode": "zero", "merge": merge} | changes)
    )
    a = load_file(build(plain, tmp_path / "a") / "model.safetensors")
    b = load_file(build(recipe, tmp_path / "b") / "model.safetensors")
    for name in a:
        if "gate" not in name:
            assert torch.equal(a[name], b[name]), name
    assert not b["model.layers.0.block_sparse_moe.gate.weight"].any()


MERGES = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.8, "lambda": "1/n", "normalize": False},
    "dare_linear": {"density": 0.8, "lambda": "1/n", "rescale": "inverse_prob"},
    "dare_ties": {"density": 0.8, "lambda": "1/n", "rescale": "inverse_prob", "seed": 7},
}


@pytest.mark.parametrize("method", MERGES)
def test_merges_as_the_method_does(models, tmp_path, method):
    from mergeme_ext.merging import registry

    merge = {"method": method, "parameters": MERGES[method]}
    out = build(
        write_recipe(models, merge=merge, gate_mode="zero"),
        tmp_path / "out",
        execution=Execution(chunk_elements=100),
    )
    made = load_file(out / "model.safetensors")
    base, one, two = (load_file(models / m / "model.safetensors") for m in ("base", "one", "two"))
    words = {"lambda": "lam"}
    parameters = {words.get(k, k): v for k, v in MERGES[method].items()} | {"weights": 1.0}
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.norm.weight",
    ):
        expected = registry.get(method)(
            base[name], [one[name], two[name]], tensor_name=name, **parameters
        )
        assert torch.equal(made[name], expected), name


@pytest.mark.parametrize("gate_mode", ["hidden", "random"])
def test_chunks_and_threads_change_no_byte(models, tmp_path, gate_mode):
    merge = {"method": "dare_ties", "parameters": {"density": 0.7}}
    recipe = write_recipe(models, merge=merge, gate_mode=gate_mode)
    first = everything(build(recipe, tmp_path / "a"))
    assert (
        everything(build(recipe, tmp_path / "b", execution=Execution(chunk_elements=37))) == first
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert (
            everything(build(recipe, tmp_path / "c", execution=Execution(chunk_elements=1000)))
            == first
        )
    finally:
        torch.set_num_threads(threads)


def test_inputs_in_shards_and_output_in_shards(models, tmp_path):
    make(tmp_path / "base", shards=True)
    for seed, name in enumerate(("one", "two"), 1):
        make(tmp_path / name, like=tmp_path / "base", seed=seed, shards=True)
    assert not (tmp_path / "base" / "model.safetensors").exists()
    a = build(write_recipe(models), tmp_path / "a")
    b = build(write_recipe(tmp_path), tmp_path / "b", max_shard_size="10KB")
    assert len(list(b.glob("model-*.safetensors"))) > 3
    expected, found = load_stock(a).state_dict(), load_stock(b).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_dtype_and_mixed_dtypes(models, tmp_path):
    make(tmp_path / "two", like=models / "base", seed=2, dtype=torch.bfloat16)
    spec = MoESpec(
        models / "base",
        [ExpertSpec(models / "one"), ExpertSpec(tmp_path / "two")],
        gate_mode="random",
        dtype=torch.float16,
        merge=MergeChoice("task_arithmetic", {"lam": "1/n"}),
    )
    out = build(spec, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    made = load_file(out / "model.safetensors")
    assert {t.dtype for t in made.values()} == {torch.float16}
    one, two = (load_file(m / "model.safetensors") for m in (models / "one", tmp_path / "two"))
    name = "model.layers.0.self_attn.k_proj.weight"
    mean = (one[name].double() + two[name].double()) / 2
    torch.testing.assert_close(made[name].double(), mean, rtol=1e-3, atol=1e-4)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert torch.equal(made[name], two["model.layers.0.mlp.gate_proj.weight"].half())


def test_companion_files(models, tmp_path):
    recipe = write_recipe(models, merge={"method": "ties", "parameters": {"lambda": "1/n"}})
    out = build(recipe, tmp_path / "out")
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (models / "base" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out).encode("heart") == [WORDS.index("heart")]
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "| 1 | two |" in card
    text = (out / "mergeme_config.yml").read_text()
    assert not any(str(models) in t for t in (card, text, (out / "config.json").read_text()))
    # The recipe that was kept is one that can be run again.
    (models / "again.yaml").write_text(text)
    assert load_moe_spec(models / "again.yaml") == load_moe_spec(recipe)
    assert everything(build(models / "again.yaml", tmp_path / "again")) == everything(out)


@pytest.mark.parametrize("center", [False, True])
def test_prompts_that_are_alike_are_told(models, tmp_path, center):
    experts = [{"source_model": m, "positive_prompts": MEDICAL} for m in ("one", "two")]
    recipe = write_recipe(models, experts=experts, gate_center=center)
    with pytest.warns(UserWarning, match="hard to tell apart: .* in 2 of 2 layers"):
        build(recipe, tmp_path / "out")


def test_spec_checks_its_values(models):
    spec = MoESpec(models / "base", [ExpertSpec(models / "one")] * 2, gate_mode="zero")
    with pytest.raises(ValueError, match=r"expected gate_mode to be one of .* got 'magic'"):
        dataclasses.replace(spec, gate_mode="magic")
    with pytest.raises(ValueError, match=r"experts_per_token to be in \[1, 2\].*got 3"):
        dataclasses.replace(spec, experts_per_token=3)
    with pytest.raises(ValueError, match=r"experts\[0\] to have positive_prompts"):
        dataclasses.replace(spec, gate_mode="hidden")
    with pytest.raises(ValueError, match="gate_scale to be a number above 0, got 0"):
        dataclasses.replace(spec, gate_scale=0.0)
    with pytest.raises(ValueError, match="prompt_tokens to be at least 1"):
        dataclasses.replace(spec, prompt_tokens=0)


def test_experts_in_fp8_become_what_config_says(tmp_path):
    """Without a dtype in the recipe: bfloat16 here, not the float32 that they are computed in."""
    name = "model.layers.1.mlp.up_proj.weight"
    family(tmp_path, dtype=torch.bfloat16)
    for model in ("base", "one"):
        tensors = load_file(tmp_path / model / "model.safetensors")
        codes = tensors[name].to(torch.float8_e4m3fn)
        tensors |= {name: codes, name + "_scale": torch.tensor(0.375)}
        save_file(tensors, tmp_path / model / "model.safetensors", {"format": "pt"})
        quantised = {"quant_method": "compressed-tensors", "config_groups": {}}
        edit_config(tmp_path / model, quantization_config=quantised)
    build(write_recipe(tmp_path, gate_mode="random"), tmp_path / "out")
    model = load_stock(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    stored = load_file(tmp_path / "out/model.safetensors")
    expert = stored["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert torch.equal(expert, (0.375 * codes.float()).bfloat16())
