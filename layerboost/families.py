"""Knows where each model family keeps what a conversion touches: layers, attention, and the norms of attention."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


class UnsupportedFamilyError(ValueError):
    """The model's family cannot be converted; the message lists those that can."""


@dataclass(frozen=True)
class Family:
    """Describes one layout of decoder layers.

    Attributes:
        attention: Name of the attention module inside a decoder layer.
        attention_norms: Function from the model's config to the names of the norms that only attention uses (on its
            input or its output). They are removed together with attention. A parallel block that feeds one norm to
            both attention and MLP has none.
    """

    attention: str = "self_attn"
    attention_norms: Callable[[Any], tuple[str, ...]] = lambda config: ("input_layernorm",)

    def norms_behind(self, config: Any) -> tuple[str, ...]:
        """Returns those of `attention_norms` that norm the output of attention before it is added to the stream."""
        return tuple(norm for norm in self.attention_norms(config) if norm.startswith("post_attention"))


_PRE_NORM = Family()
_PRE_AND_POST_NORM = Family(attention_norms=lambda config: ("input_layernorm", "post_attention_layernorm"))
_POST_NORM = Family(attention_norms=lambda config: ("post_attention_layernorm",))
_SHARED_NORM = Family(attention_norms=lambda config: ())

_FAMILIES: dict[str, Family] = {
    "cohere": _SHARED_NORM,
    "gemma": _PRE_NORM,
    "gemma2": _PRE_AND_POST_NORM,
    "gemma3_text": _PRE_AND_POST_NORM,
    "gpt_neox": Family(attention="attention"),
    "granite": _PRE_NORM,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "olmo": _PRE_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "phi": _SHARED_NORM,
    "phi3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "stablelm": Family(
        attention_norms=lambda config: () if config.use_parallel_residual else ("input_layernorm",),
    ),
    "starcoder2": _PRE_NORM,
}

CONVERTED_PREFIX = "layerboost_"
"""Prefix of a converted model's `model_type`; its parent's `model_type` follows."""


def supported_families() -> list[str]:
    """Returns the `model_type` of every family that can be converted."""
    return sorted(_FAMILIES)


def family_of(config: PreTrainedConfig) -> Family:
    """Returns the layout of a model's family, given the config of the parent or of a converted model.

    Raises:
        UnsupportedFamilyError: The layout is unknown; the message names the family and those that can be converted.
    """
    model_type = str(config.model_type).removeprefix(CONVERTED_PREFIX)
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, _FAMILIES, n=1)
    hint = f"did you mean a model of '{near[0]}'? " if near else ""
    raise UnsupportedFamilyError(
        f"model_type: '{model_type}' cannot be converted; {hint}use one of {', '.join(supported_families())}"
    )


def check_family(config: PreTrainedConfig) -> None:
    """Raises UnsupportedFamilyError for a config whose family cannot be converted."""
    family_of(config)


def kv_heads(config: PreTrainedConfig) -> int:
    """Returns the key/value heads of each attention layer.

    A value in the config counts only if the config class has this field: families without grouped heads ignore it.
    """
    grouped = hasattr(type(config), "num_key_value_heads")
    return (config.num_key_value_heads if grouped else None) or config.num_attention_heads


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the dimension of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder layers of a causal language model, first layer first."""
    return cast("nn.ModuleList", model.base_model.layers)


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """Returns the attention module of one layer, or what a conversion put in its place."""
    return getattr(decoder_layers(model)[layer], family_of(model.config).attention)


def native_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Returns the window that the parent itself gives each layer, as transformers' own cache reads the config."""
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    n_layers = config.get_text_config().num_hidden_layers
    return tuple(getattr(layer, "sliding_window", None) for layer in layers[:n_layers])
