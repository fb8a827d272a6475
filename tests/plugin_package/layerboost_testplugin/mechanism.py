"""Implements `gated_mean`: each head returns the mean of all values so far times a learned gate.

The state is a sum and a count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerboost.cache import StateLayer
from layerboost.families import head_dim, kv_heads
from layerboost.treatments import AttentionCall, Mechanism, whole_by_pairs


class Gate(nn.Module):
    def __init__(self, n_heads: int):
        super().__init__()
        self.logit = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.logit.fill_(1.0)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Multiplies a mean (B, H, T, D) by the gate of each head."""
        return mean * self.logit.sigmoid()[:, None, None]


class MeanLayer(StateLayer):
    """Keeps the sum of the values (B, K, D) and their number (B, 1, 1), in fp32."""

    sums: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.sums = value_states.new_zeros(*value_states.shape[:2], value_states.shape[-1], dtype=torch.float32)
            self.counts = value_states.new_zeros(len(value_states), 1, 1, dtype=torch.float32)
        self.seen_tokens += key_states.shape[2]
        return key_states, value_states

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.sums is None or self.counts is None else {"sums": self.sums, "counts": self.counts}


def pairs(query, key, value, inside, older, *, scaling, weights=None, softcap=None):
    seen = inside.expand(query.shape[0], query.shape[2], key.shape[2]).float()
    mean = (seen / seen.sum(-1, keepdim=True))[:, None] @ value.float()
    return weights(mean.repeat_interleave(query.shape[1] // key.shape[1], dim=1)).to(query.dtype)


def whole(call: AttentionCall) -> torch.Tensor:
    if call.cache is None:
        return whole_by_pairs(pairs, call)
    state, value = call.cache, call.value.float()
    seen = (
        torch.ones(value.shape[0], 1, value.shape[2], 1)
        if call.valid_keys is None
        else call.valid_keys[:, None, :, None]
    )
    seen = seen.to(value)
    before = state.sums[:, :, None] + (value * seen).cumsum(2) - value * seen  # (B, K, T, D)
    n_before = state.counts[..., None] + seen.cumsum(2) - seen
    mean = (before + value) / (n_before + 1)  # a token sees itself, even if it is padding
    state.sums, state.counts = state.sums + (value * seen).sum(2), state.counts + seen.sum(2)
    return call.weights(mean.repeat_interleave(call.query.shape[1] // value.shape[1], dim=1)).to(call.query.dtype)


GATED_MEAN = Mechanism(
    pairs,
    whole=whole,
    step=whole,
    cache=MeanLayer,
    weights=lambda attention, config: Gate(config.num_attention_heads),
    keeps_keys=False,
    state_values=lambda attention: kv_heads(attention.config) * head_dim(attention.config) + 1,
)
