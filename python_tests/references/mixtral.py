"""Logits of a Mixtral or LLaMA checkpoint in float64, from the tensors as they lie on disk."""

import torch

from python_tests.references.moe_layer import expert, moe_layer


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x, theta):
    """x [T, heads, D]: pairs (i, i + D/2) turned by t * theta^(-2i/D)."""
    tokens, _, width = x.shape
    speed = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = (torch.arange(tokens, dtype=torch.float64)[:, None] * speed)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _attention(x, weights, config):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    tokens, width = len(x), config["head_dim"]
    theta = config["rope_parameters"]["rope_theta"]
    q = _rotate((x @ weights["q_proj"].T).view(tokens, heads, width), theta)
    k = _rotate((x @ weights["k_proj"].T).view(tokens, groups, width), theta)
    v = (x @ weights["v_proj"].T).view(tokens, groups, width)
    out = torch.zeros_like(q)
    for t in range(tokens):
        for h in range(heads):
            g = h // (heads // groups)
            scores = k[: t + 1, g] @ q[t, h] / width**0.5
            out[t, h] = scores.softmax(0) @ v[: t + 1, g]
    return out.reshape(tokens, -1) @ weights["o_proj"].T


def logits(tensors, config, ids):
    """``tensors`` by name, ``config`` as config.json holds it, ``ids`` [T] -> [T, vocabulary]."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["model.embed_tokens.weight"][ids]
    eps = config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        attention = {
            n: t[f"{p}self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        x = x + _attention(_norm(x, t[p + "input_layernorm.weight"], eps), attention, config)
        y = _norm(x, t[p + "post_attention_layernorm.weight"], eps)
        if p + "block_sparse_moe.gate.weight" in t:
            p += "block_sparse_moe."
            names = [f"{p}experts.{e}." for e in range(config["num_local_experts"])]
            gate_up = torch.stack(
                [torch.cat([t[n + "w1.weight"], t[n + "w3.weight"]]) for n in names]
            )
            down = torch.stack([t[n + "w2.weight"] for n in names])
            routed = y @ t[p + "gate.weight"].T
            x = x + moe_layer(y, routed, gate_up, down, config["num_experts_per_tok"])
        else:
            p += "mlp."
            gate_up = torch.cat([t[p + "gate_proj.weight"], t[p + "up_proj.weight"]])
            x = x + torch.stack([expert(row, gate_up, t[p + "down_proj.weight"]) for row in y])
    x = _norm(x, t["model.norm.weight"], eps)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return x @ t[f"{head}.weight"].T
