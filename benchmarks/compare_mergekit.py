"""Merges by us and by mergekit from the same recipes and checkpoints, and compares the weights.

    python -m benchmarks.compare_mergekit --mergekit VENV --models BASE ONE OTHER [--methods ties]

Needs an environment with mergekit in it (by its folder or its python) and three checkpoints of one
architecture: a base and two models tuned from it. Every recipe is merged four times, by both sides,
with ``dtype: bfloat16`` as people write it and with ``dtype: float32``, where mergekit, which
computes in that type, computes finely enough for the methods themselves to be compared; results in
float32 are rounded to bfloat16 for counting steps, as ``out_dtype: bfloat16`` does. Prints one JSON
object per recipe, and at the end a table for README.md here. Methods that draw at random are
compared by statistics. Nothing is timed.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["RECIPES", "compare", "figures", "statistics"]

# Of a tensor's largest element: where terms of either sign cancel, float32 leaves that much.
NOISE = 2**-22
DTYPES = ("bfloat16", "float32")


def _models(one=None, other=None, base=False, **rest) -> dict:
    """The part of a recipe that lists models; each with its parameters, or left out if None."""
    listed = [("ONE", one), ("OTHER", other)]
    models = [{"model": m} | ({"parameters": p} if p else {}) for m, p in listed if p is not None]
    return {"models": models} | ({"base_model": "BASE"} if base else {}) | rest


def _weighed(one=0.6, other=0.3, base=True, parameters=None, **both) -> dict:
    """Two models with weights, and what else is said of both."""
    recipe = _models({"weight": one, **both}, {"weight": other, **both}, base)
    return recipe | ({"parameters": parameters} if parameters else {})


# By method. BASE, ONE, OTHER and WIDER (OTHER with two tokens more) stand for checkpoints.
RECIPES: dict[str, dict] = {
    "linear": _weighed(base=False),
    "slerp": _models(other={}, base=True, parameters={"t": 0.4}),
    "nuslerp": _weighed(base=False),
    "nuslerp of task vectors": _weighed(),
    "nuslerp by row": _weighed(base=False, parameters={"nuslerp_flatten": False}),
    "multislerp": _weighed(base=False),
    "multislerp of task vectors": _weighed(),
    "karcher": _models({}, {}),
    "passthrough": _models({"scale": 0.7}),
    "task_arithmetic": _weighed(parameters={"lambda": 0.9}),
    "ties": _weighed(density=0.5),
    "dare_linear": _weighed(density=0.53),
    "dare_ties": _weighed(density=0.53),
    "breadcrumbs": _weighed(density=0.7, gamma=0.01),
    "breadcrumbs_ties": _weighed(density=0.7, gamma=0.01),
    "della": _weighed(density=0.5, epsilon=0.1),
    "della_linear": _weighed(density=0.5, epsilon=0.1),
    "sce": _models({}, {}, base=True, parameters={"select_topk": 0.5}),
    "model_stock": _models({}, {}, base=True),
    "arcee_fusion": _models(other={}, base=True),
    "nearswap": _models(other={}, base=True, parameters={"t": 0.0005}),
    "ram": _models({}, {}, base=True),
    "ramplus_tl": _models({}, {}, base=True),
}

# Recipes as people share them, one of each kind; "a third" and so on stand for layer numbers.
EXAMPLES: dict[str, dict] = {
    "slerp, filters and gradients": {
        "merge_method": "slerp",
        "slices": [
            {
                "sources": [
                    {"model": "ONE", "layer_range": [0, "all"]},
                    {"model": "OTHER", "layer_range": [0, "all"]},
                ]
            }
        ],
        "base_model": "ONE",
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "passthrough, stacked slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "ONE", "layer_range": [0, "two thirds"]}]},
            {
                "sources": [
                    {
                        "model": "OTHER",
                        "layer_range": ["a third", "all"],
                        "parameters": {
                            "scale": [
                                {"filter": "o_proj", "value": 0.0},
                                {"filter": "down_proj", "value": 0.0},
                                {"value": 1.0},
                            ]
                        },
                    }
                ]
            },
        ],
    },
    "ties, weights by layer": {
        "merge_method": "ties",
        "models": [
            {"model": "BASE"},
            {"model": "ONE", "parameters": {"density": 0.5, "weight": 0.5}},
            {"model": "OTHER", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
        ],
        "base_model": "BASE",
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "linear, in modules": {
        "merge_method": "linear",
        "modules": {
            "default": {
                "models": [
                    {"model": "ONE", "parameters": {"weight": 0.6}},
                    {"model": "OTHER", "parameters": {"weight": 0.4}},
                ]
            }
        },
    },
    "linear, union of vocabularies": {
        "merge_method": "linear",
        "models": [
            {"model": "ONE", "parameters": {"weight": 0.6}},
            {"model": "WIDER", "parameters": {"weight": 0.4}},
        ],
        "tokenizer": {"source": "union"},
    },
}

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")

# Why figures differ: established by merging single tensors both ways and in float64.
_LAST_BIT = "last bits of float32: we divide the weights by their sum, mergekit the sum of products"
_BFLOAT16 = "mergekit computes in bfloat16, here with a rounding per operation"
_TIED = "of equal magnitudes on the cut other ones are kept, as many of them (below)"
WHY: dict[str, str] = {
    "linear": _LAST_BIT,
    "linear, in modules": _LAST_BIT,
    "linear, union of vocabularies": _LAST_BIT + "; rows of new tokens agree",
    "slerp": "mergekit computes in float32 whatever the dtype",
    "slerp, filters and gradients": "last bits of float32",
    "nuslerp": _BFLOAT16 + "; in float32 cosines near 1 lose digits",
    "nuslerp by row": _BFLOAT16,
    "nuslerp of task vectors": _BFLOAT16,
    "multislerp": (
        "mergekit's embeddings come out 0.35 % short, though both models' are the same: float32 "
        "norms of 28 M elements (torch's is 0.16 % short); ours stay as they are. In bfloat16 also "
        "a rounding per operation"
    ),
    "multislerp of task vectors": _BFLOAT16,
    "karcher": (
        _BFLOAT16 + "; in float32 its lengths are off, by 0.02 % for the embeddings, which are the "
        "same in both models, and by up to 0.006 % elsewhere"
    ),
    "task_arithmetic": _BFLOAT16,
    "ties": _TIED,
    "ties, weights by layer": _TIED,
    "breadcrumbs": _TIED,
    "breadcrumbs_ties": _TIED,
    "sce": _TIED.replace("magnitudes", "variances"),
    "model_stock": _BFLOAT16,
    "arcee_fusion": (
        "mergekit: divergences near 5e-7 are sums in float32, whose roundings are near 1e-7, so "
        "that scores are off by up to 90 % and some are negative; ours agree with float64"
    ),
    "nearswap": _BFLOAT16,
    "ram": _BFLOAT16,
    "ramplus_tl": _BFLOAT16,
}


class Weights:
    """The tensors of a checkpoint's files, by name."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _steps(x: Tensor, y: Tensor) -> Tensor:
    """How many bfloat16 numbers lie from one to the other, element by element."""

    def ordinals(t: Tensor) -> Tensor:
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinals(x.bfloat16()) - ordinals(y.bfloat16())).abs_()


def figures(x: Weights, y: Weights, base: Weights | None = None) -> dict:
    """Count elements that agree in bfloat16; ``change`` is the difference relative to y - base.

    Within a step are neighbouring bfloat16 numbers, and those nearer than what cancelling leaves of
    the rounding of float32.
    """
    numel = equal = near = 0
    worst, where, off, changed = 0.0, None, 0.0, 0.0
    shapes = []
    for name in x:
        if name not in y:
            continue
        a, b = x[name], y[name]
        if a.shape != b.shape:
            shapes.append(f"{name}: {list(a.shape)} and {list(b.shape)}")
            continue
        numel += a.numel()
        noise = NOISE * max(a.abs().max().item(), b.abs().max().item())
        unlike = a.bfloat16() != b.bfloat16()
        few = (a[unlike], b[unlike])
        far = (_steps(*few) > 1) & ((few[0].float() - few[1].float()).abs_() > noise)
        equal += a.numel() - few[0].numel()
        near += a.numel() - int(far.sum())
        difference = (a.float() - b.float()).abs_()
        if (largest := difference.max().item()) > worst:
            worst, where = largest, name
        if base is not None and name in base and base[name].shape == b.shape:
            off += difference.double().square_().sum().item()
            changed += (b.double() - base[name].double()).square_().sum().item()
    return {
        "equal": equal / max(1, numel),
        "one_step": near / max(1, numel),
        "max_difference": worst,
        "where": where,
        "change": math.sqrt(off / changed) if changed else None,
        "only_ours": [name for name in x if name not in y],
        "only_theirs": [name for name in y if name not in x],
        "shapes": shapes,
    }


def statistics(x: Weights, y: Weights, base: Weights) -> dict:
    """Compare what two random merges did to the base, over the model and by tensor."""
    total = torch.zeros(2, 4, dtype=torch.float64)  # elements changed, sum, sum of sizes, squares
    numel, deviation, norm_ratio = 0, 0.0, 0.0
    for name in x:
        start = base[name].double()
        n, both = start.numel(), torch.zeros(2, 4, dtype=torch.float64)
        for row, merged in zip(both, (x[name], y[name]), strict=True):
            change = merged.double() - start
            row[0], row[1] = (change != 0).sum(), change.sum()
            row[2], row[3] = change.abs().sum(), change.square().sum()
        total += both
        numel += n
        share = both[:, 0].mean().item() / n
        if 0 < share < 1:
            spread = math.sqrt(2 * share * (1 - share) / n)
            deviation = max(deviation, abs(both[0, 0] - both[1, 0]).item() / n / spread)
        if n >= 100_000:
            norm_ratio = max(norm_ratio, abs(math.log(both[0, 3] / both[1, 3]) / 2))
    ours, theirs = total.tolist()
    return {
        "changed": [ours[0] / numel, theirs[0] / numel],
        "largest_share_difference_in_deviations": deviation,
        "mean": [ours[1] / numel, theirs[1] / numel],
        "mean_size": [ours[2] / numel, theirs[2] / numel],
        "norm": [math.sqrt(ours[3]), math.sqrt(theirs[3])],
        "largest_norm_ratio": math.exp(norm_ratio),
    }


def _filled_in(value, words: dict):
    """A recipe with its placeholders replaced."""
    if isinstance(value, dict):
        return {key: _filled_in(v, words) for key, v in value.items()}
    if isinstance(value, list):
        return [_filled_in(v, words) for v in value]
    return words.get(value, value) if isinstance(value, str) else value


def _wider(folder: Path, target: Path) -> Path:
    """Copy a checkpoint and give it two tokens more, so that its vocabulary is its own."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    size = config["vocab_size"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": size + i, "content": f"<|extra_{i}|>", "special": True, **flags} for i in range(2)
    ]
    config["vocab_size"] = size + 2
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    noise = torch.Generator().manual_seed(0)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, t in tensors.items():
            if t.dim() == 2 and len(t) == size:
                rows = 0.02 * torch.randn(2, t.shape[1], generator=noise)
                tensors[name] = torch.cat([t, rows.to(t.dtype)])
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def _untied(folder: Path, target: Path, seed: int) -> Path:
    """Copy a checkpoint in float32 with a little noise, which leaves few magnitudes equal."""
    shutil.copytree(folder, target)
    noise = torch.Generator().manual_seed(seed)
    for path in target.glob("*.safetensors"):
        tensors = {
            name: t.float() + 3e-4 * torch.randn(t.shape, generator=noise)
            for name, t in load_file(path).items()
        }
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def _run(command: list[str | Path], log: Path) -> str | None:
    """Run a merge; return the last line of what it said if it failed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    lines = log.read_text().strip().splitlines()
    return None if done.returncode == 0 else (lines or ["no message"])[-1]


def compare(
    name: str, recipe: dict, mergekit: Path, models: dict, work: Path, keep: bool, dtypes=DTYPES
) -> dict:
    """Merge one recipe four times and return the figures."""
    place = work / name.replace(" ", "-").replace(",", "")
    place.mkdir(parents=True, exist_ok=True)
    errors, results = {}, {}
    for dtype in dtypes:
        path = place / f"{dtype}.yml"
        text = yaml.safe_dump(_filled_in(recipe, models) | {"dtype": dtype}, sort_keys=False)
        stale = not path.exists() or path.read_text() != text
        path.write_text(text)
        ours = [sys.executable, "-m", "mergeme_ext", "merge", path, "--force", "--no-model-check"]
        theirs = [mergekit / "bin/mergekit-yaml", path, "--quiet", "--random-seed", "7919"]
        for side, command in (("ours", ours), ("mergekit", theirs)):
            out = place / f"{side}-{dtype}"
            if stale or side == "ours" or not (out / "config.json").exists():
                shutil.rmtree(out, ignore_errors=True)
                command.insert(command.index(path) + 1, out)
                if error := _run(command, place / f"{side}-{dtype}.log"):
                    errors[f"{side} {dtype}"] = error
                    continue
            results[side, dtype] = Weights(out)
    line = {"recipe": name, "errors": errors}
    start = models["ONE"] if recipe["merge_method"] == "passthrough" else models["BASE"]
    base = Weights(Path(start))
    for pair, a, b in (
        ("bfloat16", ("ours", "bfloat16"), ("mergekit", "bfloat16")),
        ("float32", ("ours", "float32"), ("mergekit", "float32")),
        ("theirs_by_dtype", ("mergekit", "bfloat16"), ("mergekit", "float32")),
    ):
        if a in results and b in results:
            line[pair] = figures(results[a], results[b], base)
            if recipe["merge_method"] in RANDOM and a[1] == b[1]:
                line[pair]["statistics"] = statistics(results[a], results[b], base)
    results.clear()
    if not keep:
        for out in place.glob("*/"):
            shutil.rmtree(out)
    return line


def _percent(share: float) -> str:
    """A share that says 100 % only if it is all."""
    return "100 %" if share == 1 else f"{math.floor(share * 1e6) / 1e4:.4f} %"


def table(lines: list[dict]) -> str:
    """The markdown tables of what was compared by element, and by statistics."""
    rows = [
        "| recipe | bfloat16: equal | within a step | max difference | mergekit's bfloat16 to its "
        "own float32: within a step | float32: equal | within a step | max difference | why |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    random = [
        "| recipe | dtype | changed, ours | mergekit's | largest difference of a tensor | mean "
        "size of changes | norm of changes | largest difference of a tensor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    known = [*RECIPES, *EXAMPLES]
    for line in sorted(lines, key=lambda line: known.index(line["recipe"])):
        name, why = line["recipe"], WHY.get(line["recipe"], "")
        if line["errors"]:
            why = "; ".join(f"{side}: {error}" for side, error in line["errors"].items())
        if name in RANDOM:
            for dtype in DTYPES:
                s = line.get(dtype, {}).get("statistics")
                if s:
                    random.append(
                        f"| {name} | {dtype} | {s['changed'][0]:.4%} | {s['changed'][1]:.4%} "
                        f"| {s['largest_share_difference_in_deviations']:.1f} deviations "
                        f"| {s['mean_size'][0] / s['mean_size'][1] - 1:+.3%} "
                        f"| {s['norm'][0] / s['norm'][1] - 1:+.3%} "
                        f"| {s['largest_norm_ratio'] - 1:.2%} |"
                    )
            continue
        cells = []
        for dtype in DTYPES:
            f = line.get(dtype)
            cells += ["-"] * 3 if f is None else [_percent(f["equal"]), _percent(f["one_step"])]
            if f is not None:
                cells.append(f"{f['max_difference']:.2g}")
            if dtype == "bfloat16":
                own = line.get("theirs_by_dtype")
                cells.append(_percent(own["one_step"]) if own else "-")
        rows.append(f"| {name} | {' | '.join(cells)} | {why} |")
    parts = [rows] if len(rows) > 2 else []
    parts += [random] if len(random) > 2 else []
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    """Command line: compare what is asked for."""
    known = [*RECIPES, *EXAMPLES]
    parser = argparse.ArgumentParser(description="Compare merges with mergekit's.")
    parser.add_argument("--mergekit", type=Path, required=True, help="its environment or python")
    parser.add_argument("--models", type=Path, nargs=3, metavar=("BASE", "ONE", "OTHER"))
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--untie", action="store_true", help="give the tuned models float32 noise (std 3e-4) first"
    )
    parser.add_argument("--work", type=Path, help="where to merge (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep results; mergekit's are reused")
    parser.add_argument("--figures", type=Path, help="add the JSON lines to this file")
    parser.add_argument("--table", type=Path, help="make the table from such a file, merge nothing")
    options = parser.parse_args()
    if options.table:
        lines = [json.loads(line) for line in options.table.read_text().splitlines()]
        print(table(list({line["recipe"]: line for line in lines}.values())))
        return
    if options.models is None:
        parser.error("expected --models BASE ONE OTHER")
    mergekit = options.mergekit
    if not mergekit.is_dir():
        mergekit = mergekit.parent.parent
    if not (mergekit / "bin/mergekit-yaml").exists():
        parser.error(f"expected --mergekit with bin/mergekit-yaml in it, got {options.mergekit}")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        base, *tuned = (str(folder.resolve()) for folder in options.models)
        if options.untie:
            tuned = [
                str(_untied(Path(folder), Path(temporary) / f"untied-{place}", 101 + place))
                for place, folder in enumerate(tuned)
            ]
        one, other = tuned
        layers = json.loads((Path(base) / "config.json").read_text())["num_hidden_layers"]
        models = {"BASE": base, "ONE": one, "OTHER": other}
        models |= {"a third": layers // 3, "two thirds": 2 * layers // 3, "all": layers}
        lines = []
        for name in options.methods:
            recipe = EXAMPLES.get(name) or {"merge_method": name.split()[0]} | RECIPES[name]
            if "WIDER" in json.dumps(recipe) and "WIDER" not in models:
                wider = Path(temporary) / "wider"
                models["WIDER"] = str(_wider(Path(other), wider))
            lines.append(
                compare(name, recipe, mergekit, models, work, options.keep, options.dtypes)
            )
            print(json.dumps(lines[-1]), flush=True)
            if options.figures:
                with options.figures.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
