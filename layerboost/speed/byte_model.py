"""Counts the bytes that a decode step must read, which limit its speed, and that a model and its cache hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..convert import convert
from ..families import attention_module, decoder_layers, head_dim, kv_heads, native_windows
from ..plan import Plan, Treatment


@dataclass(frozen=True)
class LayerBytes:
    """Holds what a decode step reads for one layer with one treatment.

    Attributes:
        n_parameters: Number of parameters of the whole layer.
        kv_values_per_token: Number of values that the cache keeps for a token of one sequence.
        window_tokens: Number of newest tokens that the cache keeps; None for all tokens.
        state_values: Number of fp32 values of constant state for one sequence.
    """

    n_parameters: int
    kv_values_per_token: int
    window_tokens: int | None
    state_values: int


class ByteModel:
    """Counts the bytes that one decode step must read; they limit decoding, and are the same on every machine.

    A step reads the weights once (an untied input embedding only at the rows looked up), and the cache of each
    sequence. The cache holds all context tokens in a softmax layer (the newest in a natively sliding one) and the
    window's tokens in a windowed one. linear_window adds an fp32 state of (features x head_dim + features) for each
    key/value head. Activations are left out; every expert of a mixture is counted.

    Parameters are counted on a real converted model on the meta device, which needs no memory for weights.
    """

    def __init__(self, config: PreTrainedConfig):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        self.n_layers = len(decoder_layers(base))
        self.hidden_size = base.config.get_text_config().hidden_size
        text_config = base.config.get_text_config()
        self._kv_values = 2 * kv_heads(text_config) * head_dim(text_config)
        self._native_windows = native_windows(base.config)
        self._base = base
        self._counted: dict[Treatment, tuple[list[int], list[int]]] = {}
        embedding = base.get_input_embeddings().weight
        head = base.get_output_embeddings()
        tied = head is not None and head.weight is embedding
        self._untied_embedding = 0 if tied else embedding.numel()
        self._other_parameters = _n_parameters(base) - sum(self._counts(Treatment.SOFTMAX)[0]) - self._untied_embedding

    def layer(self, index: int, treatment: Treatment, window: int | None = None) -> LayerBytes:
        """Returns the bytes of layer `index` with a treatment; `window` is in tokens, if the treatment needs one."""
        parameters, states = self._counts(treatment)
        if not treatment.mechanism.keeps_keys:
            return LayerBytes(parameters[index], 0, 0, states[index])
        native = self._native_windows[index] if treatment.mechanism.native else None
        kept = window if treatment.needs_window else None if native is None else native - 1  # as in transformers' cache
        return LayerBytes(parameters[index], self._kv_values, kept, states[index])

    def _counts(self, treatment: Treatment) -> tuple[list[int], list[int]]:
        """Returns the numbers of parameters and state values of each layer; counted once for each treatment."""
        if treatment not in self._counted:
            mechanism, layers = treatment.mechanism, range(self.n_layers)
            # The window changes no parameter, so any value works.
            variant = (
                self._base if mechanism.native else convert(self._base, Plan.uniform(treatment, self.n_layers, 16))
            )
            self._counted[treatment] = (
                [_n_parameters(layer) for layer in decoder_layers(variant)],
                [mechanism.state_values(attention_module(variant, layer)) for layer in layers],
            )
        return self._counted[treatment]

    def weight_bytes(self, plan: Plan | None, *, concurrency: int, dtype_bytes: int) -> int:
        """Returns the bytes of the weights that a step reads, including the embedding rows looked up."""
        layers = sum(layer.n_parameters for layer in self._layers(plan))
        return (layers + self._other_parameters + concurrency * self.hidden_size) * dtype_bytes

    def held_bytes(self, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
        """Returns the bytes of all weights and of the cache, which a server holds besides the activations of a call."""
        layers = sum(layer.n_parameters for layer in self._layers(plan))
        cache = self.cache_bytes(plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes)
        return (layers + self._other_parameters + self._untied_embedding) * dtype_bytes + cache

    def cache_bytes(self, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
        """Returns the bytes of the live cache of `concurrency` sequences of `context_tokens` tokens each."""
        sequence = 0
        for layer in self._layers(plan):
            tokens = context_tokens if layer.window_tokens is None else min(layer.window_tokens, context_tokens)
            sequence += layer.kv_values_per_token * tokens * dtype_bytes + layer.state_values * 4
        return concurrency * sequence

    def decode_bytes(self, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
        """Returns the bytes that one decode step reads; None as `plan` means the untouched model."""
        return self.weight_bytes(plan, concurrency=concurrency, dtype_bytes=dtype_bytes) + self.cache_bytes(
            plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes
        )

    def _layers(self, plan: Plan | None) -> list[LayerBytes]:
        if plan is None:
            return [self.layer(i, Treatment.SOFTMAX) for i in range(self.n_layers)]
        plan.check_length(self.n_layers)
        return [self.layer(i, treatment, plan.window) for i, treatment in enumerate(plan.treatments)]


def decode_bytes(
    config: PreTrainedConfig,
    plan: Plan | None,
    *,
    concurrency: int,
    context_tokens: int,
    dtype_bytes: int,
    affine_rank: int | None = None,
) -> int:
    """Returns the bytes that one decode step reads; see `ByteModel`.

    Args:
        config: Config of the untouched parent.
        plan: The plan; None means the untouched model.
        concurrency: Number of sequences decoded together.
        context_tokens: Number of tokens that each sequence's cache covers before the step.
        dtype_bytes: Bytes of a weight and of a cached value.
        affine_rank: Rank of the maps of affine layers; None for whole matrices.
    """
    n_bytes = _byte_model(config).decode_bytes(
        plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes
    )
    if plan is not None and affine_rank is not None:
        width = config.get_text_config().hidden_size
        n_bytes += plan.count(Treatment.AFFINE) * (2 * affine_rank - width) * width * dtype_bytes
    return n_bytes


def held_bytes(
    config: PreTrainedConfig, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int
) -> int:
    """Returns the bytes of all weights and of a cache of `context_tokens` tokens per sequence; see `decode_bytes`."""
    return _byte_model(config).held_bytes(
        plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes
    )


def predicted_speedup(
    config: PreTrainedConfig,
    plan: Plan,
    *,
    concurrency: int,
    context_tokens: int,
    dtype_bytes: int,
    affine_rank: int | None = None,
) -> float:
    """Returns the predicted speedup of decoding if bytes are the limit: the base's bytes divided by the plan's."""
    condition = {"concurrency": concurrency, "context_tokens": context_tokens, "dtype_bytes": dtype_bytes}
    return decode_bytes(config, None, **condition) / decode_bytes(config, plan, **condition, affine_rank=affine_rank)


def kv_bytes_of_layers(config: PreTrainedConfig, dtype_bytes: int) -> dict[Treatment, tuple[float, ...]]:
    """Returns by treatment the bytes by which each layer's cache grows per token of a sequence, once windows are full.

    Args:
        config: Config of the untouched parent.
        dtype_bytes: Bytes of a cached value.
    """
    model = _byte_model(config)
    found = {}
    for treatment in Treatment:
        layers = [model.layer(index, treatment, 1) for index in range(model.n_layers)]
        found[treatment] = tuple(
            0.0 if layer.window_tokens is not None else float(layer.kv_values_per_token * dtype_bytes)
            for layer in layers
        )
    return found


class _ConfigKey:
    """Wraps a config as a dictionary key, so that configs of equal content are equal."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self._text = config, config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ConfigKey) and self._text == other._text


@functools.lru_cache(maxsize=8)
def _cached_byte_model(key: _ConfigKey) -> ByteModel:
    return ByteModel(key.config)


def _byte_model(config: PreTrainedConfig) -> ByteModel:
    return _cached_byte_model(_ConfigKey(config))


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
