"""DeepSeek-V3-shaped checkpoints with e4m3 weights, loaded by transformers and run by the ops."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

from mergeme_ext.integrations.transformers import register
from mergeme_ext.ops import sort_by_expert
from python_tests.references import grouped_experts_fp8 as experts_reference
from python_tests.references.grouped_matmul_fp8 import grouped_matmul_fp8
from python_tests.references.quantize_fp8 import dequantize, quantize_fp8
from python_tests.support.tolerance import assert_as_good_as_eager, assert_within_rounding

register()

E4M3 = torch.float8_e4m3fn
# Everything a multiple of 128 that can be; and almost nothing.
SIZES = {
    "even": {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384},
    "uneven": {"hidden_size": 200, "moe_intermediate_size": 192, "intermediate_size": 330},
    "small": {"hidden_size": 136, "moe_intermediate_size": 40, "intermediate_size": 72},
}
SHARED = {
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.06,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": None,
}
# What a checkpoint leaves as it is, besides what is no linear layer.
KEPT = ["lm_head", "model.layers.1.self_attn.o_proj"]
IDS = torch.tensor([[3, 17, 1, 44, 60, 9, 9, 2, 31, 5, 5, 28]])
NAMES = pytest.mark.parametrize("name", SIZES)


def quantize_weight(weight):
    """e4m3 and a scale for each 128 x 128, as DeepSeek's own tool makes them."""
    n, k = weight.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = nn.functional.pad(weight, (0, columns * 128 - k, 0, rows * 128 - n))
    tiles = padded.view(rows, 128, columns, 128)
    scale = tiles.abs().amax((1, 3)) / 448
    q = (tiles / scale[:, None, :, None]).view(rows * 128, columns * 128)[:n, :k]
    return q.to(E4M3), scale


def is_quantized(name):
    linear = name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name
    return linear and not any(name.startswith(f"{kept}.") for kept in KEPT)


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request, tmp_path_factory):
    """A folder as DeepSeek publishes them, and the model of its dequantised weights in float64."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = DeepseekV3Config(**SHARED, **SIZES[request.param])
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.1)
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    written, plain = {}, load_file(path)
    for name, tensor in list(plain.items()):
        if not is_quantized(name):
            written[name] = tensor
            continue
        q, scale = quantize_weight(tensor)
        written[name], written[f"{name}_scale_inv"] = q, scale
        plain[name] = dequantize(q, scale, rows=128).float()  # not exact: float64 below
    assert sum("experts.7.down_proj.weight_scale_inv" in name for name in written) == 2
    save_file(written, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": KEPT,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, exact_model(model, written)


def exact_model(model, written):
    model = copy.deepcopy(model).double().eval()
    state = {name: t.double() for name, t in model.state_dict().items()}

    def weight(name):
        if f"{name}.weight_scale_inv" in written:
            q, scale = written[f"{name}.weight"], written[f"{name}.weight_scale_inv"]
            return dequantize(q, scale, rows=128)
        return written[f"{name}.weight"].double()

    for name in state:
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            halves = [
                torch.stack([weight(f"{prefix}.{e}.{part}_proj") for e in range(8)])
                for part in ("gate", "up")
            ]
            state[name] = torch.cat(halves, 1)
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            state[name] = torch.stack([weight(f"{prefix}.{e}.down_proj") for e in range(8)])
        elif name.endswith(".weight"):
            state[name] = weight(name.removesuffix(".weight"))
    model.load_state_dict(state)
    return model


def load(folder, **options):
    options = {"experts_implementation": "mergeme", "dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_weights_stay_as_they_are(checkpoint):
    folder, _ = checkpoint
    model = load(folder)
    kinds = {FP8Experts: 0, FP8Linear: 0}
    for name, module in model.named_modules():
        if type(module) in (FP8Experts, FP8Linear):
            kinds[type(module)] += 1
            assert {p.element_size() for n, p in module.named_parameters() if "scale" not in n} == {
                1
            }
            assert name not in KEPT
    # Of each layer's five attention products one is kept once; a dense layer, two shared experts.
    assert kinds == {FP8Experts: 2, FP8Linear: 3 * 5 - 1 + 3 * 3}
    assert model.get_submodule(KEPT[1]).weight.dtype == torch.float32
    (path,) = folder.glob("*.safetensors")
    written = load_file(path)
    for layer in (1, 2):
        experts = model.model.layers[layer].mlp.experts
        for e in range(8):
            prefix = f"model.layers.{layer}.mlp.experts.{e}"
            for part, weight in zip(("gate", "up"), experts.gate_up_proj[e].chunk(2), strict=True):
                assert torch.equal(
                    weight.view(torch.uint8),
                    written[f"{prefix}.{part}_proj.weight"].view(torch.uint8),
                )
            scales = [written[f"{prefix}.{part}_proj.weight_scale_inv"] for part in ("gate", "up")]
            assert torch.equal(experts.gate_up_proj_scale_inv[e], torch.cat(scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_module_is_within_its_bound(checkpoint, dtype):
    """Each layer of the loaded model, at the inputs it meets, against float64 with its weights."""
    folder, _ = checkpoint
    model, calls = load(folder, dtype=dtype), []

    def keep(module, inputs, output):
        calls.append((module, inputs, output))

    for module in model.modules():
        if type(module) in (FP8Experts, FP8Linear):
            module.register_forward_hook(keep)
    model(IDS)
    assert len(calls) == 2 + 3 * 5 - 1 + 3 * 3
    for module, inputs, output in calls:
        if type(module) is FP8Linear:
            check_linear(module, inputs[0].flatten(0, -2), output.flatten(0, -2))
        else:
            check_experts(module, *inputs, output)


def check_linear(module, x, out):
    weight, scale = module.weight[None], module.weight_scale_inv[None]
    offsets = torch.tensor([0, len(x)])
    value, magnitude = grouped_matmul_fp8(*quantize_fp8(x), weight, scale, offsets)
    depth = x.shape[1]
    assert_within_rounding(out, value, magnitude, terms=min(depth, 128) + 1 + -(-depth // 128))


def check_experts(module, x, ids, weights, out):
    routing = sort_by_expert(ids.int(), module.num_experts)
    args = (
        x,
        module.gate_up_proj,
        module.gate_up_proj_scale_inv,
        module.down_proj,
        module.down_proj_scale_inv,
        weights.float(),
        *routing,
    )
    for reference in (experts_reference.quantized, experts_reference.dequantized):
        value, bound = reference(*args)
        info = torch.finfo(out.dtype)
        bound = bound + info.eps / 2 * (value.abs() + bound) + info.smallest_normal * info.eps
        assert ((out.double() - value).abs() <= bound).all()


class QuantizingLinear(nn.Module):
    """In float64, what an e4m3 linear layer is by definition."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        rows = x.flatten(0, -2)
        q = dequantize(*quantize_fp8(rows))
        return self.linear(q).view(*x.shape[:-1], -1)


def quantizing_experts(experts, hidden_states, top_k_index, top_k_weights):
    x = dequantize(*quantize_fp8(hidden_states))
    out = torch.zeros_like(hidden_states)
    for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
        for e, weight in zip(ids.tolist(), weights, strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[token]).chunk(2)
            a = dequantize(*quantize_fp8((nn.functional.silu(gate) * up)[None]))[0]
            out[token] += weight * (experts.down_proj[e] @ a)
    return out


def quantizing_model(exact):
    model = copy.deepcopy(exact)
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            module.forward = lambda *args, experts=module: quantizing_experts(experts, *args)
        elif isinstance(module, nn.Linear) and is_quantized(f"{name}.weight"):
            model.set_submodule(name, QuantizingLinear(module))
    return model


@torch.no_grad()
def test_logits_are_as_near_as_the_format_allows(checkpoint):
    """The error against dequantised weights in float64 is that of quantised activations: at most
    twice what the same roundings to e4m3, and no others, do in float64."""
    folder, exact = checkpoint
    expected = exact(IDS).logits
    rounded = quantizing_model(exact)(IDS).logits
    assert (rounded - expected).abs().max() > 0
    assert_as_good_as_eager(load(folder)(IDS).logits, expected, rounded)


@torch.no_grad()
def test_generates_one_by_one_what_it_says_at_once(checkpoint):
    model = load(checkpoint[0])
    text = model.generate(IDS, max_new_tokens=5, do_sample=False)
    again = model(text[:, :-1]).logits[:, IDS.shape[1] - 1 :].argmax(-1)
    assert torch.equal(text[:, IDS.shape[1] :], again)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_other_implementations_dequantize_as_without_us(checkpoint):
    folder, exact = checkpoint
    if not folder.name.startswith("even"):
        pytest.skip("transformers dequantises whole blocks only")
    for options in (
        {"experts_implementation": "eager"},
        {"quantization_config": FineGrainedFP8Config(dequantize=True)},
    ):
        model = load(folder, **options)
        assert not any(isinstance(m, FP8Linear | FP8Experts) for m in model.modules())
        expected = exact(IDS).logits
        assert (model(IDS).logits.double() - expected).norm() <= 0.01 * expected.norm()


def test_gradient_raises(checkpoint):
    model = load(checkpoint[0])
    with pytest.raises(NotImplementedError, match=r"mergeme::\w+_fp8"):
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"block_size": [64, 128]}, r"got .*\[64, 128\]"),
        ({"activation_scheme": "static"}, "got .* static"),
    ],
)
def test_refuses_other_formats(checkpoint, change, shown):
    model = load(checkpoint[0])
    experts = model.model.layers[1].mlp.experts
    for name, value in change.items():
        setattr(experts, name, value)
    with pytest.raises(NotImplementedError, match=rf"FP8Experts: expected .*{shown}"):
        model(IDS)


@torch.no_grad()
def test_another_gate_runs_in_steps(checkpoint):
    experts = load(checkpoint[0]).model.layers[1].mlp.experts
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, experts.hidden_dim, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=g)
    fused = experts(x, ids, weights)
    experts.limit = 1e30  # clamps nothing, but it is not the gate that the fused op has
    stepped = experts(x, ids, weights)
    # The steps round nothing else in float32; only ties of activations may fall otherwise.
    assert (stepped - fused).norm() <= 0.02 * fused.norm()
    experts.limit = 0.05
    assert not torch.equal(experts(x, ids, weights), fused)
