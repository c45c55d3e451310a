"""The demo from beginning to end: experts, merges, Mixtures-of-Experts, one table."""

import gc
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.demo import results as outcome
from mergeme_ext.demo.corpora import pack
from mergeme_ext.demo.inputs import Inputs, gather
from mergeme_ext.demo.language_model import (
    compute_dtype,
    continuation,
    load_model,
    load_tokenizer,
    perplexity,
)
from mergeme_ext.demo.models import Made, build, planned_models, write_recipe
from mergeme_ext.demo.results import Result
from mergeme_ext.demo.settings import DOMAINS, EXPERT_DOMAINS, ROUTER_PROMPTS, DemoSettings, key
from mergeme_ext.demo.training import Training, fine_tune

__all__ = ["run_demo"]

SEPARATOR = "<|endoftext|>"
SAMPLE_TOKENS = 48
# They end inside a line: the end of a line would split a token that the tokenizer never splits.
SAMPLE_PROMPTS = {
    "medicine": "Question: Deficiency of insulin causes",
    "code": "import json\n\n\ndef load_config(path):\n    with open(path) as file:",
}


class _Voice:
    """Prints headings with the time since the start, and indented lines below them."""

    def __init__(self, write: Callable[[str], None]):
        self.write, self.started, self.number = write, time.perf_counter(), 0

    def heading(self, text: str) -> None:
        self.number += 1
        seconds = time.perf_counter() - self.started
        self.write(f"\n[{self.number}/5, {seconds:.0f} s] {text}")

    def line(self, text: str) -> None:
        self.write(f"  {text}")


def _print(text: str) -> None:
    print(text, flush=True)


def run_demo(settings: DemoSettings, write: Callable[[str], None] = _print) -> list[Result]:
    """Run the demo, print what happens with ``write``, and return the table's rows.

    Raises:
        InputsMissing: Packages could not be had.
        ValueError: What the user gave is not what it should be.
    """
    voice = _Voice(write)
    settings.cache.mkdir(parents=True, exist_ok=True)
    voice.heading("inputs")
    inputs = gather(settings, voice.line)
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(inputs.base)
    separator = separator_id(tokenizer)
    dtype = compute_dtype()

    base = Made("base", "base", inputs.base, inputs.base_digest)
    voice.heading(f"experts: fine-tuned from the base, {settings.steps} steps each")
    experts = {
        domain: make_expert(domain, base, inputs, settings, tokenizer, separator, dtype, voice)
        for domain in EXPERT_DOMAINS
    }

    voice.heading("models: dense merges and Mixtures-of-Experts of the two experts")
    prompts = {domain: write_prompts(domain, inputs, settings) for domain in EXPERT_DOMAINS}
    planned = planned_models(base, experts, prompts, settings.cache)
    for model in planned:
        started = time.perf_counter()
        recipe = write_recipe(model, settings.out / "recipes")
        made = build(model, recipe, fresh=settings.fresh)
        took = f"made in {time.perf_counter() - started:.1f} s" if made else "from the cache"
        voice.line(f"{model.label}: {took}")

    held_out = {
        domain: pack(
            tokenizer, inputs.texts[domain].held_out, settings.rows, Training.row_tokens, separator
        )
        for domain in DOMAINS
    }
    counts = ", ".join(f"{rows.numel()} tokens of {domain}" for domain, rows in held_out.items())
    voice.heading(f"evaluation in stock transformers: {counts}, held out")
    results = [
        evaluate(model, held_out, settings, dtype, voice)
        for model in [base, *experts.values(), *planned]
    ]

    best = outcome.best_moe(results)
    voice.heading(f"samples: {best.model.label}, likeliest token each time")
    samples = write_samples(best.model, tokenizer, separator, dtype)
    for domain, text in samples.items():
        voice.line(f"{domain}:")
        write(textwrap.indent(SAMPLE_PROMPTS[domain] + text, "    | ", lambda line: True))

    conclude(settings, results, samples, inputs, dtype, write)
    return results


def separator_id(tokenizer) -> int:
    """Return the id of the token that stands between texts."""
    found = tokenizer.convert_tokens_to_ids(SEPARATOR)
    if found is None or found == tokenizer.unk_token_id != tokenizer.get_vocab().get(SEPARATOR):
        found = tokenizer.eos_token_id
    if found is None:
        raise ValueError(f"expected a tokenizer with {SEPARATOR} or an end-of-text token")
    return found


def digest_rows(rows: Tensor) -> str:
    """Return a digest of token ids."""
    return key(rows.tolist())


def make_expert(
    domain: str,
    base: Made,
    inputs: Inputs,
    settings: DemoSettings,
    tokenizer,
    separator: int,
    dtype: torch.dtype,
    voice: _Voice,
) -> Made:
    training = Training(steps=settings.steps)
    rows = pack(
        tokenizer,
        inputs.texts[domain].train,
        training.steps * training.rows,
        training.row_tokens,
        separator,
    )
    made = key(base.key, digest_rows(rows), vars(training))
    folder = settings.cache / "experts" / f"{domain}-{made}"
    expert = Made(f"{domain} expert", "expert", folder, made, domain=domain)
    if settings.fresh and folder.exists():
        shutil.rmtree(folder)
    if (folder / "config.json").is_file():
        log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        voice.line(f"{domain}: from the cache (trained in {log['seconds']:.0f} s)")
        return expert

    def report(step: int, loss: float, speed: float, seconds: float) -> None:
        if step == 1 or step % 5 == 0 or step == training.steps:
            voice.line(
                f"{domain}: step {step:3d}/{training.steps}  loss {loss:.3f}  "
                f"{speed:4.0f} tokens/s  {seconds:4.0f} s"
            )

    fine_tune(base.folder, rows, folder, training, dtype, report)
    gc.collect()
    return expert


def write_prompts(domain: str, inputs: Inputs, settings: DemoSettings) -> Path:
    """Write the texts that tell the router what ``domain``'s expert is for; return the file.

    They are training passages, none of them held out.
    """
    file = settings.out / "recipes" / f"prompts-{domain}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = inputs.texts[domain].train[:ROUTER_PROMPTS]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file.resolve()


def evaluate(
    model: Made,
    held_out: Mapping[str, Tensor],
    settings: DemoSettings,
    dtype: torch.dtype,
    voice: _Voice,
) -> Result:
    """Return ``model``'s perplexities: from the cache if the same weights met the same text."""
    folder = settings.cache / "evaluations"
    files = {
        domain: folder / f"{key(model.key, digest_rows(rows), str(dtype))}.json"
        for domain, rows in held_out.items()
    }
    values = {}
    if not settings.fresh:
        for domain, file in files.items():
            if file.is_file():
                values[domain] = json.loads(file.read_text(encoding="utf-8"))["perplexity"]
    note = "from the cache"
    if len(values) < len(held_out):
        started = time.perf_counter()
        loaded = load_model(model.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for domain, rows in held_out.items():
            if domain not in values:
                values[domain] = perplexity(loaded, rows, dtype)
                record = {"model": model.label, "domain": domain, "perplexity": values[domain]}
                files[domain].write_text(json.dumps(record) + "\n", encoding="utf-8")
        del loaded
        gc.collect()
        note = f"{time.perf_counter() - started:.1f} s"
    shown = "  ".join(f"{domain} {values[domain]:.2f}" for domain in held_out)
    voice.line(f"{model.label}: {shown}  ({note})")
    return Result(model, {domain: values[domain] for domain in held_out})


def write_samples(model: Made, tokenizer, separator: int, dtype: torch.dtype) -> dict[str, str]:
    """Return what ``model`` writes after each domain's prompt."""
    loaded = load_model(model.folder)
    return {
        domain: continuation(loaded, tokenizer, prompt, SAMPLE_TOKENS, separator, dtype)
        for domain, prompt in SAMPLE_PROMPTS.items()
    }


def conclude(
    settings: DemoSettings,
    results: Sequence[Result],
    samples: Mapping[str, str],
    inputs: Inputs,
    dtype: torch.dtype,
    write: Callable[[str], None],
) -> None:
    """Print the table and what it shows, save everything, and say where."""
    table = outcome.table(results)
    notes = [
        "* least in its column; med + code is the geometric mean of both experts' domains",
        *(("yes  " if f["holds"] else "no   ") + f["text"] for f in outcome.findings(results)),
    ]
    write("\n" + table + "\n\n" + "\n".join(notes))
    out = settings.out
    told = {
        "steps": settings.steps,
        "held_out_rows": settings.rows,
        "row_tokens": Training.row_tokens,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "base": str(inputs.base),
        "texts": {domain: text.source for domain, text in inputs.texts.items()},
        "torch": torch.__version__,
    }
    full = {domain: SAMPLE_PROMPTS[domain] + text for domain, text in samples.items()}
    document = outcome.document(results, told, full)
    (out / "table.txt").write_text(table + "\n\n" + "\n".join(notes) + "\n", encoding="utf-8")
    (out / "results.json").write_text(
        json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    outcome.chart(results, out / "perplexity.png")
    best = outcome.best_moe(results).model
    write(
        f"\ntable       {out / 'table.txt'}, {out / 'results.json'}"
        f"\nplot        {out / 'perplexity.png'}"
        f"\nrecipes     {out / 'recipes'} (run one with: mergeme moe RECIPE OUT)"
        f"\nbest MoE    {best.folder}"
        f"\ncheckpoints {settings.cache} (base, experts, models; delete it whenever you like)"
    )
