"""Tiny random checkpoints of models whose norms matter: a K that is 1 % off changes the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, LAYERS, HEAD_DIM, INTERMEDIATE, EXPERTS = 512, 128, 2, 32, 64, 4

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Configurations by model, as far as they differ.
CONFIGURATIONS = {
    "minimax-m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "head_dim": HEAD_DIM,
        "rotary_dim": HEAD_DIM // 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "use_routing_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rope_theta": 10000.0,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": 16,
    },
}


def heads(model: str, kv_heads: int | None = None) -> tuple[int, int]:
    """Return a model's query and KV heads; OLMo's hidden size is that of all query heads."""
    return (8 if model == "minimax-m2" else HIDDEN // HEAD_DIM), kv_heads or 2


def write(folder: Path, model: str, dtype: str, kv_heads: int | None = None) -> Path:
    """Write a model's configuration and random weights, in the layout of Hugging Face."""
    import torch
    from safetensors.torch import save_file

    q_heads, kv_heads = heads(model, kv_heads)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Any:
        return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))

    def gamma(cols: int) -> Any:
        values = 0.5 + torch.rand(cols, generator=generator)
        return values.to(getattr(torch, dtype))

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN, scale=1.0),
        "model.norm.weight": gamma(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN, scale=0.3),
    }
    for layer in range(LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        q_cols, k_cols = q_heads * HEAD_DIM, kv_heads * HEAD_DIM
        shapes = {"q": (q_cols, HIDDEN), "k": (k_cols, HIDDEN), "v": (k_cols, HIDDEN),
                  "o": (HIDDEN, q_cols)}  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"{attention}.{name}_proj.weight"] = random(*shape, scale=shape[1] ** -0.5)
        tensors[f"{attention}.q_norm.weight"] = gamma(q_cols)
        tensors[f"{attention}.k_norm.weight"] = gamma(k_cols)
        if model == "minimax-m2":
            tensors |= _experts(f"model.layers.{layer}", random, gamma)
        else:
            tensors |= _dense(f"model.layers.{layer}", random, gamma)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = _COMMON | CONFIGURATIONS[model]
    config |= {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=1))
    return folder


def _experts(layer: str, random: Any, gamma: Any) -> dict[str, Any]:
    block = f"{layer}.block_sparse_moe"
    tensors = {
        f"{layer}.input_layernorm.weight": gamma(HIDDEN),
        f"{layer}.post_attention_layernorm.weight": gamma(HIDDEN),
        f"{block}.gate.weight": random(EXPERTS, HIDDEN, scale=0.2),
    }
    for expert in range(EXPERTS):
        for name, shape in (("w1", (INTERMEDIATE, HIDDEN)), ("w2", (HIDDEN, INTERMEDIATE)),
                            ("w3", (INTERMEDIATE, HIDDEN))):  # fmt: skip
            weight = random(*shape, scale=shape[1] ** -0.5)
            tensors[f"{block}.experts.{expert}.{name}.weight"] = weight
    return tensors


def _dense(layer: str, random: Any, gamma: Any) -> dict[str, Any]:
    return {
        f"{layer}.post_attention_layernorm.weight": gamma(HIDDEN),
        f"{layer}.post_feedforward_layernorm.weight": gamma(HIDDEN),
        f"{layer}.mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        f"{layer}.mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        f"{layer}.mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    }
