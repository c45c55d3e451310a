import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.io import CheckpointError, CheckpointSink, CheckpointSource
from mergeme_ext.io import sink as sink_module
from mergeme_ext.merging import Execution, MergeSpec, engine, get, merge, names, plan_merge
from python_tests.support.checkpoints import llama_tensors, save
from python_tests.support.toy import make

PARAMETERS = {
    "arcee_fusion": {},
    "breadcrumbs": {"weights": [0.5, 1], "density": [0.3, 0.7], "gamma": 0.1},
    "breadcrumbs_ties": {"weights": 1, "density": 0.6, "gamma": [0, 0.2], "rescale": "l1"},
    "dare_linear": {"weights": 1, "density": 0.5, "seed": 3},
    "dare_ties": {"weights": 1, "density": [0.5, 0.9], "rescale": "inverse_prob"},
    "della": {"weights": [0.5, 1], "density": 0.5, "epsilon": [0.1, 0.2]},
    "della_linear": {"weights": 1, "density": 0.4, "rescale": "inverse_prob"},
    "emr_merging": {},
    "fisher": {"normalize": False},
    "karcher": {"weights": [0.5, 1]},
    "linear": {"weights": [0.5, 1]},
    "model_stock": {"filter_wise": True},
    "multislerp": {"weights": [0.5, 1]},
    "nearswap": {"t": 0.1},
    "nuslerp": {"weights": [0.5, 1], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "passthrough": {"scale": 0.5},
    "pcb_merging": {"density": 0.3, "clip": 0.01, "scope": "tensor"},
    "ram": {},
    "ramplus_tl": {},
    "regmean": {},
    "sce": {"select_topk": 0.6},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weights": [0.5, -1], "lam": 0.7},
    "ties": {"weights": [0.5, 1], "density": [0.3, 0.7], "rescale": "l2"},
}


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed), tokenizer="{}", generation_config='{"x": 1}')
    return tmp_path


def spec_of(folder, method="ties", **more):
    options = {"parameters": PARAMETERS[method], "base": folder / "base", **more}
    models = [folder / "a", folder / "b"][: get(method).num_models[1]]
    spec = MergeSpec.of_models(method, models, **options)
    return spec if get(method).statistics is None else with_statistics(spec, folder)


def with_statistics(spec, folder):
    """Give both models statistics: Fisher's diagonals, or matrices for the weights."""
    for seed, name in enumerate(("a", "b")):
        tensors = CheckpointSource(folder / name)
        values = {n: statistic(spec.method, seed, tensors.tensor(n)) for n in tensors.names}
        save(folder / f"{name}-statistics", {n: v for n, v in values.items() if v is not None})
    (module,) = spec.modules
    (piece,) = module.slices
    sources = [
        replace(s, statistics=s.model.path.with_name(s.model.path.name + "-statistics"))
        for s in piece.sources
    ]
    piece = replace(piece, sources=tuple(sources))
    return replace(spec, modules=(replace(module, slices=(piece,)),))


def statistic(method, seed, weight):
    g = torch.Generator().manual_seed(seed)
    if method == "fisher":
        return torch.rand(weight.shape, generator=g)
    if weight.dim() < 2:
        return None
    x = torch.rand(50, weight.shape[1], generator=g)
    return x.T @ x / 50


def folder_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_method_has_parameters_here():
    assert sorted(PARAMETERS) == names()


@pytest.mark.parametrize("method", names())
def test_merges_each_tensor_as_the_method_does(models, method):
    merge(spec_of(models, method), models / "out")
    base, a, b, out = (CheckpointSource(models / n) for n in ("base", "a", "b", "out"))
    assert out.names == base.names
    for name in base.names:
        tensors = [a.tensor(name), b.tensor(name)][: get(method).num_models[1]]
        named = {"tensor_name": name}
        if get(method).statistics is not None:
            folders = [CheckpointSource(models / f"{n}-statistics") for n in "ab"]
            named["statistics"] = [f.tensor(name) if name in f else None for f in folders]
        expected = get(method)(base.tensor(name), tensors, **PARAMETERS[method], **named)
        assert torch.equal(out.tensor(name), expected), name


@pytest.mark.parametrize("method", names())
def test_no_bit_depends_on_chunk_or_threads(models, method):
    merge(spec_of(models, method), models / "out")
    for chunk, threads in ((7, 1), (64, 3), (10**9, 1)):
        execution = Execution(threads=threads, chunk_elements=chunk)
        merge(spec_of(models, method), models / f"out{chunk}", execution=execution)
        assert folder_bytes(models / f"out{chunk}") == folder_bytes(models / "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", names())
def test_a_gpu_writes_the_bytes_of_the_cpu(models, method):
    merge(spec_of(models, method), models / "out")
    execution = Execution(threads=3, chunk_elements=100, device="cuda")
    merge(spec_of(models, method), models / "cuda", execution=execution)
    assert folder_bytes(models / "cuda") == folder_bytes(models / "out")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_computed_inputs_share_the_memory(threads):
    """However many models have to be computed, as FP8 ones are, all threads' fit into half."""
    execution = Execution(threads=threads, max_memory=2**30)
    for count in (1, 2, 3, 9, 40):
        held = threads * count * execution.layout_bytes(count)
        assert 2**27 < held <= 2**29


def test_statistics_of_other_models_are_noticed(models):
    spec = spec_of(models, "fisher")
    folder = models / "b-statistics"
    save(folder, {"elsewhere": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"b-statistics: holds no .*; its first is elsewhere"):
        plan_merge(spec)


def test_devices_that_are_not_there(models):
    for device in ("gpu", "meta", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device.*'{device}'"):
            merge(spec_of(models), models / "out", execution=Execution(device=device))
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base"]


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(sorted(PARAMETERS.keys() - {"fisher", "regmean"})),
    chunk=st.integers(1, 300),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 4),
)
def test_mixed_dtypes_merge_as_if_widened_first(tmp_path_factory, method, chunk, dtypes):
    folder = tmp_path_factory.mktemp("mixed")
    *inputs, out = dtypes
    base, tuned = make(torch.float64, shape=(11, 19), models=2)
    stored = [t.to(d) for t, d in zip([base, *tuned], inputs, strict=True)]
    for kind in ("stored", "wide"):
        for name, tensor in zip(("base", "a", "b"), stored, strict=True):
            save(folder / kind / name, {"n": tensor if kind == "stored" else tensor.float()})
        merge(
            spec_of(folder / kind, method, dtype=out),
            folder / kind / "out",
            execution=Execution(chunk_elements=chunk if kind == "stored" else None),
        )
    got, expected = (CheckpointSource(folder / k / "out").tensor("n") for k in ("stored", "wide"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_dtype_is_rounded_once(models, dtype):
    merge(spec_of(models, "ties"), models / "single")
    merge(spec_of(models, "ties", dtype=dtype), models / "other")
    single, other = CheckpointSource(models / "single"), CheckpointSource(models / "other")
    assert other.config["dtype"] == str(dtype).removeprefix("torch.")
    for name in single.names:
        assert torch.equal(other.tensor(name), single.tensor(name).to(dtype))


def test_float64_merges_in_float64(models):
    merge(spec_of(models, dtype=torch.float64), models / "out")
    base, a, b, out = (CheckpointSource(models / n) for n in ("base", "a", "b", "out"))
    for name in base.names:
        wide = [s.tensor(name).double() for s in (base, a, b)]
        assert torch.equal(out.tensor(name), get("ties")(wide[0], wide[1:], **PARAMETERS["ties"]))


def test_writes_what_belongs_to_a_model(models):
    (models / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1, density: 0.5, lambda: 1/n}\n"
    )
    merge(models / "r.yaml", models / "out", max_shard_size="6KB")
    files = {p.name for p in (models / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "mergeme_config.yml",
        "model.safetensors.index.json",
    } <= files
    card = (models / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["merge", "mergeme"] and "base_model" not in front
    assert "lambda: 1/n" in card and "`base` (base)" in card and "2306.01708" in card
    for text in (card, (models / "out/mergeme_config.yml").read_text()):
        assert str(models) not in text and "/" not in text.replace("1/n", "").replace("---/", "")
    recipe = yaml.safe_load((models / "out/mergeme_config.yml").read_text())
    assert recipe["base_model"] == "base" and recipe["models"][1]["model"] == "b"
    assert json.loads((models / "out/config.json").read_text())["dtype"] == "float32"


def test_card_names_hub_models(tmp_path):
    hub = tmp_path / "models--owner--tuned" / "snapshots" / "abc"
    save(hub, llama_tensors(1))
    save(tmp_path / "base", llama_tensors(0))
    merge(
        MergeSpec.of_models("ties", [hub], tmp_path / "base", {"weights": 1}),
        tmp_path / "out",
    )
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert front["base_model"] == ["owner/tuned"] and front["base_model_relation"] == "merge"


def test_progress_counts_every_byte(models):
    class Bar:
        total = done = 0
        closed = False

        def update(self, n):
            self.done += n

        def close(self):
            self.closed = True

    bar = Bar()

    def start(total):
        bar.total = total
        return bar

    merge(spec_of(models), models / "out", execution=Execution(chunk_elements=50), progress=start)
    assert bar.done == bar.total == plan_merge(spec_of(models)).total_bytes and bar.closed


def test_tied_heads(tmp_path):
    tied = {"tie_word_embeddings": True}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def model(name, seed, config=None, **changes):
        tensors = llama_tensors(seed, head=False)
        return save(tmp_path / name, tensors | {k: v(tensors) for k, v in changes.items()}, config)

    both = {head: lambda t: t[embedding].clone()}
    model("base", 0, tied)
    model("a", 1, tied, **both)  # carries the tied head too
    model("b", 2, tied)
    merge(spec_of(tmp_path), tmp_path / "out")
    out = CheckpointSource(tmp_path / "out")
    assert head not in out and out.config["tie_word_embeddings"] is True

    model("b", 2, None, **{head: lambda t: t[embedding] + 1})
    merge(spec_of(tmp_path, "linear"), tmp_path / "untied")
    out = CheckpointSource(tmp_path / "untied")
    sources = [CheckpointSource(tmp_path / n) for n in "ab"]
    expected = get("linear")(
        None, [sources[0].tensor(embedding), sources[1].tensor(head)], **PARAMETERS["linear"]
    )
    assert torch.equal(out.tensor(head), expected)
    assert out.config["tie_word_embeddings"] is False

    model("a", 1, tied, **{head: lambda t: t[embedding] + 1})
    with pytest.raises(CheckpointError, match=r"a: config.json ties lm_head.weight to .* differ"):
        plan_merge(spec_of(tmp_path))
    model("a", 1, {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"a has no tensor 'lm_head.weight', which .*b has"):
        plan_merge(
            MergeSpec.of_models(
                "linear", [tmp_path / "b", tmp_path / "a"], base=None, parameters={"weights": 1}
            )
        )


def test_tensors_that_cannot_be_merged_are_copied(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        extra = {"steps": torch.tensor([7, 8]), "flags": torch.tensor([True, False])}
        save(tmp_path / name, llama_tensors(seed) | extra)
    merge(spec_of(tmp_path, dtype=torch.bfloat16), tmp_path / "out")
    out = CheckpointSource(tmp_path / "out")
    assert out.tensor("steps").tolist() == [7, 8] and out.tensor("flags").tolist() == [True, False]
    assert out.tensor("steps").dtype == torch.int64
    save(tmp_path / "b", llama_tensors(2) | extra | {"steps": torch.tensor([7, 9])})
    with pytest.raises(CheckpointError, match=r"'steps' \(int64, so it cannot be merged\) differs"):
        plan_merge(spec_of(tmp_path))


MISFITS = {
    "another hidden size": (
        llama_tensors(1, hidden=32),
        {},
        r"tensor 'lm_head.weight' is \[40, 16\] in .*base but \[40, 32\] in .*a$",
    ),
    "another vocabulary": (
        llama_tensors(1, vocab=44),
        {},
        r"is \[40, 16\] in .*base but \[44, 16\] in .*a; give the recipe a tokenizer",
    ),
    "another ffn": (llama_tensors(1, ffn=32), {}, r"'model.layers.0.mlp.\w+_proj.weight' is"),
    "fewer layers": (llama_tensors(1, layers=1), {}, "a has 1 layers, .*base has 2"),
    "another kind": (llama_tensors(1), {"model_type": "gpt2"}, "a is a gpt2 model, .*base a llama"),
    "missing tensor": (
        {k: v for k, v in llama_tensors(1).items() if "norm" not in k},
        {},
        r"a has no tensor 'model.layers.0.input_layernorm.weight' \(and 4 more\), which .*base has",
    ),
    "another tensor": (
        llama_tensors(1) | {"model.layers.0.mlp.gate_proj.bias": torch.ones(24)},
        {},
        r"a: tensor 'model.layers.0.mlp.gate_proj.bias' would not get into the result",
    ),
    "quantised": (
        llama_tensors(1),
        {"quantization_config": {"quant_method": "fp8"}},
        r"a: config.json says that the weights are quantised \(fp8\), but no tensor is FP8",
    ),
    "integers for floats": (
        {k: v.int() for k, v in llama_tensors(1).items()},
        {},
        "is float32 in .*base but int32 in .*a",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_refuses_models_that_do_not_fit(models, case):
    tensors, config, message = MISFITS[case]
    save(models / "a", tensors, config)
    with pytest.raises(CheckpointError, match=message):
        merge(spec_of(models), models / "out")
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base"]


def test_refuses_bad_requests(models):
    spec = spec_of(models)
    with pytest.raises(ValueError, match="is one of the inputs; choose another folder"):
        merge(spec, models / "a", overwrite=True)
    with pytest.raises(ValueError, match="expected chunk_elements of at least 1, got 0"):
        merge(spec, models / "out", execution=Execution(chunk_elements=0))
    with pytest.raises(ValueError, match="ties: expected at least one model, got none"):
        plan_merge(MergeSpec.of_models("ties", [], models / "base", {"weights": 1}))
    with pytest.raises(ValueError, match="ties: expected a base, got None"):
        plan_merge(MergeSpec.of_models("ties", [models / "a"], None, {"weights": 1}))
    with pytest.raises(ValueError, match="linear: expected weights with a sum other than 0"):
        plan_merge(MergeSpec.of_models("linear", spec.models, None, {"weights": [1, -1]}))
    with pytest.raises(TypeError, match=r"got \['densty'\]"):
        plan_merge(
            MergeSpec.of_models(
                "ties", spec.models, base=spec.base, parameters={"weights": 1, "densty": 1}
            )
        )
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_merge_goes_on(models, monkeypatch, error):
    merge(spec_of(models), models / "whole")
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 20:
            raise error
        return write_at(*args)

    write_at = CheckpointSink.write_at
    monkeypatch.setattr(CheckpointSink, "write_at", fail)
    with pytest.raises(error):
        merge(spec_of(models), models / "out", execution=Execution(chunk_elements=64))
    monkeypatch.setattr(CheckpointSink, "write_at", write_at)
    assert sorted(p.name for p in models.iterdir()) == [".out.partial", "a", "b", "base", "whole"]
    with pytest.raises(FileExistsError, match="interrupted merge into it can be continued"):
        merge(spec_of(models), models / "out")
    with pytest.raises(CheckpointError, match="has changed since"):
        merge(spec_of(models, dtype=torch.bfloat16), models / "out", resume=True)
    merge(spec_of(models), models / "out", resume=True)
    assert folder_bytes(models / "out") == folder_bytes(models / "whole")


def test_a_full_disk_is_seen_before_the_work(models, monkeypatch):
    def refuse(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sink_module.os, "posix_fallocate", refuse)
    monkeypatch.setattr(engine, "merge_all", None)  # would fail if called
    with pytest.raises(OSError, match="no room for the checkpoint"):
        merge(spec_of(models), models / "out")
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base"]


def test_a_file_size_limit_leaves_nothing(models):
    """The system's own refusal: a limit on file sizes, set for a process of its own."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from mergeme_ext.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    recipe = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    (models / "r.yaml").write_text(recipe)
    command = [sys.executable, "-c", program, "merge", str(models / "r.yaml"), str(models / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no room for the checkpoint" in done.stderr
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "r.yaml"]
