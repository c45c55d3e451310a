"""float64 references of the experts in e4m3, with bounds of what float32 and e4m3 may differ by.

A quantised number jumps where its unrounded value crosses a tie, so float32's error cannot be
judged after the rounding alone. Both references therefore carry with each value how far from it an
honest implementation may be, and rounding is applied to the ends of that interval.
"""

import torch

from python_tests.references.grouped_experts import ACTIVATIONS
from python_tests.references.quantize_fp8 import BLOCK, dequantize, encode, quantize_fp8

U = 2.0**-24


def dequantize_gate_up(gate_up, scale):
    half = gate_up.shape[1] // 2
    blocks = scale.shape[1] // 2
    gate = dequantize(gate_up[:, :half], scale[:, :blocks], rows=BLOCK)
    up = dequantize(gate_up[:, half:], scale[:, blocks:], rows=BLOCK)
    return torch.cat([gate, up], 1)


def _product(x, error, weight, lost=0.0):
    """x @ weight.T and its bound: the error that x brings, and that of sums in float32, of which
    tensor cores may lose the part ``lost``."""
    depth = weight.shape[1]
    terms = (min(depth, BLOCK) + -(-depth // BLOCK) + 2) * U + lost
    size = (x.abs() + error) @ weight.abs().T
    return x @ weight.T, error @ weight.abs().T + terms / (1 - terms) * size


def _activate(both, error, act):
    """f(gate) * up. No slope of the activations is beyond 1.2; their own code errs by a few units
    in the last place of the gate."""
    gate, up = both.chunk(2, 1)
    gate_error, up_error = error.chunk(2, 1)
    slope = 1.2 * gate_error + 16 * U * gate.abs()
    return act(gate) * up, slope * (up.abs() + up_error) + act(gate).abs() * up_error


def _round(v):
    return encode(v).view(torch.float8_e4m3fn).double()


def _quantize(x, error):
    """x quantised in blocks along its rows, and how far a value within ``error`` may end up."""
    out, bound = torch.zeros_like(x), torch.zeros_like(x)
    for b in range(0, x.shape[1], BLOCK):
        v, e = x[:, b : b + BLOCK], error[:, b : b + BLOCK]
        largest, slack = v.abs().amax(1, keepdim=True), e.amax(1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
        scale_error = slack / 448 + U * scale
        q = _round(v / scale)
        moved = (e + (v / scale).abs() * scale_error) / (scale - scale_error).clamp(min=1e-300)
        moved = moved + 2 * U * (v / scale).abs()
        jump = torch.maximum(_round(v / scale + moved) - q, q - _round(v / scale - moved))
        out[:, b : b + BLOCK] = q * scale
        bound[:, b : b + BLOCK] = jump * (scale + scale_error) + q.abs() * scale_error
    return out, bound


def _experts(x, x_error, gate_up, down, routing, inner, activation, lost):
    """Value and bound [T, H] in float64, for dequantised weights and tokens with these errors."""
    weights, offsets, permutation = routing
    top_k, bounds = weights.shape[1], offsets.tolist()
    value, bound = torch.zeros_like(x), torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        slots = permutation[bounds[e] : bounds[e + 1]].long()
        tokens = slots // top_k
        both, error = _product(x[tokens], x_error[tokens], gate_up[e], lost)
        a, error = inner(*_activate(both, error, ACTIVATIONS[activation]))
        y, error = _product(a, error, down[e], lost)
        weight = weights.flatten()[slots, None]
        value.index_add_(0, tokens, weight * y)
        bound.index_add_(0, tokens, weight.abs() * (error + (top_k + 1) * U * (y.abs() + error)))
    return value, bound


def _arguments(x, gate_up, gate_up_scale, down, down_scale, weights, offsets, permutation):
    gate_up = dequantize_gate_up(gate_up, gate_up_scale)
    down = dequantize(down, down_scale, rows=BLOCK)
    routing = (weights.detach().double().cpu(), offsets.cpu(), permutation.cpu())
    return x.detach().double().cpu(), gate_up, down, routing


def quantized(*args, activation="silu", lost=0.0):
    """The same steps, in float64, with the same roundings to e4m3."""
    x, gate_up, down, routing = _arguments(*args[:8])
    q, scale = quantize_fp8(args[0])
    x = dequantize(q, scale)
    return _experts(x, torch.zeros_like(x), gate_up, down, routing, _quantize, activation, lost)


def dequantized(*args, activation="silu", lost=0.0):
    """The experts with dequantised weights and nothing rounded to e4m3. What quantising tokens and
    activations may change is in the bound: 1/16 of a number, or 1/1024 of its block's scale."""
    x, gate_up, down, routing = _arguments(*args[:8])

    def rounding(v, error):
        out = torch.zeros_like(v)
        for b in range(0, v.shape[1], BLOCK):
            part, e = v[:, b : b + BLOCK].abs(), error[:, b : b + BLOCK]
            largest = (part + e).amax(1, keepdim=True)
            scale = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
            out[:, b : b + BLOCK] = (part + e) * (1 / 16 + 4 * U) + scale * 2.0**-10
        return out

    def inner(a, error):
        return a, error + rounding(a, error)

    x_error = rounding(x, torch.zeros_like(x))
    return _experts(x, x_error, gate_up, down, routing, inner, activation, lost)
