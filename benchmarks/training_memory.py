"""Peak memory of one training step of transformers' experts, per implementation.

Each case runs in a process of its own: E experts of Qwen3-MoE's class, forward and backward of T
tokens. What counts is the highest resident size during the step, less that before it (weights and
tokens) and less the weights' gradients, which every implementation must hold.
"""

import argparse
import json
import subprocess
import sys

__all__ = ["main", "step"]

IMPLEMENTATIONS = ("eager", "grouped_mm", "mergeme")


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def step(implementation: str, tokens: int, args: argparse.Namespace) -> dict:
    """Run one training step in this process and say what it took."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from mergeme_ext.integrations.transformers import register

    register()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = Qwen3MoeConfig(
        hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_experts=args.experts
    )
    config._experts_implementation = implementation
    dtype = getattr(torch, args.dtype)
    experts = Qwen3MoeExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)

    def run(count: int) -> None:
        x = torch.randn(count, args.hidden).to(dtype).requires_grad_()
        weights, ids = torch.rand(count, args.experts).softmax(-1).topk(args.top_k)
        experts(x, ids, weights.requires_grad_()).float().sum().backward()
        experts.zero_grad()

    run(1)  # libraries load and buffers of theirs are made
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the highest resident size starts anew
    run(tokens)
    gradients = sum(p.numel() * p.element_size() for p in experts.parameters())
    return {
        "bench": "training_memory",
        "implementation": implementation,
        "tokens": tokens,
        "dtype": args.dtype,
        "shape": [args.experts, args.hidden, args.intermediate, args.top_k],
        "threads": args.threads,
        "peak_bytes": _status("VmHWM") - before - gradients,
        "gradient_bytes": gradients,
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step:
        print(json.dumps(step(args.step, args.tokens[0], args)))
        return []
    rows = []
    for tokens in args.tokens:
        for implementation in IMPLEMENTATIONS:
            given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()]
            given = [flag for flag in given if not flag.startswith(("--tokens", "--step"))]
            command = [sys.executable, "-m", "benchmarks.training_memory", *given]
            command += [f"--step={implementation}", f"--tokens={tokens}"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                last = (result.stderr.strip().splitlines() or ["it printed nothing"])[-1]
                row = {"implementation": implementation, "tokens": tokens, "failed": last}
            else:
                row = json.loads(result.stdout.strip().splitlines()[-1])
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
