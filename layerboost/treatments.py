"""Defines the mechanisms by which a layer computes with each treatment; `plan.TREATMENTS` refers to them.

A treatment works in one of three ways. It may leave the family's own code unchanged (`native`), exchange the function
between the family's projections (`pairs`, `whole`, `step`), or put another module in the attention's place (`replace`).

Shapes are those of `attention.py`: B batch, H query heads, K key/value heads, T query tokens, S key tokens (the last T
of them are the queries' own), D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import cache_utils

from .attention import (
    LinearWindow,
    Sinks,
    add_to_state,
    dense_attention,
    linear_window_attention,
    linear_window_step,
    seen_pairs,
    single_branch_attention,
    sink_tokens,
    softmax_attention,
    window_attention,
)
from .cache import LinearWindowLayer, WindowLayer
from .families import head_dim, kv_heads


@dataclass
class AttentionCall:
    """Holds the inputs of one treated attention module in a forward pass.

    Attributes:
        query: (B, H, T, D).
        key, value: (B, K, S, D), as the layer's cache returned them; for one token these are its slots in any order.
        scaling: Factor of the scores.
        window: The number of newest tokens that the layer sees now, its own among them, and without the sinks; None if
            the treatment needs no window.
        n_sinks: The number of first tokens of each document that it sees too.
        weights: Module with the treatment's own parameters; None if it has none.
        cache: The layer's part of the cache; None in passes without a cache.
        valid: (B, all tokens so far) bool, False for padding; None if there is no padding.
        segments: (B, T) integer; tokens of different segments do not see each other; None if all tokens do.
        softcap: As in `attention.naive_attention`.
        dropout: Probability of dropping an attention weight.
        zeroed: Branch of linear_window that is left out, `linear` or `window`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None = None
    n_sinks: int = 0
    weights: Any = None
    cache: Any = None
    valid: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    softcap: float | None = None
    dropout: float = 0.0
    zeroed: str | None = None

    @property
    def is_step(self) -> bool:
        """Whether this call is for one token that follows those in the cache."""
        return self.cache is not None and self.query.shape[2] == 1

    @property
    def valid_keys(self) -> torch.Tensor | None:
        """The validity (B, S) bool of the keys of a whole pass."""
        if self.valid is None:
            return None
        n_keys = self.key.shape[2]
        return self.cache.valid_keys(self.valid, n_keys) if self.keeps_window else self.valid[:, -n_keys:]

    @property
    def keeps_window(self) -> bool:
        """Whether the layer's part of the cache is one that keeps a window."""
        return isinstance(self.cache, WindowLayer)

    @property
    def sinks(self) -> Sinks | None:
        """The sinks among the keys of a whole pass; None if the layer keeps none."""
        if not self.n_sinks:
            return None
        n_apart = self.cache.n_apart if self.keeps_window else 0
        n_in_order = self.key.shape[2] - n_apart
        n_tokens = n_in_order if self.cache is None else self.cache.seen_tokens
        keys = sink_tokens(self.n_sinks, n_tokens, self.valid, self.segments, self.query)[:, n_tokens - n_in_order :]
        return Sinks(self.n_sinks, nn.functional.pad(keys, (n_apart, 0), value=True), n_apart)

    def visible_slots(self) -> torch.Tensor | None:
        """Returns which of the cache's slots the newest token sees, (B, 1, 1, S) bool; None if it sees all."""
        if self.valid is None:
            return None
        if self.keeps_window:
            return self.cache.visible_slots(self.valid)[:, None, None]
        tokens = torch.arange(self.key.shape[2], device=self.key.device)
        return (self.valid[:, tokens] | (tokens == len(tokens) - 1))[:, None, None]


class Pairs(Protocol):
    """Defines a treatment, with every pair of tokens written out."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inside: torch.Tensor,
        older: torch.Tensor | None,
        *,
        scaling: float,
        weights: Any = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Computes the attention output.

        Args:
            query: (B, H, T, D).
            key, value: (B, K, S, D).
            inside: Bool that broadcasts to (B, T, S): keys inside the query's window, or all keys that it may see if
                the treatment has no window. Each query sees at least its own key.
            older: The same for the keys older than the window; None unless `sees_older`.
            scaling: Factor of the scores.
            weights: Module with the treatment's own parameters.
            softcap: As in `attention.naive_attention`.

        Returns:
            (B, H, T, D) in the dtype of `query`.
        """


Attend = Callable[[AttentionCall], torch.Tensor]
"""Computes the output (B, H, T, D) of one call."""


def _no_state(attention: Any) -> int:
    return 0


@dataclass(frozen=True)
class Mechanism:
    """Describes how a layer computes with a treatment.

    Attributes:
        pairs: Its definition over pairs of tokens. Faster forms are compared with it, and sweeps over prompts with
            shared beginnings compute it.
        native: Whether the layer keeps the family's own attention; `pairs` then only describes it.
        whole: Computes a whole sequence, or a prompt that follows the tokens in a cache; None uses `pairs`.
        step: Computes one token with a cache; None uses `pairs` over the cache's slots.
        cache: Makes the layer's part of the cache, from the window, and from the number of sinks where a plan has
            some. If None, the cache keeps keys and values: those of the window if the treatment needs one, else those
            of all tokens.
        weights: Makes the module with its own parameters, from the attention module and the model's config. The module
            holds them directly and has `reset_parameters()`.
        replace: Makes the module that replaces the attention, from the same two arguments. The module takes
            `hidden_states` and returns a pair: the addition to the residual, and None. Its own parameters are in a
            submodule with the name of the treatment, made as in `weights`.
        keeps_norms: Whether a replaced attention keeps the norm on its input, if only it used it. The norm behind
            attention, which some families have, goes in any case.
        sees_older: Whether tokens older than the window are seen too.
        takes_sinks: Whether its own forms and cache keep the sinks of a plan (`AttentionCall.sinks`). One that has no
            form and no cache of its own does so in any case.
        keeps_keys: Whether the cache keeps keys and values, of the window if there is one, else of all tokens.
        state_values: Returns the number of fp32 values that the cache keeps for one sequence of any length, from the
            attention module.
    """

    pairs: Pairs | None = None
    native: bool = False
    whole: Attend | None = None
    step: Attend | None = None
    cache: Callable[[Any], Any] | None = None
    weights: Callable[[Any, Any], nn.Module] | None = None
    replace: Callable[[Any, Any], nn.Module] | None = None
    keeps_norms: bool = False
    sees_older: bool = False
    takes_sinks: bool = False
    keeps_keys: bool = True
    state_values: Callable[[Any], int] = _no_state

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.replace is None):
            raise ValueError("mechanism: give either pairs, which attends, or replace, which makes another module")

    @property
    def attends(self) -> bool:
        """Whether it replaces the function between the family's projections."""
        return self.pairs is not None and not self.native

    @property
    def may_have_sinks(self) -> bool:
        """Whether a plan with sinks may use it."""
        return self.takes_sinks or not (self.whole or self.step or self.cache)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """Computes the output (B, H, T, D) of one call, by the form that fits the call."""
        assert self.pairs is not None
        if call.is_step:
            return self.step(call) if self.step else step_by_pairs(self.pairs, call)
        return self.whole(call) if self.whole else whole_by_pairs(self.pairs, call, sees_older=self.sees_older)


def whole_by_pairs(pairs: Pairs, call: AttentionCall, *, sees_older: bool = False) -> torch.Tensor:
    """Computes a whole sequence, or tokens that follow a cache's window, with every pair of tokens written out."""
    inside, seen = seen_pairs(call.query, call.key, call.window, call.valid_keys, call.segments, call.sinks)
    older = seen & ~inside if sees_older else None
    settings = {"scaling": call.scaling, "weights": call.weights, "softcap": call.softcap}
    return pairs(call.query, call.key, call.value, inside, older, **settings)


def step_by_pairs(pairs: Pairs, call: AttentionCall) -> torch.Tensor:
    """Computes the attention of one token over all keys in the cache."""
    visible = call.visible_slots()
    every = torch.ones(call.query.shape[0], 1, call.key.shape[2], dtype=torch.bool, device=call.query.device)
    settings = {"scaling": call.scaling, "weights": call.weights, "softcap": call.softcap}
    return pairs(call.query, call.key, call.value, every if visible is None else visible[:, 0], None, **settings)


def softmax_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inside: torch.Tensor,
    older: torch.Tensor | None,
    *,
    scaling: float,
    weights: Any = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Applies softmax over the keys inside; see `Pairs`."""
    return dense_attention(query, key, value, inside, None, scaling=scaling, softcap=softcap)


def _linear_window_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inside: torch.Tensor,
    older: torch.Tensor | None,
    *,
    scaling: float,
    weights: Any = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Applies softmax over the keys inside and linear attention over the older ones; see `Pairs`."""
    return dense_attention(query, key, value, inside, older, scaling=scaling, feature_map=weights, softcap=softcap)


def _window_whole(call: AttentionCall) -> torch.Tensor:
    assert call.window is not None
    return window_attention(
        call.query,
        call.key,
        call.value,
        scaling=call.scaling,
        window=call.window,
        sinks=call.sinks,
        valid=call.valid_keys,
        segments=call.segments,
        softcap=call.softcap,
        dropout=call.dropout,
    )


def _window_step(call: AttentionCall) -> torch.Tensor:
    visible = call.visible_slots()
    return softmax_attention(call.query, call.key, call.value, visible, call.scaling, call.softcap, call.dropout)


def _linear_window_whole(call: AttentionCall) -> torch.Tensor:
    settings = {
        "scaling": call.scaling,
        "window": call.window,
        "sinks": call.sinks,
        "feature_map": call.weights,
        "valid": call.valid_keys,
        "segments": call.segments,
        "softcap": call.softcap,
    }
    if call.zeroed is not None:
        return single_branch_attention(call.zeroed, call.query, call.key, call.value, **settings)
    keeps = call.cache is not None
    output, state = linear_window_attention(
        call.query,
        call.key,
        call.value,
        state=call.cache.state if keeps else None,
        return_state=keeps,
        **settings,
    )
    if keeps:
        call.cache.state = state
    return output


def _linear_window_step(call: AttentionCall) -> torch.Tensor:
    if call.zeroed is not None:
        raise ValueError("use_cache: a branch is zeroed in whole passes only; pass use_cache=False")
    cache, feature_map = call.cache, call.weights
    output = linear_window_step(
        call.query,
        call.key,
        call.value,
        scaling=call.scaling,
        feature_map=feature_map,
        state=cache.state,
        visible=call.visible_slots(),
        softcap=call.softcap,
    )
    if (leaving := cache.leaving()) is not None:
        token, key, value = leaving
        valid = None
        if call.valid is not None:
            valid = call.valid[:, token : token + 1]
            if cache.padding is not None:  # the token may be a sink of a row that begins with padding
                valid = valid & (call.valid[:, : token + 1].sum(dim=1, keepdim=True) > call.n_sinks)
        cache.state = add_to_state(cache.state, feature_map.key_features(key), value, valid)
    return output


def _feature_map(attention: Any, config: Any) -> LinearWindow:
    return LinearWindow(config.num_attention_heads, kv_heads(config), head_dim(config), attention.scaling)


def _feature_state_values(attention: Any) -> int:
    feature_map = attention.linear_window
    return feature_map.n_kv_heads * feature_map.n_features * (feature_map.head_dim + 1)


class NoAttention(nn.Module):
    """Replaces a layer's attention by nothing: it adds zero to the residual and has no parameters and no cache."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class AffineMap(nn.Module):
    """Maps x (..., d) to W x + b, with W as one matrix or, of low rank, as two: `up` (d, rank) times `down` (rank, d).

    Without a fit it adds nothing.
    """

    def __init__(self, width: int, rank: int | None = None):
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.empty(width, width))
        else:
            self.down, self.up = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(width, rank))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Makes the output zero; `down` is drawn, so that training can leave zero."""
        for name, parameter in self.named_parameters():
            if name == "down":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                parameter.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "weight"):
            return nn.functional.linear(x, self.weight, self.bias)
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


class AffineAttention(nn.Module):
    """Replaces a layer's attention by an affine map of its input; it sees no other token and keeps no cache."""

    def __init__(self, width: int, rank: int | None):
        super().__init__()
        self.affine = AffineMap(width, rank)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.affine(hidden_states), None


def _affine_attention(attention: Any, config: Any) -> AffineAttention:
    ranks = (getattr(config, "layerboost", None) or {}).get("affine_ranks") or {}
    return AffineAttention(config.hidden_size, ranks.get(str(attention.layer_idx)))


def no_cache(window: int | None) -> Any:
    """Makes the cache of a layer that keeps nothing."""
    return cache_utils.DummyLayer()  # looked up here because the older transformers of vLLM does not have this class


SOFTMAX = Mechanism(softmax_pairs, native=True)
LINEAR_WINDOW = Mechanism(
    _linear_window_pairs,
    whole=_linear_window_whole,
    step=_linear_window_step,
    cache=LinearWindowLayer,
    weights=_feature_map,
    sees_older=True,
    takes_sinks=True,
    state_values=_feature_state_values,
)
WINDOW = Mechanism(softmax_pairs, whole=_window_whole, step=_window_step, takes_sinks=True)
AFFINE = Mechanism(replace=_affine_attention, cache=no_cache, keeps_norms=True, keeps_keys=False)
NONE = Mechanism(replace=lambda attention, config: NoAttention(), cache=no_cache, keeps_keys=False)
