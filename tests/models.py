"""Tiny random models of every family, for tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_SPECIAL = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 11, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 11, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.4, "logits_scaling": 2.0},
    "mistral": {"sliding_window": 13, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8},
    "olmo3": {"sliding_window": 11},
}  # fmt: skip

VARIANTS = {
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "stablelm-qk_norm": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "llama-bias": ("llama", {"attention_bias": True, "head_dim": 12}),
}


def tiny_config(name: str, **changes):
    """The configuration of a tiny model of a family, or of one of VARIANTS."""
    model_type, special = VARIANTS.get(name, (name, {}))
    return AutoConfig.for_model(model_type, **{**_COMMON, **_SPECIAL.get(model_type, {}), **special, **changes})


def tiny_model(name: str, *, seed: int | None = None, **changes):
    """A tiny random model in fp32 and evaluation mode; weights differ from call to call unless seeded."""
    if seed is not None:
        torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
    with torch.no_grad():  # norms and biases off their defaults, so that dropping one shows
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), parameter_name
    return model
