"""Whole merges of checkpoints as they are released: every format, layout and oddity in turn."""

import json
import math
import os

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from mergeme_ext.cli import main
from mergeme_ext.integrations.model_check import problems_of
from mergeme_ext.io import CheckpointError, CheckpointSink, CheckpointSource
from mergeme_ext.merging import (
    Allowances,
    Execution,
    MergeSpec,
    engine,
    get,
    merge,
    names,
    plan_merge,
)
from mergeme_ext.merging import execution as execution_module
from python_tests.merging.test_engine import PARAMETERS, spec_of, with_statistics
from python_tests.references import lora as lora_reference
from python_tests.references.fp8 import dequantise, e4m3
from python_tests.support.checkpoints import CONFIG, llama_tensors, save
from python_tests.vocabulary.models import FOX, LOREM, added, byte_bpe

SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
TASK = (
    "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n"
    "parameters: {weight: 0.5}\n"
)
COPY = "merge_method: passthrough\nmodels: [{model: %s}]\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text, out="out", **options):
    """Merge by a recipe; return the plan."""
    with open("r.yaml", "w") as file:
        file.write(text)
    return merge("r.yaml", out, **options)


def tensors_of(folder):
    source = CheckpointSource(folder)
    return {name: source.tensor(name) for name in source.names}


def mean(a, b, dtype=torch.float32):
    return (0.5 * a.double() + 0.5 * b.double()).to(dtype)


def folder_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def check_account(out, *models):
    """Every tensor on disk of ``models`` is in the report just once, used or dropped."""
    report = json.loads((out / "mergeme_report.json").read_text())
    for model in models:
        on_disk = []
        for file in model.glob("*.safetensors"):
            with safetensors.safe_open(file, "pt") as opened:
                on_disk += opened.keys()
        account = report["inputs"][model.name]
        assert sorted([*account["used"], *account["dropped"]]) == sorted(on_disk)
    return report


# FP8


def fp8_model(folder, seed, *, block, names=(GATE,), **config):
    """A bfloat16 model with some weights in FP8; return all its values."""
    tensors = llama_tensors(seed, torch.bfloat16)
    values = dict(tensors)
    g = torch.Generator().manual_seed(seed)
    for name in names:
        rows, columns = tensors[name].shape
        codes = (torch.randint(0, 120, (rows, columns), generator=g)).to(torch.uint8)
        codes |= torch.randint(0, 2, (rows, columns), generator=g).to(torch.uint8) << 7
        tensors[name] = codes.view(torch.float8_e4m3fn)
        numbers = [[e4m3(int(code)) for code in row] for row in codes]
        if block is None:
            scale = torch.rand((), generator=g)
            tensors[name + "_scale"] = scale
            grid, sizes = [[scale.item()]], (rows, columns)
        else:
            scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=g)
            tensors[name + "_scale_inv"] = scale
            grid, sizes = scale.tolist(), block
        exact = torch.tensor(dequantise(numbers, grid, sizes), dtype=torch.float64)
        values[name] = exact.float()
    config = {"dtype": "bfloat16", **config}
    save(folder, tensors, config)
    return values


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [7, 5]}}
WHOLE = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}


@pytest.mark.parametrize("block", [(7, 5), None], ids=["ragged blocks", "tensor scale"])
def test_fp8_base_and_bfloat16_expert(here, block):
    """The expert is bfloat16, so the result is; its task vector is taken from exact values."""
    down = GATE.replace("gate", "down")
    config = WHOLE if block is None else BLOCKS
    base = fp8_model(here / "base", 0, block=block, names=[GATE, down], **config)
    expert = llama_tensors(1, torch.bfloat16)
    save(here / "a", expert, {"dtype": "bfloat16"})
    plan = run(TASK)
    assert plan.read_bytes == sum(
        tensor.nbytes for n in ("base", "a") for tensor in load_file(here / n / SINGLE).values()
    )
    # As merged: two weights of the base, and what they meet, are float32; all else is bfloat16.
    wide = 2 * expert[GATE].numel()
    assert plan.operand_bytes == 2 * sum(2 * t.numel() for t in expert.values()) + 2 * 2 * wide
    out = tensors_of(here / "out")
    assert out.keys() == expert.keys()
    for name, tensor in out.items():
        b, a = base[name].double(), expert[name].double()
        assert torch.equal(tensor, (b + 0.5 * (a - b)).float().bfloat16()), name
    written = json.loads((here / "out/config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"
    report = check_account(here / "out", here / "base", here / "a")
    scales = [n for n in report["inputs"]["base"]["dropped"] if "_scale" in n]
    assert len(scales) == 2


@pytest.mark.slow
def test_an_fp8_model_of_transformers_merges_and_loads(here):
    """All matrices of the layers in FP8; the result is a plain bfloat16 model."""
    model = transformers_model(here / "a", "LlamaForCausalLM", 0, dtype=torch.bfloat16)
    other = transformers_model(here / "b", "LlamaForCausalLM", 1, dtype=torch.bfloat16)
    tensors, values = tensors_of(here / "a"), {}
    for name in [n for n in tensors if "_proj" in n]:
        codes = tensors[name].to(torch.float8_e4m3fn)
        rows, columns = codes.shape
        scale = torch.rand(-(-rows // 20), -(-columns // 24))
        tensors |= {name: codes, name + "_scale_inv": scale}
        scale = scale.repeat_interleave(20, 0)[:rows].repeat_interleave(24, 1)[:, :columns]
        values[name] = codes.float() * scale
    config = json.loads((here / "a/config.json").read_text())
    block = {"quant_method": "fp8", "weight_block_size": [20, 24]}
    save(here / "a", tensors, {**config, "quantization_config": block})
    run(LINEAR)
    out = load(here / "out")
    assert out.dtype == torch.bfloat16 and not hasattr(out.config, "quantization_config")
    for name, tensor in state(out).items():
        a = values.get(name, state(model)[name])
        assert torch.equal(tensor, mean(a, state(other)[name], torch.bfloat16)), name
    generates(out)


def test_fp8_models_of_different_scales_merge(here):
    a = fp8_model(here / "a", 0, block=(7, 5), **BLOCKS)
    b = fp8_model(here / "b", 1, block=None, **WHOLE)
    run(LINEAR + "dtype: float32\n")
    out = tensors_of(here / "out")
    assert all(torch.equal(out[n], mean(a[n], b[n])) for n in out)
    run(COPY % "a", "copy")
    copy = tensors_of(here / "copy")
    assert all(torch.equal(copy[n], a[n].bfloat16()) for n in copy)


# Memory


def wide_model(folder, seed, rows, **config):
    tensors = llama_tensors(seed, torch.bfloat16, vocab=rows, hidden=64)
    save(folder, tensors, {"dtype": "bfloat16", "vocab_size": rows, "hidden_size": 64, **config})
    return tensors


@pytest.mark.slow
def test_a_large_embedding_in_chunks_under_little_memory(here):
    """[60000, 64]: several chunks for one thread, more for three, the same bytes."""
    for seed, name in enumerate(("base", "a", "b")):
        wide_model(here / name, seed, 60000)
    recipe = TASK.replace("{model: a}", "{model: a}, {model: b}").replace(
        "task_arithmetic", "dare_ties"
    )
    (here / "r.yaml").write_text(recipe.replace("0.5}", "0.5, density: 0.4}"))
    plain = ["merge", "r.yaml", "-q", "--no-model-check", "--max-memory", "64MB"]
    for threads in ("1", "3"):
        assert main([*plain, f"out{threads}", "--threads", threads]) == 0
    assert folder_bytes(here / "out1") == folder_bytes(here / "out3")
    run((here / "r.yaml").read_text())
    assert folder_bytes(here / "out1") == folder_bytes(here / "out")


@pytest.mark.slow
def test_computed_tensors_too_large_for_memory(here, monkeypatch):
    """An FP8 embedding of 5 M elements: 20 MB as float32, 16 MiB of 64 may be held."""
    codes = torch.randint(0, 120, (80000, 64), dtype=torch.uint8)
    for name in ("base", "a"):
        tensors = wide_model(here / name, 1, 80000, **BLOCKS)
        tensors[EMBEDDING] = codes.view(torch.float8_e4m3fn)
        tensors[EMBEDDING + "_scale_inv"] = torch.rand(math.ceil(80000 / 7), 13)
        save(here / name, tensors, {"vocab_size": 80000, "hidden_size": 64, **BLOCKS})
        codes = codes.flip(0)
    laid_out = []

    def lay_out(operand, *, folder, in_memory):
        if operand.stored() is None:
            size = math.prod(operand.shape) * operand.dtype.itemsize
            laid_out.append(size <= in_memory)
        return original(operand, folder=folder, in_memory=in_memory)

    original = execution_module.lay_out
    monkeypatch.setattr(execution_module, "lay_out", lay_out)
    recipe = TASK.replace("task_arithmetic", "ties").replace("0.5}", "1, density: 0.3}")
    run(recipe, "small", execution=Execution(threads=1, max_memory=2**26))
    assert False in laid_out
    laid_out.clear()
    run(recipe, "large", execution=Execution(threads=1, max_memory=2**30))
    assert False not in laid_out
    assert folder_bytes(here / "small") == folder_bytes(here / "large")


# Files


def split(tensors, parts):
    names = sorted(tensors)
    return [{n: tensors[n] for n in names[i::parts]} for i in range(parts)]


def save_sharded(folder, tensors, parts, *, pickled=False, config=None):
    """Shards with an index, as transformers names them."""
    folder.mkdir()
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for i, part in enumerate(split(tensors, parts), 1):
        file = f"{stem}-{i:05d}-of-{parts:05d}.{suffix}"
        if pickled:
            torch.save(part, folder / file)
        else:
            safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))


def save_pickled(folder, tensors):
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))


WAYS = {
    "bin": save_pickled,
    "sharded bin": lambda folder, t: save_sharded(folder, t, 3, pickled=True),
    "two shards": lambda folder, t: save_sharded(folder, t, 2),
    "five shards": lambda folder, t: save_sharded(folder, t, 5),
}


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", ["bin", "two shards"])
def test_files_of_any_kind_merge_alike(here, first, second):
    a, b = llama_tensors(0), llama_tensors(1)
    WAYS[first](here / "a", a)
    WAYS[second](here / "b", b)
    run(LINEAR, max_shard_size="4KB")
    out = tensors_of(here / "out")
    assert out.keys() == a.keys()
    assert all(torch.equal(out[n], mean(a[n], b[n])) for n in out)


# LoRA

Q, EMBED = "model.layers.1.self_attn.q_proj", "model.embed_tokens"


def save_adapter(folder, seed, targets, *, rank=4, alpha=8, embeddings=()):
    """An adapter in PEFT's format; return its matrices as [out, in] updates, exact in float32."""
    g = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for module, (rows, columns) in targets.items():
        a = torch.randint(-4, 5, (rank, columns), generator=g) / 16
        b = torch.randint(-4, 5, (rows, rank), generator=g) / 16
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        updates[f"{module}.weight"] = lora_reference.update(a, b, alpha / rank)
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*targets]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


TARGETS = {Q: (16, 16), "model.layers.0.mlp.down_proj": (16, 24)}


@pytest.mark.parametrize("way", [*WAYS, "one file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_applied_as_peft_merges_them(here, way, dtype):
    """Numbers are multiples of 1/128 or so, hence exact, and only the store rounds."""
    tensors = llama_tensors(0, dtype)
    WAYS.get(way, save)(here / "base", tensors)
    updates = save_adapter(here / "lora", 1, TARGETS)
    run(COPY % "base+lora")
    out = tensors_of(here / "out")
    assert out.keys() == tensors.keys()
    for name, tensor in out.items():
        exact = tensors[name].double() + updates.get(name, 0)
        assert torch.equal(tensor, exact.to(dtype)), name
        assert (name in updates) != torch.equal(tensor, tensors[name])


def test_an_adapter_beside_a_plain_model(here):
    """The task vector of the adapter is its update, whatever the other model does."""
    base, other = llama_tensors(0, torch.bfloat16), llama_tensors(2, torch.bfloat16)
    save_sharded(here / "base", base, 3, config={"dtype": "bfloat16"})
    save(here / "other", other, {"dtype": "bfloat16"})
    updates = save_adapter(here / "lora", 1, TARGETS)
    run(
        "merge_method: task_arithmetic\nbase_model: base\n"
        "models:\n- {model: base+lora, parameters: {weight: 0.5}}\n"
        "- {model: other, parameters: {weight: 0.25}}\n"
    )
    out = tensors_of(here / "out")
    for name, tensor in out.items():
        b = base[name].double()
        exact = b + 0.5 * updates.get(name, torch.zeros(())) + 0.25 * (other[name].double() - b)
        assert torch.equal(tensor, exact.bfloat16()), name
    report = check_account(here / "out", here / "base", here / "other")
    adapted = report["inputs"]["base+lora"]
    assert sorted(adapted["used"]) == sorted(base) and not adapted["dropped"]
    stored = load_file(here / "lora/adapter_model.safetensors")
    assert adapted["adapter"] == {n: n.split(".lora_")[0][17:] + ".weight" for n in stored}


def test_an_adapter_on_fp8(here):
    base = fp8_model(here / "base", 0, block=(7, 5), names=[GATE], **BLOCKS)
    updates = save_adapter(here / "lora", 1, {GATE.removesuffix(".weight"): (24, 16)})
    run(COPY % "base+lora" + "dtype: float32\n")
    # Both sums are rounded: code times scale, then plus the update.
    exact = (base[GATE].double() + updates[GATE]).float()
    assert torch.equal(tensors_of(here / "out")[GATE], exact)


# Dtypes


def test_a_buffer_that_is_float32_everywhere_stays_so(here):
    """Routers' corrections and the like: no dtype asked, none imposed; one asked, all cast."""
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    tensors = [llama_tensors(s, torch.bfloat16) | {bias: torch.rand(4)} for s in range(2)]
    for name, t in zip("ab", tensors, strict=True):
        save(here / name, t, {"dtype": "bfloat16"})
    run(LINEAR)
    out = tensors_of(here / "out")
    assert torch.equal(out[bias], mean(*(t[bias] for t in tensors)))
    assert {t.dtype for n, t in out.items() if n != bias} == {torch.bfloat16}
    assert json.loads((here / "out/config.json").read_text())["dtype"] == "bfloat16"
    for key in ("dtype", "out_dtype"):
        run(LINEAR + f"{key}: bfloat16\n", key)
        assert {t.dtype for t in tensors_of(here / key).values()} == {torch.bfloat16}


def test_dtype_and_out_dtype(here):
    """Whatever dtype is, float32 is computed in; out_dtype is what is stored and what config says.

    In float64 a sum may differ from float32's.
    """
    a, b = ({n: torch.randn(t.shape) for n, t in llama_tensors(s).items()} for s in range(2))
    save(here / "a", a)
    save(here / "b", b)
    weights = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n"
    weights += "- {model: b, parameters: {weight: 0.7}}\n"
    run(weights + "dtype: float64\nout_dtype: float16\n")
    run(weights + "dtype: float16\nout_dtype: float32\n", "single")
    run(weights, "plain")
    for name, tensor in tensors_of(here / "out").items():
        exact = (0.3 * a[name].double() + 0.7 * b[name].double()) / (0.3 + 0.7)
        assert torch.equal(tensor, exact.half()), name
    assert json.loads((here / "out/config.json").read_text())["dtype"] == "float16"
    single, plain = tensors_of(here / "single"), tensors_of(here / "plain")
    assert all(torch.equal(single[n], plain[n]) for n in plain)


def test_the_dtype_left_out_is_the_bases(here):
    """Also of a method that does not look at the base, as config.json is the base's."""
    save(here / "base", llama_tensors(0))
    for seed, name in enumerate("ab", 1):
        save(here / name, llama_tensors(seed, torch.bfloat16), {"dtype": "bfloat16"})
    run(LINEAR + "base_model: base\n")
    assert {t.dtype for t in tensors_of(here / "out").values()} == {torch.float32}
    assert json.loads((here / "out/config.json").read_text())["dtype"] == "float32"


# Tied heads


def gemma_like(seed, **changes):
    tensors = llama_tensors(seed, head=False)
    return tensors | {k: v(tensors) for k, v in changes.items()}


def without(folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("says", [True, None], ids=["says so", "says nothing"])
def test_a_tied_model_and_one_that_carries_its_head(here, says):
    """Gemma's config.json leaves tie_word_embeddings to its default, which is to tie."""
    copy = {HEAD: lambda t: t[EMBEDDING].clone()}
    a, b = gemma_like(0), gemma_like(1, **copy)
    for name, tensors in (("a", a), ("b", b)):
        save(here / name, tensors, {"model_type": "gemma", "tie_word_embeddings": says})
        if says is None:
            without(here / name, "tie_word_embeddings")
    for text, out in ((LINEAR, "out"), (LINEAR.replace("{model: a}, ", "") + "base_model: a", "o")):
        run(text, out)
        assert HEAD not in tensors_of(here / out)
        report = check_account(here / out, here / "a", here / "b")
        assert report["inputs"]["b"]["dropped"] == {HEAD: f"it is tied to {EMBEDDING}"}
    out = tensors_of(here / "out")
    assert all(torch.equal(out[n], mean(a[n], b[n])) for n in a)


@pytest.mark.parametrize("says", [True, None], ids=["says so", "says nothing"])
def test_a_tied_model_and_one_with_a_head_of_its_own(here, says):
    a, b = gemma_like(0), gemma_like(1, **{HEAD: lambda t: t[EMBEDDING] + 1})
    save(here / "a", a, {"tie_word_embeddings": True})
    if says is None:
        without(here / "a", "tie_word_embeddings")
    save(here / "b", b)
    run(LINEAR)
    out = tensors_of(here / "out")
    assert torch.equal(out[HEAD], mean(a[EMBEDDING], b[HEAD]))
    assert torch.equal(out[EMBEDDING], mean(a[EMBEDDING], b[EMBEDDING]))
    assert json.loads((here / "out/config.json").read_text())["tie_word_embeddings"] is False


# What is not a number


def spoilt(value, dtype=torch.float32):
    tensors = llama_tensors(1, dtype)
    tensors[GATE][3, 5] = value
    return tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", names())
def test_what_is_not_finite_is_named(here, method, value):
    """By every method, also those that look at whole tensors or models first."""
    for name, tensors in (
        ("base", llama_tensors(0)),
        ("a", spoilt(value)),
        ("b", llama_tensors(2)),
    ):
        save(here / name, tensors)
    spec = spec_of(here, method)
    message = rf"a: tensor '{GATE}' holds {value} at \[3, 5\]; mend the model, or let it through"
    with pytest.raises(CheckpointError, match=message):
        merge(spec, here / "out")
    assert not (here / "out").exists() and not (here / ".out.partial").exists()
    merge(spec, here / "out", execution=Execution(allow_nonfinite=True))
    if method in ("linear", "passthrough", "task_arithmetic"):
        out = tensors_of(here / "out")
        assert [n for n, t in out.items() if not t.isfinite().all()] == [GATE]
        assert (~out[GATE].isfinite()).nonzero().tolist() == [[3, 5]]


def test_the_command_line_lets_it_through(here, capsys):
    save(here / "a", spoilt(math.nan))
    (here / "r.yaml").write_text(COPY % "a")
    plain = ["merge", "r.yaml", "out", "-q", "--no-model-check"]
    assert main(plain) == 2
    assert f"a: tensor '{GATE}' holds nan at [3, 5]" in capsys.readouterr().err
    assert main([*plain, "--allow-nonfinite"]) == 0


def test_what_float16_cannot_hold_is_refused(here):
    save(here / "a", spoilt(70000.0, torch.bfloat16), {"dtype": "bfloat16"})
    message = rf"merged tensor '{GATE}' would hold inf at \[3, 5\]: too large for float16"
    with pytest.raises(CheckpointError, match=message):
        run(COPY % "a" + "out_dtype: float16\n")
    run(COPY % "a")
    assert tensors_of(here / "out")[GATE][3, 5] == torch.tensor(70000.0).bfloat16()


# Odd tensors


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_numbers_without_shape_empty_tensors_and_counters(here, dtype):
    odd = {
        "model.scale": torch.tensor(0.75),
        "model.none": torch.empty(0, 5),
        "model.no_columns": torch.empty(4, 0),
        "model.position_ids": torch.arange(7)[None],
        "model.mask": torch.tensor([True, False]),
        "model.steps": torch.tensor(3, dtype=torch.int32),
    }
    a, b = ({**llama_tensors(s), **odd} for s in range(2))
    b["model.scale"] = torch.tensor(0.25)
    save(here / "a", a)
    save(here / "b", b)
    run(LINEAR + (f"dtype: {dtype}\n" if dtype else ""))
    out = tensors_of(here / "out")
    assert out["model.scale"] == 0.5 and out["model.scale"].shape == ()
    for name in ("model.none", "model.no_columns"):
        assert out[name].shape == odd[name].shape
        assert out[name].dtype == (torch.bfloat16 if dtype else torch.float32)
    for name in ("model.position_ids", "model.mask", "model.steps"):
        assert torch.equal(out[name], odd[name]) and out[name].dtype == odd[name].dtype
    report = check_account(here / "out", here / "a", here / "b")
    assert report["tensors"]["model.mask"]["action"] == "copied"


def test_a_model_without_tensors_is_refused(here):
    for name in "ab":
        save(here / name, {})
    with pytest.raises(CheckpointError, match=r"^a has no tensors$"):
        run(LINEAR)


def test_a_bad_number_without_shape_is_named(here):
    save(here / "a", llama_tensors(0) | {"model.scale": torch.tensor(math.nan)})
    with pytest.raises(CheckpointError, match=r"a: tensor 'model.scale' holds nan at \[\]"):
        run(COPY % "a")


def test_leftovers_are_an_error_unless_allowed(here, capsys):
    save(here / "a", llama_tensors(0))
    extra = {"model.layers.0.extra.weight": torch.ones(2), "value_head.weight": torch.ones(2)}
    save(here / "b", llama_tensors(1) | extra)
    with pytest.raises(
        CheckpointError,
        match=r"^b: tensor 'model.layers.0.extra.weight' and 1 more would not get into the result",
    ):
        run(LINEAR)
    plain = ["merge", "r.yaml", "out", "-q", "--no-model-check"]
    assert main([*plain, "--allow-leftover", "*.extra.*"]) == 2
    assert "b: tensor 'value_head.weight' would not get into" in capsys.readouterr().err
    assert main([*plain, "--allow-leftover", "*.extra.*", "--allow-leftover", "value_head.*"]) == 0
    report = check_account(here / "out", here / "a", here / "b")
    assert report["inputs"]["b"]["dropped"] == dict.fromkeys(extra, "allowed to stay out")
    run(LINEAR, "also", allow=Allowances(leftovers=["*"]))


# Architectures, as transformers writes and loads them


def transformers_model(folder, kind, seed, *, dtype=torch.float32, scale=0.5, save=True, **changes):
    """Save a small model of a kind with random weights everywhere, also in norms and biases."""
    import transformers

    shared = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if kind == "GPT2LMHeadModel":
        shared = {"n_head": 4, "bos_token_id": 2, "eos_token_id": 1}
    family = kind.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config = getattr(transformers, f"{family}Config")(**{**shared, **KINDS[kind], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=scale / tensor.shape[-1] ** 0.5)
    if save:
        model.save_pretrained(folder)
    return model.eval()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "GemmaForCausalLM": {"num_key_value_heads": 1},
    "Gemma2ForCausalLM": {},
    "GPT2LMHeadModel": {"n_positions": 16, "vocab_size": 64, "n_embd": 32, "n_layer": 2},
    "Qwen3MoeForCausalLM": EXPERTS,
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "DeepseekV3ForCausalLM": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def load(folder):
    """Load a result, with no key too many, too few or of another shape."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[what], (what, report[what])
    return model.eval()


def state(model):
    return {name: t for name, t in model.state_dict().items()}


def problems(folder):
    source = CheckpointSource(folder)
    return problems_of(source.config, {n: source.info(n).shape for n in source.names})


def generates(model):
    ids = torch.tensor([[3, 4, 5]])
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_a_kind_merge_and_load(here, kind):
    """The loaded result's weights are the mean of the loaded models', as torch computes it."""
    a, b = (transformers_model(here / n, kind, s) for s, n in enumerate("ab"))
    run(LINEAR)
    out = load(here / "out")
    states = [state(model) for model in (a, b, out)]
    assert states[0].keys() == states[2].keys()
    for name, tensor in states[2].items():
        assert torch.equal(tensor, mean(states[0][name], states[1][name])), name
    assert problems(here / "out") == []
    check_account(here / "out", here / "a", here / "b")
    generates(out)


@pytest.mark.slow
def test_deepseek_keeps_its_float32_corrections(here):
    """Released models are bfloat16 apart from the router's corrections, whose low bits matter."""
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    models = []
    for seed, name in enumerate("ab"):
        model = transformers_model(here / name, "DeepseekV3ForCausalLM", seed, dtype=torch.bfloat16)
        tensors = tensors_of(here / name)
        tensors[bias] = torch.rand(4)
        safetensors.torch.save_file(tensors, here / name / "model.safetensors", {"format": "pt"})
        models.append((model, tensors[bias]))
    run(LINEAR)
    out = tensors_of(here / "out")
    assert torch.equal(out[bias], mean(models[0][1], models[1][1]))
    assert {t.dtype for n, t in out.items() if n != bias} == {torch.bfloat16}
    assert load(here / "out").dtype == torch.bfloat16
    run(LINEAR + "dtype: bfloat16\n", "cast")
    assert tensors_of(here / "cast")[bias].dtype == torch.bfloat16


@pytest.mark.slow
def test_gpt2_as_it_was_released(here):
    """Names without what transformers puts before them, masks among the tensors, a tied head."""
    models = []
    for seed, name in enumerate("ab"):
        models.append(transformers_model(here / name, "GPT2LMHeadModel", seed))
        tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(here / name).items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        safetensors.torch.save_file(tensors | masks, here / name / SINGLE, {"format": "pt"})
    run(LINEAR)
    assert problems(here / "out") == []
    out = load(here / "out")
    a, b = map(state, models)
    assert all(torch.equal(t, mean(a[n], b[n])) for n, t in state(out).items())
    generates(out)
    run(SLICES, "stacked")
    assert problems(here / "stacked") == [] and load(here / "stacked").config.n_layer == 5


@pytest.mark.slow
def test_layers_beyond_the_last_do_not_keep_a_model_from_loading(here):
    for seed, name in enumerate("ab"):
        transformers_model(here / name, "DeepseekV3ForCausalLM", seed)
        tensors = tensors_of(here / name)
        last = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.")}
        tensors |= {n.replace("layers.2.", "layers.3."): t.clone() for n, t in last.items()}
        config = json.loads((here / name / "config.json").read_text())
        save(here / name, tensors, {**config, "num_nextn_predict_layers": 1})
    run(LINEAR)
    assert any(n.startswith("model.layers.3.") for n in tensors_of(here / "out"))
    assert problems(here / "out") == []
    config = json.loads((here / "out/config.json").read_text())
    del config["num_nextn_predict_layers"]
    (here / "out/config.json").write_text(json.dumps(config))
    (problem,) = problems(here / "out")
    assert problem.startswith("it would not know model.layers.3.")


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("both", [True, False], ids=["in both", "in one"])
def test_layers_that_predict_further_tokens(here, first, both):
    """As DeepSeek releases them, after the layers proper; transformers drops them on saving."""
    models = {name: llama_tensors(seed, layers=3) for seed, name in enumerate("ab")}
    further = {name for name in models["a"] if name.startswith("model.layers.2.")}
    if not both:
        models["b"] = {n: t for n, t in models["b"].items() if n not in further}
    for name, tensors in models.items():
        save(here / name, tensors, {"num_nextn_predict_layers": 1})
    turned = LINEAR.replace("{model: a}, {model: b}", "{model: b}, {model: a}")
    run(LINEAR if first == "a" else turned)
    out = tensors_of(here / "out")
    config = json.loads((here / "out/config.json").read_text())
    assert out.keys() == models["b"].keys() and config["num_hidden_layers"] == 2
    assert config["num_nextn_predict_layers"] == int(both)
    assert all(torch.equal(out[n], mean(models["a"][n], models["b"][n])) for n in out)
    report = check_account(here / "out", here / "a", here / "b")
    reason = "it comes after the layers proper, not in all models"
    dropped = {} if both else dict.fromkeys(further, reason)
    assert report["inputs"]["a"]["dropped"] == dropped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_one_by_one_and_fused(here, kind):
    """Either way merges, and to the same model; both at once are refused."""
    for seed, name in enumerate("ab"):
        model = transformers_model(here / name, kind, seed)
        model.save_pretrained(here / f"{name}-fused", save_original_format=False)
    run(LINEAR)
    run(LINEAR.replace("a}", "a-fused}").replace("b}", "b-fused}"), "fused")
    names = [set(CheckpointSource(here / n).names) for n in ("out", "fused")]
    assert any(".experts.0." in n for n in names[0])
    assert any("experts.gate_up_proj" in n for n in names[1])
    one, other = state(load(here / "out")), state(load(here / "fused"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert problems(here / "fused") == []
    for text, message in (
        (LINEAR.replace("b}", "b-fused}"), "a stores experts one by one, b-fused fused"),
        (LINEAR.replace("a}", "a-fused}"), "a-fused stores experts fused, b one by one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(text, "mixed")


SLICES = """\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 2]}]
- sources: [{model: b, layer_range: [0, 2]}]
"""
GRADIENT = """\
merge_method: slerp
base_model: a
slices:
- sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
parameters: {t: [{filter: mlp, value: [0, 0.6, 1]}, {value: 0.5}]}
"""


@pytest.mark.slow
def test_stacked_slices_load_and_run(here):
    a, b = (transformers_model(here / n, "Qwen2ForCausalLM", s) for s, n in enumerate("ab"))
    run(SLICES)
    out = load(here / "out")
    layers = [*a.model.layers, b.model.layers[1], *b.model.layers]
    assert out.config.num_hidden_layers == len(out.model.layers) == 5
    for layer, original in zip(out.model.layers, layers, strict=True):
        expected = original.state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in layer.state_dict().items())
    assert torch.equal(out.lm_head.weight, b.lm_head.weight)
    assert problems(here / "out") == []
    check_account(here / "out", here / "a", here / "b")
    generates(out)


@pytest.mark.slow
def test_a_gradient_over_layers(here):
    """Between anchors 0, 0.6 and 1 lie 0.4 and 0.7333 for the middle two of four layers."""
    options = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    a, b = (
        transformers_model(here / n, "LlamaForCausalLM", s, **options) for s, n in enumerate("ab")
    )
    run(GRADIENT)
    out = load(here / "out")
    for i, t in enumerate((0, 0.4, 0.6 + 0.4 / 3, 1)):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        x, y, z = (m.state_dict()[name].double() for m in (a, b, out))
        cosine = (x * y).sum() / x.norm() / y.norm()
        angle = torch.arccos(cosine)
        exact = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
        assert (z - exact).abs().max() <= 2**-22 * exact.abs().max(), i
        if t in (0, 1):
            assert torch.equal(z, (x, y)[t])
    generates(out)


@pytest.mark.slow
def test_modules_of_a_vision_model(here):
    """Text and projector averaged, of different models; the vision tower of a third."""
    import transformers

    models = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        text = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        vision = transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=5
        )
        models[name] = transformers.LlavaForConditionalGeneration(config)
        models[name].save_pretrained(here / name)
        config = json.loads((here / name / "config.json").read_text())
        config["text_config"]["dtype"] = "float32"  # as older files have it
        (here / name / "config.json").write_text(json.dumps(config))
    run(
        "merge_method: linear\nmodules:\n"
        "  text_decoder: {models: [{model: a}, {model: b}], parameters: {weight: 0.5}}\n"
        "  vision_tower: {models: [{model: base}], parameters: {weight: 1}}\n"
        "  multi_modal_projector:\n"
        "    {models: [{model: a}, {model: base}], parameters: {weight: 0.5}}\n"
        "dtype: bfloat16\n"
    )
    out = load(here / "out")
    base, a, b = (state(models[n]) for n in ("base", "a", "b"))
    counts = dict.fromkeys(("vision", "projector", "text"), 0)
    for name, tensor in state(out).items():
        if tensor.dtype == torch.int64:
            continue
        if "vision_tower" in name:
            counts["vision"] += 1
            expected = base[name].bfloat16()
        elif "projector" in name:
            counts["projector"] += 1
            expected = mean(a[name], base[name], torch.bfloat16)
        else:
            counts["text"] += 1
            expected = mean(a[name], b[name], torch.bfloat16)
        assert torch.equal(tensor, expected), name
    assert all(counts.values())
    assert problems(here / "out") == []
    config = json.loads((here / "out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    report = check_account(here / "out", here / "base", here / "a", here / "b")
    reasons = set(report["inputs"]["b"]["dropped"].values())
    assert reasons == {
        "module vision_tower takes nothing from this model",
        "module multi_modal_projector takes nothing from this model",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Gemma3", "PaliGemma"])
def test_vision_models_with_a_tied_head(here, kind):
    """On disk all of the text's names begin with language_model, so the head's would too."""
    import transformers

    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4}
    text = {**shared, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"pad_token_id": 0, "model_type": "gemma3_text" if kind == "Gemma3" else "gemma"}
    vision = {**shared, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
    more = {"mm_tokens_per_image": 4} if kind == "Gemma3" else {"projection_dim": 32}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**vision, "projection_dim": 32}, **more
    )
    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        models.append(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
        models[-1].save_pretrained(here / name)
    run(LINEAR)
    assert problems(here / "out") == []
    a, b = map(state, models)
    out = state(load(here / "out"))
    floating = [n for n in out if out[n].is_floating_point()]
    assert all(torch.equal(out[n], mean(a[n], b[n])) for n in floating)
    assert not any("lm_head" in n for n in tensors_of(here / "out"))


# Every method


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "a", "b")):
        transformers_model(folder / name, "LlamaForCausalLM", seed, dtype=torch.bfloat16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", names())
def test_results_of_every_method_load(llamas, here, method):
    count = get(method).num_models[1] or 2
    models = [llamas / "a", llamas / "b"][:count]
    spec = MergeSpec.of_models(method, models, llamas / "base", PARAMETERS[method])
    if get(method).statistics is not None:
        for name in ("base", "a", "b"):
            os.symlink(llamas / name, here / name)
        spec = with_statistics(spec_of(here, method), here)
    merge(spec, here / "out")
    model = load(here / "out")
    assert model.dtype == torch.bfloat16 and problems(here / "out") == []
    assert all(t.isfinite().all() for t in state(model).values())
    generates(model)


@pytest.mark.parametrize("method", names())
def test_every_method_takes_odd_tensors(here, method):
    """None at all, one without a shape, one of a single element, and rows without columns."""
    shapes = {"none": (0, 5), "columns": (4, 0), "scalar": (), "one": (1,)}
    if method != "regmean":  # its statistics are matrices of inputs
        shapes["cube"] = (2, 3, 4)
    for seed, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(seed)
        odd = {f"model.{n}": torch.randn(shape, generator=g) for n, shape in shapes.items()}
        save(here / name, llama_tensors(seed) | odd)
    spec = spec_of(here, method)
    merge(spec, here / "out")
    out = tensors_of(here / "out")
    assert {n: tuple(out[f"model.{n}"].shape) for n in shapes} == shapes


# Would it load?


@pytest.mark.slow
def test_the_command_line_asks_whether_it_would_load(here, capsys):
    for seed, name in enumerate("ab"):
        transformers_model(here / name, "LlamaForCausalLM", seed)
    config = json.loads((here / "a/config.json").read_text())
    (here / "a/config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    (here / "r.yaml").write_text(LINEAR)
    assert main(["merge", "r.yaml", "out", "-q"]) == 2
    error = capsys.readouterr().err
    assert "transformers would not load the result as LlamaForCausalLM: of another shape:" in error
    assert "model.layers.0.mlp.down_proj.weight is [32, 48], expected [32, 40]" in error
    assert not (here / "out").exists() and (here / ".out.partial").exists()
    assert main(["merge", "r.yaml", "out", "-q", "--no-model-check", "--resume"]) == 0


# Vocabularies


def with_tokenizer(folder, tokenizer, seed, *, rows=None, **changes):
    rows = rows or len(tokenizer.get_vocab())
    transformers_model(folder, "LlamaForCausalLM", seed, vocab_size=rows, **changes)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_union_of_two_tokenizers(here, tied):
    """Shared tokens get the mean of both rows; a token of one model gets that model's row."""
    import transformers

    a = with_tokenizer(here / "a", byte_bpe(FOX, 275), 0, tie_word_embeddings=tied)
    b = with_tokenizer(here / "b", byte_bpe(LOREM, 285), 1, tie_word_embeddings=tied, rows=290)
    run(LINEAR + "tokenizer: {source: union}\nbase_model: a\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "out")
    ids = tokenizer.get_vocab()
    assert ids.keys() == a.keys() | b.keys() and len(a.keys() ^ b.keys()) > 4
    model = load(here / "out")
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert max(ids.values()) < model.config.vocab_size
    for name in [EMBEDDING] if tied else [EMBEDDING, HEAD]:
        rows, ours, theirs = (tensors_of(here / f)[name] for f in ("out", "a", "b"))
        for token, i in ids.items():
            x = ours[a[token]] if token in a else theirs[b[token]]
            y = theirs[b[token]] if token in b else ours[a[token]]
            assert torch.equal(rows[i], mean(x, y)), token
    assert problems(here / "out") == []
    text = "the quick brown fox"
    assert tokenizer(text)["input_ids"] == [
        ids[t] for t in transformers.AutoTokenizer.from_pretrained(here / "a").tokenize(text)
    ]
    generates(model)


@pytest.mark.slow
def test_the_bases_tokenizer_and_rows_beyond_it(here):
    """The base has 6 rows without a token, a model 4 tokens more: these go, those stay."""
    vocabulary = with_tokenizer(here / "base", byte_bpe(FOX, 270), 0, rows=276)
    more = added(byte_bpe(FOX, 270), "<x>", "<y>")
    theirs = with_tokenizer(here / "a", more, 1)
    run(TASK.replace("0.5", "1") + "tokenizer: {source: base}\n")
    out, base, a = (tensors_of(here / n)[EMBEDDING] for n in ("out", "base", "a"))
    assert len(out) == 276 and theirs.keys() - vocabulary.keys() == {"<x>", "<y>"}
    for token, i in vocabulary.items():
        assert torch.equal(out[i], base[i] + (a[theirs[token]] - base[i])), token
    assert torch.equal(out[270:], base[270:])
    assert load(here / "out").config.vocab_size == 276
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (here / "out" / file).read_bytes() == (here / "base" / file).read_bytes()


@pytest.mark.slow
def test_embeddings_cut_to_the_smallest(here, capsys):
    models = {}
    for seed, (name, rows) in enumerate((("a", 70), ("b", 64))):
        models[name] = transformers_model(here / name, "LlamaForCausalLM", seed, vocab_size=rows)
    (here / "r.yaml").write_text(LINEAR)
    plain = ["merge", "r.yaml", "out", "-q", "--no-model-check"]
    assert main(plain) == 2
    assert "give the recipe a tokenizer (source: union or base)" in capsys.readouterr().err
    assert main([*plain, "--unsafe-truncate-embeddings"]) == 0
    out = load(here / "out")
    assert out.config.vocab_size == 64
    a, b = (state(m) for m in models.values())
    for name in (EMBEDDING, HEAD):
        assert torch.equal(state(out)[name], mean(a[name][:64], b[name]))


def test_a_heads_bias_follows_its_vocabulary(here):
    """Phi's head has a bias, a number for each token: it moves with the rows."""
    bias = "lm_head.bias"
    vocabularies = []
    for seed, (name, special) in enumerate((("a", ("<s>", "</s>")), ("b", ("</s>", "<s>")))):
        tokenizer = byte_bpe(FOX, 270, special)
        tensors = llama_tensors(seed, vocab=270) | {bias: torch.randn(270)}
        save(here / name, tensors, {"vocab_size": 270})
        tokenizer.save(str(here / name / "tokenizer.json"))
        vocabularies.append((tokenizer.get_vocab(), tensors))
    run(LINEAR + "base_model: a\ntokenizer: {source: base}\n")
    out = tensors_of(here / "out")
    (ours, a), (theirs, b) = vocabularies
    assert ours["<s>"] != theirs["<s>"]
    for name in (EMBEDDING, HEAD, bias):
        for token, i in ours.items():
            assert torch.equal(out[name][i], mean(a[name][i], b[name][theirs[token]])), name


NAMES = {
    "llava": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "internlm2": ("model.tok_embeddings.weight", "output.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_vocabularies_of_models_that_name_rows_otherwise(here, kind):
    """A tied model and one with a head, in different orders of tokens."""
    embedding, head = NAMES[kind]
    vocabularies = []
    for name, special in (("a", ("<s>", "</s>")), ("b", ("</s>", "<s>"))):
        tokenizer = byte_bpe(FOX, 265, special)
        tensors = {embedding: torch.randn(265, 8), "model.layers.0.w.weight": torch.randn(8, 8)}
        config = {"model_type": kind, "vocab_size": 265}
        if kind == "llava":
            config = {"text_config": {"vocab_size": 265, "tie_word_embeddings": name == "a"}}
        if name == "b":
            tensors[head] = torch.randn(265, 8)
        save(here / name, tensors, {**config, "tie_word_embeddings": name == "a"})
        if kind == "llava":
            without(here / name, "tie_word_embeddings")
        tokenizer.save(str(here / name / "tokenizer.json"))
        vocabularies.append((tokenizer.get_vocab(), tensors))
    run(LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 8}\nbase_model: a\n")
    out = tensors_of(here / "out")
    (ours, a), (theirs, b) = vocabularies
    for token, i in ours.items():
        assert torch.equal(out[embedding][i], mean(a[embedding][i], b[embedding][theirs[token]]))
        assert torch.equal(out[head][i], mean(a[embedding][i], b[head][theirs[token]]))
    assert len(out[embedding]) == len(out[head]) == 272
    config = json.loads((here / "out/config.json").read_text())
    part = config["text_config"] if kind == "llava" else config
    assert part["vocab_size"] == 272 and part["tie_word_embeddings"] is False


def test_vocabularies_are_not_touched_where_no_telling_what_has_rows(here):
    for name in "ab":
        tensors = llama_tensors(0) | {"model.embed_tokens_per_layer.weight": torch.randn(40, 4)}
        save(here / name, tensors)
        byte_bpe(FOX, 265).save(str(here / name / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="a: found no embedding; vocabularies can only be"):
        run(LINEAR + "tokenizer: {source: union}\n")
    run(LINEAR)


def test_an_adapter_with_tokens_of_its_own(here):
    """PEFT saves the embedding whole when it was resized; its rows belong to its tokenizer."""
    tokenizer = byte_bpe(FOX, 265)
    save(here / "base", llama_tensors(0, vocab=265), {"vocab_size": 265})
    tokenizer.save(str(here / "base/tokenizer.json"))
    save(here / "b", llama_tensors(1, vocab=265), {"vocab_size": 265})
    tokenizer.save(str(here / "b/tokenizer.json"))
    updates = save_adapter(here / "lora", 1, TARGETS)
    file = here / "lora/adapter_model.safetensors"
    stored = load_file(file)
    rows = {name: torch.randn(267, 16) for name in (EMBEDDING, HEAD)}
    stored |= {f"base_model.model.{name}": tensor for name, tensor in rows.items()}
    safetensors.torch.save_file(stored, file)
    added(tokenizer, "<x>", "<y>").save(str(here / "lora/tokenizer.json"))

    run(COPY % "base+lora", "alone")
    own = (here / "lora/tokenizer.json").read_bytes()
    assert (here / "alone/tokenizer.json").read_bytes() == own
    assert json.loads((here / "alone/config.json").read_text())["vocab_size"] == 267
    assert torch.equal(tensors_of(here / "alone")[EMBEDDING], rows[EMBEDDING])

    models = "models: [{model: base+lora}, {model: b}]\n"
    run(f"merge_method: linear\n{models}parameters: {{weight: 0.5}}\ntokenizer: {{source: union}}")
    out, b = tensors_of(here / "out"), tensors_of(here / "b")
    assert (here / "out/tokenizer.json").read_bytes() == own
    for name, tensor in rows.items():
        assert torch.equal(out[name][:265], mean(tensor[:265], b[name]))
        assert torch.equal(out[name][265:], tensor[265:])  # b lacks them, and takes the other's
    name = next(iter(updates))
    base = llama_tensors(0, vocab=265)[name].double() + updates[name]
    assert torch.equal(out[name], mean(base, b[name]))


# Several documents

DOCUMENTS = f"""\
merge_method: linear
models: [{{model: middle}}, {{model: c}}]
parameters: {{weight: 0.5}}
---
name: middle
{LINEAR}"""


def test_what_is_done_of_several_documents_is_not_done_again(here, monkeypatch):
    for seed, name in enumerate("abc"):
        save(here / name, llama_tensors(seed))
    run(DOCUMENTS, "whole")
    merged = []

    def merge_all(method, tensors, sink, *more, **options):
        merged.append(sink.path.name)
        if sink.path.name == "out" and merged.count("out") == 1:
            raise KeyboardInterrupt
        return original(method, tensors, sink, *more, **options)

    original = engine.merge_all
    monkeypatch.setattr(engine, "merge_all", merge_all)
    with pytest.raises(KeyboardInterrupt):
        run(DOCUMENTS)
    assert (here / ".out.documents/middle/model.safetensors").exists()
    run(DOCUMENTS, resume=True)
    assert merged == ["middle", "out", "out"]
    assert folder_bytes(here / "out") == folder_bytes(here / "whole")
    assert not (here / ".out.documents").exists()
    # Another input: the intermediate result does not count any more.
    merged.clear()
    with pytest.raises(KeyboardInterrupt):
        run(DOCUMENTS, "out", overwrite=True)
    save(here / "a", llama_tensors(7))
    run(DOCUMENTS, resume=True, overwrite=True)
    assert merged == ["middle", "out", "middle", "out"]


@pytest.mark.parametrize("method", names())
def test_a_merge_goes_on_with_other_chunks_and_threads(here, monkeypatch, method):
    for seed, name in enumerate(("base", "a", "b")):
        save(here / name, llama_tensors(seed))
    spec = spec_of(here, method)
    merge(spec, here / "whole")
    write_at, calls = CheckpointSink.write_at, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        write_at(*args)

    monkeypatch.setattr(CheckpointSink, "write_at", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(spec, here / "out", execution=Execution(chunk_elements=64, threads=2))
    execution = Execution(chunk_elements=101, threads=1)
    merge(spec, here / "out", execution=execution, resume=True)
    assert folder_bytes(here / "out") == folder_bytes(here / "whole")


def test_changed_statistics_are_another_merge(here):
    for seed, name in enumerate(("base", "a", "b")):
        save(here / name, llama_tensors(seed))
    spec = spec_of(here, "fisher")
    before = plan_merge(spec).fingerprint()
    assert plan_merge(spec).fingerprint() == before
    save(here / "b-statistics", {n: t.abs() + 1 for n, t in llama_tensors(9).items()})
    assert plan_merge(spec).fingerprint() != before
