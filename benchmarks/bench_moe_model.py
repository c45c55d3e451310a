"""Whole Mixture-of-Experts models of transformers: the default experts against ours.

Random weights, bfloat16. Prefill and decode are timed in rounds in which the implementations take
turns on the same model; a further one leaves the experts out, so that the rest of the model can be
taken off and the experts' own time compared. See README.md here.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_experts import processor
from benchmarks.roofline import NOISE, Probe, noise_of

OP = "moe_model"
LEFT_OUT = "experts_left_out"
OURS = "mergeme"
# transformers' own choice on a CPU, for prefill and for decoding.
DEFAULT = "grouped_mm"

# name: class of the configuration, its arguments.
MODELS: dict[str, tuple[str, dict]] = {
    # For the tests.
    "smoke-qwen3": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "vocab_size": 128,
        },
    ),
    "smoke-olmoe": (
        "OlmoeConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "vocab_size": 128,
        },
    ),
    # 1.3 B parameters: fine-grained experts of 1024 x 512 in 12 layers.
    "qwen3": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "vocab_size": 32768,
            "norm_topk_prob": True,
        },
    ),
    # 1.5 B parameters: OLMoE-1B-7B's own sizes but for the depth, 3 layers of 16.
    "olmoe": (
        "OlmoeConfig",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 3,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 1024,
            "vocab_size": 50304,
        },
    ),
}


def make_model(name: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A model with random weights, the same ones every time, ready for inference."""
    import transformers

    kind, sizes = MODELS[name]
    if layers is not None:
        sizes = {**sizes, "num_hidden_layers": layers}
    # No token ends a text, so that every run makes as many.
    config = getattr(transformers, kind)(**sizes, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def available(names: Sequence[str]) -> dict[str, str]:
    """Register what is not transformers' own; return, of those that cannot run, why."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(LEFT_OUT, _left_out)
    if OURS not in names:
        return {}
    try:
        from mergeme_ext.integrations.transformers import register

        register()
    except ImportError as error:
        return {OURS: str(error)}
    return {}


def _left_out(experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """In place of the experts: nothing."""
    return torch.zeros_like(x)


class Subject:
    """A model whose experts' implementation can be changed, and what is done with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vocabulary = model.config.vocab_size

    def use(self, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)

    def prompt(self, tokens: int) -> Tensor:
        g = torch.Generator().manual_seed(tokens)
        return torch.randint(0, self.vocabulary, (1, tokens), generator=g)

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """One pass over the prompt; only the last token's logits are made, as in generation."""
        return self.model(prompt, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def decode(self, prompt: Tensor, steps: int) -> tuple[float, Tensor]:
        """Greedy steps after the prompt; returns their seconds, without the prompt's, and ids."""
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        ids = [out.logits[:, -1].argmax(-1, keepdim=True)]
        started = time.perf_counter()
        for _ in range(steps):
            out = self.model(ids[-1], past_key_values=out.past_key_values, use_cache=True)
            ids.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return time.perf_counter() - started, torch.cat(ids, dim=1)

    @torch.no_grad()
    def logits(self, prompt: Tensor) -> Tensor:
        return self.model(prompt, use_cache=False).logits.double()


def peak_memory(call: Callable[[], object]) -> int | None:
    """Highest resident bytes of this process during ``call``; None where the system won't say."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    call()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


class Bench:
    """One model, its implementations, and where the rows go."""

    def __init__(self, name: str, threads: int, options: argparse.Namespace, emit) -> None:
        self._name, self._threads, self._options, self._emit = name, threads, options, emit

    def _note(self, **row) -> dict:
        row = {"op": OP, "model": self._name, "threads": self._threads, **row}
        self._emit(row)
        return row

    def run(self, deadline: float) -> None:
        """Check, measure the memory, then time in rounds until ``deadline`` or enough rounds."""
        options = self._options
        torch.set_num_threads(self._threads)
        missing = available(options.implementations)
        for name, reason in missing.items():
            self._note(implementation=name, missing=reason)
        names = [name for name in options.implementations if name not in missing]
        model = make_model(self._name, torch.bfloat16, options.layers)
        parameters = sum(p.numel() for p in model.parameters())
        subject = Subject(model)
        self._memory(subject, names, parameters)
        if not options.no_check:
            self._check(subject, names)
        self._rounds(subject, [*names, LEFT_OUT], parameters, deadline)
        if OURS in names:
            self._memory_packed(subject, parameters)

    def _check(self, subject: Subject, names: Sequence[str]) -> None:
        """Logits in bfloat16 against float32, and greedy tokens in float32, of every one."""
        options = self._options
        prompt = subject.prompt(options.check_tokens)
        half = {name: self._with(subject, name, subject.logits, prompt) for name in names}
        # bfloat16 weights survive the way to float32 and back.
        subject.model.float()
        try:
            exact, ids = {}, {}
            for name in names:
                exact[name] = self._with(subject, name, subject.logits, prompt)
                run = self._with(subject, name, subject.decode, prompt, options.check_steps)
                ids[name] = run[1].tolist()
        finally:
            subject.model.bfloat16()
        first = names[0]
        errors = {name: distance(half[name], exact[first]) for name in names}
        for name in names:
            self._note(
                check=name,
                against=first,
                bfloat16_error=errors[name],
                # The rule of the tests: at most twice the error of the same dtype's stock code.
                logits_agree=errors[name] <= 2 * errors[first],
                float32_difference=distance(exact[name], exact[first]),
                greedy_ids_agree=ids[name] == ids[first],
            )

    def _with(self, subject: Subject, implementation: str, call: Callable, *args):
        subject.use(implementation)
        return call(*args)

    def _memory(self, subject: Subject, names: Sequence[str], parameters: int) -> None:
        """Peak of each; ours last, because what it packs stays."""
        prompt = subject.prompt(self._options.prefill)
        for name in sorted(names, key=lambda n: n == OURS):
            subject.use(name)
            peak = peak_memory(lambda: subject.prefill(prompt))
            self._note(implementation=name, peak_resident_bytes=peak, parameters=parameters)

    def _memory_packed(self, subject: Subject, parameters: int) -> None:
        """Peak with packed weights in the place of the parameters; nothing else runs after it."""
        from mergeme_ext.integrations import transformers as integration

        if not hasattr(integration, "pack_for_inference"):
            return
        subject.use(OURS)
        integration.pack_for_inference(subject.model)
        prompt = subject.prompt(self._options.prefill)
        peak = peak_memory(lambda: subject.prefill(prompt))
        name = f"{OURS}, packed in place"
        self._note(implementation=name, peak_resident_bytes=peak, parameters=parameters)

    def _rounds(
        self, subject: Subject, names: Sequence[str], parameters: int, deadline: float
    ) -> None:
        options, probe = self._options, Probe(torch.ones(harness.FLUSH_BYTES, dtype=torch.uint8))
        prompt, start = subject.prompt(options.prefill), subject.prompt(options.context)
        seconds: dict[tuple[str, str], list[float]] = {}
        before = probe.limits(self._threads)
        for number in range(options.rounds):
            if number and time.monotonic() > deadline:
                break
            for name in names:
                subject.use(name)
                if not number:  # packs and warms up
                    subject.prefill(start)
                started = time.perf_counter()
                subject.prefill(prompt)
                seconds.setdefault(("prefill", name), []).append(time.perf_counter() - started)
                decoding, _ = subject.decode(start, options.decode)
                seconds.setdefault(("decode", name), []).append(decoding)
        after = probe.limits(self._threads)
        noise = noise_of(before, after)
        tokens = {"prefill": options.prefill, "decode": options.decode}
        for (phase, name), several in seconds.items():
            best, rest = min(several), min(seconds[phase, LEFT_OUT])
            row = {
                "phase": phase,
                "implementation": name,
                "tokens": tokens[phase],
                "context": options.context if phase == "decode" else 0,
                "parameters": parameters,
                "best_s": best,
                "median_s": statistics.median(several),
                "repeats": len(several),
                "tokens_per_s": tokens[phase] / best,
                "noise": noise,
                "noisy": noise > NOISE,
                "probes_before": before,
                "probes_after": after,
            }
            if name != LEFT_OUT:
                row |= {"experts_s": best - rest, "experts_share": (best - rest) / best}
                default = min(seconds.get((phase, DEFAULT), [float("nan")])) - rest
                row["experts_to_default"] = (best - rest) / default
            self._note(**row)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error by norm."""
    return float((a - b).norm() / b.norm())


def table_of(rows: Sequence[dict]) -> Iterator[list[str]]:
    """Rows of a table: model, threads, phase, implementation, tokens/s, experts' time."""
    for row in rows:
        if "phase" in row:
            ratio = row.get("experts_to_default")
            yield [
                row["model"],
                str(row["threads"]),
                f"{row['phase']} {row['tokens']}",
                row["implementation"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['experts_share']:.0%}" if "experts_share" in row else "",
                f"{row['experts_s'] * 1e3:.1f}" if "experts_s" in row else "",
                "" if ratio is None or ratio != ratio else f"{ratio:.2f}",
                "NOISY" if row["noisy"] else "",
            ]


HEADER = ("model", "threads", "phase", "experts", "tokens/s", "experts' share", "experts, ms")
HEADER = (*HEADER, "x default's", "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="qwen3,olmoe", help=", ".join(MODELS))
    add("--implementations", default=f"{DEFAULT},{OURS}", help="also eager, batched_mm")
    add("--threads", default="1,2")
    add("--layers", type=int, help="instead of the model's own number")
    add("--prefill", type=int, default=512, help="tokens of the prompt")
    add("--context", type=int, default=32, help="tokens before those that are decoded")
    add("--decode", type=int, default=16, help="tokens decoded")
    add("--rounds", type=int, default=5)
    add("--budget", type=float, default=float("inf"), help="seconds; no round starts after them")
    add("--no-check", action="store_true", help="do not compare logits and greedy tokens")
    add("--check-tokens", type=int, default=64, help="prompt of the comparison")
    add("--check-steps", type=int, default=16, help="tokens decoded in the comparison")
    add("--jsonl", type=Path, help="append rows to this file (default: standard output)")
    return parser


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Run the bench; return all rows."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    options.implementations = options.implementations.split(",")
    models = options.models.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        raise SystemExit(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    threads = [int(count) for count in options.threads.split(",")]
    import transformers

    common = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": processor(),
    }
    rows: list[dict] = []
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if options.jsonl:
            stream = stack.enter_context(options.jsonl.open("a"))

        def emit(row: dict) -> None:
            row |= common
            rows.append(row)
            print(json.dumps(row), file=stream, flush=True)

        runs = [(name, count) for name in models for count in threads]
        for number, (name, count) in enumerate(runs):
            left = options.budget - (time.monotonic() - started)
            if number and left <= 0:
                print(f"out of time, {len(runs) - number} runs left", file=sys.stderr)
                break
            # Each run gets its share of what is left.
            deadline = time.monotonic() + left / (len(runs) - number)
            Bench(name, count, options, emit).run(deadline)
            gc.collect()
    from mergeme_ext.report import text_table

    print(text_table(list(HEADER), list(table_of(rows))), file=sys.stderr)
    for row in rows:
        if "check" in row:
            print(
                f"{row['model']}: {row['check']} against {row['against']}: bfloat16 error "
                f"{row['bfloat16_error']:.2g} (agrees: {row['logits_agree']}), float32 difference "
                f"{row['float32_difference']:.2g}, same greedy ids: {row['greedy_ids_agree']}",
                file=sys.stderr,
            )
        if row.get("peak_resident_bytes"):
            peak = row["peak_resident_bytes"] / 1e9
            print(f"{row['model']}: {row['implementation']} peak {peak:.2f} GB", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
