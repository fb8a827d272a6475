"""Writes tiny models as GGUF files, as llama.cpp's converter does, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_FIXED = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TOKENS = ["<unk>", "<s>", "</s>", *(chr(ord("!") + i) for i in range(92)), "ab"]
MERGES = ["a b"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(
    model: torch.nn.Module,
    file: Path,
    *,
    kind: str = "F32",
    leave_out: str | None = None,
) -> None:
    """Writes a Llama as a GGUF file.

    Args:
        model: A `LlamaForCausalLM` with the vocabulary `TOKENS`.
        file: Where to write it.
        kind: Type of the matrices: F32, F16, or a quantization such as Q8_0.
        leave_out: GGUF name of a tensor to leave out, as in a damaged file.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    quantization = gguf.GGMLQuantizationType[kind]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in _FIXED:
            gguf_name = _FIXED[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            gguf_name = f"blk.{layer}.{_NAMES[part]}"
        if gguf_name == leave_out:
            continue
        values = tensor.float().numpy()
        if (n_heads := heads.get(gguf_name.rsplit(".", 1)[-1])) is not None:  # llama.cpp pairs the rotated halves
            values = values.reshape(n_heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{gguf_name}.weight", np.ascontiguousarray(values, np.float32))
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), quantization)
            writer.add_tensor(f"{gguf_name}.weight", data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
