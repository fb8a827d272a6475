"""Computes the attention of each treatment, in a naive reference, a full-sequence form and a one-token form.

Shapes: B batch, H query heads, K key/value heads, G = H / K, T query tokens, S key tokens (the last T of them are the
queries' own), D head dimension, R features.

`linear_window` gives the query t with window w the output

    sum_{t-w < j <= t} exp(s_tj) v_j  +  sum_{j <= t-w} f(q_t, k_j) v_j
    -------------------------------------------------------------------      s_tj = scaling * q_t . k_j
    sum_{t-w < j <= t} exp(s_tj)      +  sum_{j <= t-w} f(q_t, k_j)

so softmax inside the window and linear attention over everything older share one denominator. The feature map is
learned per head and positive, in the manner of Hedgehog (arXiv 2402.04347): f(q, k) = sum_r exp(a_r(q)) b_r(k), where
b is a softmax over the R features and therefore bounded, so that the state over the past grows at most with its
length. Everything is divided by exp(m_t), where m_t is the largest score inside the window. The window's part of the
denominator is then at least 1, and exp(a_r - m_t) is capped at exp(FEATURE_LOGIT_CAP), so that no step can overflow or
divide by zero. The paper does not publish its feature map; this one is this project's own choice.

Sinks are the first tokens of a sequence, or of each document in a packed row. Models put weight on them that they have
no other place for (arXiv 2309.17453), so a windowed layer may keep them: they belong to the first sum above, wherever
the window is, and never to the second.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .plan import Treatment

FEATURE_LOGIT_CAP = 30.0
"""Cap of a_r - m_t; an old key may weigh up to exp(30) times the window's best key."""

MIN_CHUNK_TOKENS = 64
"""Minimum number of queries in a chunk of the chunked forms; smaller chunks spend their time on kernel launches."""


class LinearWindow(nn.Module):
    """Computes the learned feature map of one layer: a (queries, H heads) and b (keys, K heads), R = 2 D features.

    Both maps take x to [W x, -W x] with a D x D matrix per head; queries add a bias per feature.
    """

    def __init__(self, n_heads: int, n_kv_heads: int, head_dim: int, scaling: float):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.scaling = n_heads, n_kv_heads, head_dim, scaling
        self.query_weight = nn.Parameter(torch.empty(n_heads, head_dim, head_dim))
        self.query_bias = nn.Parameter(torch.empty(n_heads, 2 * head_dim))
        self.key_weight = nn.Parameter(torch.empty(n_kv_heads, head_dim, head_dim))
        self.reset_parameters()

    @property
    def n_features(self) -> int:
        return 2 * self.head_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the map close to `window`: it describes keys sharply by their largest coordinates, at low weight.

        The values were chosen on two trained models: higher initial weights helped one model and hurt the other.
        """
        eye = torch.eye(self.head_dim, device=self.key_weight.device)
        self.key_weight.copy_((4.0 * eye).expand_as(self.key_weight))
        self.query_weight.copy_((self.scaling * eye).expand_as(self.query_weight))
        self.query_bias.fill_(-4.0)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns query logits a (B, H, T, R) and key features b (B, K, S, R).

        Args:
            query: (B, H, T, D).
            key: (B, K, S, D).
        """
        return self.query_logits(query), self.key_features(key)

    def query_logits(self, query: torch.Tensor) -> torch.Tensor:
        """Returns a (B, H, T, R) of a query (B, H, T, D)."""
        projected = wide(query) @ wide(self.query_weight).transpose(-1, -2)
        return torch.cat([projected, -projected], dim=-1) + wide(self.query_bias)[:, None]

    def key_features(self, key: torch.Tensor) -> torch.Tensor:
        """Returns b (B, K, S, R) of a key (B, K, S, D)."""
        projected = wide(key) @ wide(self.key_weight).transpose(-1, -2)
        return torch.cat([projected, -projected], dim=-1).softmax(dim=-1)


@dataclass
class Sinks:
    """Says which keys of a call are sinks, which all later queries of their document see besides their window.

    Attributes:
        number: Most sinks of one document.
        keys: (B, S) bool, the sinks among the keys.
        n_apart: Number of keys at the front of the call that lie before every query's window, such as the sinks that a
            cache kept. Only the sinks among them are seen.
    """

    number: int
    keys: torch.Tensor
    n_apart: int = 0


def sink_tokens(
    number: int, n_tokens: int, valid: torch.Tensor | None, segments: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Returns which tokens are sinks, (B, n_tokens) bool: the first `number` real ones of each document.

    Args:
        number: Sinks of a document.
        n_tokens: Tokens from the start of the sequences.
        valid: (B, n_tokens) bool, False for padding; None if there is none.
        segments: (B, n_tokens) integer, one for each document of a packed row; None if each row is one document.
        like: Any tensor of the batch, for its size and device.
    """
    if valid is None:
        valid = torch.ones(like.shape[0], n_tokens, dtype=torch.bool, device=like.device)
    counted = valid.long().cumsum(dim=1)
    if segments is not None:
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        counted = counted - ((counted - valid.long()) * starts).cummax(dim=1).values
    return valid & (counted <= number)


def naive_attention(
    treatment: Treatment,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    sinks: int = 0,
    feature_map: LinearWindow | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes attention by its definition, with every pair of tokens written out, as the reference of the fast forms.

    Args:
        query: (B, H, T, D).
        treatment: The treatment.
        key, value: (B, K, S, D) with S >= T; the queries are the last T tokens.
        scaling: Factor of the scores.
        window: Window in tokens, for treatments that need one; the sinks are part of it.
        sinks: First tokens of each document that stay in the window; the rest of it are the newest tokens. The keys
            must then begin with the sequence.
        feature_map: Feature map, for treatments that have one.
        valid: (B, S) bool, False for padding. A query always sees its own key, so that padding stays finite.
        segments: (B, S) integer; tokens of different segments do not see each other.
        softcap: Scores become softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        (B, H, T, D) in the dtype of `query`; zeros for `none`.
    """
    mechanism = treatment.mechanism
    if mechanism.pairs is None:
        return torch.zeros_like(query)
    if treatment.needs_window:
        assert window is not None
        inside, seen = seen_pairs(query, key, window - sinks, valid, segments)
        inside = inside | (seen & _first_tokens(sinks, key, valid, segments)[:, None])
    else:
        inside, seen = seen_pairs(query, key, None, valid, segments)
    older = seen & ~inside if mechanism.sees_older else None
    settings = {"scaling": scaling, "weights": feature_map, "softcap": softcap}
    return mechanism.pairs(query, key, value, inside, older, **settings)


def _first_tokens(
    number: int, key: torch.Tensor, valid: torch.Tensor | None, segments: torch.Tensor | None
) -> torch.Tensor:
    """Returns which keys are among the first `number` real ones of their document, with every pair written out."""
    batch, n_keys = key.shape[0], key.shape[2]
    if valid is None:
        valid = torch.ones(batch, n_keys, dtype=torch.bool, device=key.device)
    if segments is None:
        segments = torch.zeros(batch, n_keys, dtype=torch.long, device=key.device)
    before = torch.ones(n_keys, n_keys, dtype=torch.bool, device=key.device).tril(-1)
    earlier = before & valid[:, None] & (segments[:, :, None] == segments[:, None])
    return valid & (earlier.sum(dim=-1) < number)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inside: torch.Tensor,
    older: torch.Tensor | None,
    *,
    scaling: float,
    feature_map: LinearWindow | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Applies softmax over some keys and linear attention over others, with every pair of tokens written out.

    Args:
        query: (B, H, T, D).
        key, value: (B, K, S, D).
        inside: Bool that broadcasts to (B, T, S): the keys in the softmax, at least one for each query.
        older: The same for the keys of linear attention by `feature_map`; None if there are none.
        scaling, feature_map, softcap: As in `naive_attention`.

    Returns:
        (B, H, T, D) in the dtype of `query`.
    """
    n_groups = query.shape[1] // key.shape[1]
    keys, values = (wide(x).repeat_interleave(n_groups, dim=1) for x in (key, value))
    scores = _softcap(wide(query) @ keys.transpose(-1, -2) * scaling, softcap)
    scores = scores.masked_fill(~inside[:, None], -math.inf)
    peak = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - peak)
    if older is not None:
        assert feature_map is not None
        logits, features = feature_map(query, key)
        query_features = torch.exp((logits - peak).clamp(max=FEATURE_LOGIT_CAP))
        linear = query_features @ features.repeat_interleave(n_groups, dim=1).transpose(-1, -2)
        weights = weights + linear * older[:, None]
    return ((weights @ values) / weights.sum(dim=-1, keepdim=True)).to(query.dtype)


def single_branch_attention(
    zeroed: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int,
    feature_map: LinearWindow,
    sinks: Sinks | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes `linear_window` without one of its branches, to measure a branch; every pair of tokens is written out.

    Arguments and result are those of `window_attention`. `zeroed` is `linear` (which leaves softmax inside the window
    and over the sinks) or `window` (which leaves each query's own key and everything older than the window).
    """
    within, seen = seen_pairs(query, key, window, valid, segments, sinks)
    if zeroed == "linear":
        return dense_attention(query, key, value, within, None, scaling=scaling, softcap=softcap)
    own, _ = seen_pairs(query, key, 1, valid, segments)
    older = seen & ~within
    return dense_attention(query, key, value, own, older, scaling=scaling, feature_map=feature_map, softcap=softcap)


def seen_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    window: int | None,
    valid: torch.Tensor | None,
    segments: torch.Tensor | None,
    sinks: Sinks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys inside the window of each query, and all keys that it may see, (B, T, S) bool each.

    Arguments are those of `window_attention`. Sinks count as inside; without a window the two results are the same.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    distance = torch.arange(n_keys - n_queries, n_keys, device=query.device)[:, None] - torch.arange(
        n_keys, device=query.device
    )
    seen = (distance >= 0)[None].expand(query.shape[0], -1, -1)
    if valid is not None:
        seen = seen & (valid[:, None] | (distance == 0))
    if segments is not None:
        seen = seen & (segments[:, -n_queries:, None] == segments[:, None])
    if window is None:
        return seen, seen
    if sinks is None:
        return seen & (distance < window), seen
    apart = torch.arange(n_keys, device=query.device) < sinks.n_apart
    return seen & (((distance < window) & ~apart) | sinks.keys[:, None]), seen


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int,
    sinks: Sinks | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Applies softmax over the newest tokens, including the query's own, and over the sinks, in time linear in T.

    A single query token is computed directly; more tokens are cut into chunks that see only the keys within their
    reach, and the sinks.

    Args:
        query, key, value, scaling, valid, segments, softcap: As in `naive_attention`.
        window: The number of newest tokens; unlike the window of a plan it does not include the sinks.
        sinks: The sinks among the keys; None if there are none.
        dropout: Probability of dropping a weight.

    Returns:
        (B, H, T, D) in the dtype of `query`.
    """
    n_reach = query.shape[2] + window - 1
    if sinks is None:
        key, value = key[:, :, -n_reach:], value[:, :, -n_reach:]
        valid, segments = (x if x is None else x[:, -n_reach:] for x in (valid, segments))
    else:
        sinks = Sinks(sinks.number, sinks.keys, max(sinks.n_apart, key.shape[2] - n_reach))
    if query.shape[2] == 1:
        mask = _step_mask(key.shape[2], valid, segments, sinks)
        return softmax_attention(query, key, value, mask, scaling, softcap, dropout)
    blocks = _Blocks(query, key, window, valid, segments, sinks)
    output = softmax_attention(
        blocks.chunks(query).flatten(1, 2).transpose(1, 2).flatten(0, 1),  # (B N, H, C, D)
        blocks.reach_and_sinks(key).transpose(1, 2).flatten(0, 1),  # (B N, K, L, D)
        blocks.reach_and_sinks(value).transpose(1, 2).flatten(0, 1),
        blocks.inside.flatten(0, 1)[:, None],
        scaling,
        softcap,
        dropout,
    )
    output = output.unflatten(0, (-1, blocks.n_chunks)).transpose(1, 2)  # (B, H, N, C, D)
    return output.flatten(2, 3)[:, :, : blocks.n_queries]


def linear_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int,
    feature_map: LinearWindow,
    sinks: Sinks | None = None,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    softcap: float | None = None,
    return_state: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Applies softmax inside the window and over the sinks, and linear attention over all others, in time linear in T.

    Both parts share one denominator.

    Args:
        query, key, value, scaling, window, sinks, valid, segments, softcap: As in `window_attention`. At most
            window - 1 keys may precede the queries' own, besides those set apart; older tokens must be in the state.
        feature_map: As in `naive_attention`.
        state: Sums over the tokens older than `key`, without sinks: features x values (B, K, R, D) and features
            (B, K, R), fp32.
        return_state: Whether to return the state that covers all but the last window - 1 keys and the sinks, for the
            next call.

    Returns:
        Output (B, H, T, D) in the dtype of `query`, and the new state (None unless asked for).

    Raises:
        ValueError: There are a state and segments (a cache holds one sequence in each row), or more than window - 1
            keys before the queries' own.
    """
    if state is not None and segments is not None:
        raise ValueError("segments: packed documents cannot go on from a cache; pass them without past_key_values")
    n_apart = 0 if sinks is None else sinks.n_apart
    if key.shape[2] - n_apart - query.shape[2] > window - 1:
        raise ValueError(f"key: {key.shape[2]} keys reach past the window; give the older ones as state")
    if n_apart and key.shape[2] - n_apart - query.shape[2] < window - 1:
        raise ValueError(f"sinks: {n_apart} keys are apart, though the window before the queries is not full")
    n_evicted = max(key.shape[2] - (window - 1), n_apart) if return_state else 0
    if query.shape[2] == 1:
        visible = _step_mask(key.shape[2], valid, None, sinks)
        output = linear_window_step(
            query, key, value, scaling=scaling, feature_map=feature_map, state=state, visible=visible, softcap=softcap
        )
        features = feature_map.key_features(key[:, :, :n_evicted])
    else:
        logits, features = feature_map(query, key)
        kernels = _kernels(query)
        if kernels is not None and kernels.supports(query, key, value, state, segments, softcap):
            options: dict[str, Any] = {"scaling": scaling, "window": window, "logit_cap": FEATURE_LOGIT_CAP}
            if sinks is not None:
                options |= {"sinks": sinks.keys, "n_sinks": sinks.number, "n_apart": sinks.n_apart}
            output = kernels.linear_window_prefill(
                query, key, value, logits, features, state=state, valid=valid, **options
            )
        else:
            blocks = _Blocks(query, key, window, valid, segments, sinks)
            summed = _masked(features, _others(valid, sinks))
            output = _linear_window_chunks(blocks, query, key, value, logits, summed, state, scaling, softcap)
    if not return_state:
        return output, None
    others = _others(valid, sinks)
    left = None if others is None else others[:, :n_evicted]
    return output, add_to_state(state, features[:, :, :n_evicted], value[:, :, :n_evicted], left)


def linear_window_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    feature_map: LinearWindow,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes one query of each sequence, by softmax over the keys of its window, in any order, and by the state.

    Args:
        query: (B, H, 1, D).
        key, value: (B, K, at most window, D), including the query's own.
        scaling, feature_map, softcap: As in `naive_attention`.
        state: As in `linear_window_attention`, over everything older.
        visible: Bool that broadcasts to (B, 1, 1, keys), False for padding; None if all keys are seen.

    Returns:
        (B, H, 1, D) in the dtype of `query`.
    """
    kernels = None if torch.is_grad_enabled() else _kernels(query)
    if kernels is not None and kernels.supports(query, key, value, state, None, softcap):
        return kernels.linear_window_step(
            query[:, :, 0],
            key,
            value,
            feature_map.query_logits(query)[:, :, 0],
            scaling=scaling,
            logit_cap=FEATURE_LOGIT_CAP,
            state=state,
            visible=None if visible is None else visible[:, 0, 0],
        )[:, :, None]
    batch, n_kv_heads, _, head_dim = key.shape
    grouped = wide(query).reshape(batch, n_kv_heads, -1, head_dim)  # (B, K, G, D)
    scores = _softcap(grouped @ wide(key).transpose(-1, -2) * scaling, softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    peak = scores.amax(dim=-1, keepdim=True).detach()
    weights = torch.exp(scores - peak)
    numerator, denominator = weights @ wide(value), weights.sum(dim=-1, keepdim=True)
    if state is not None:
        logits = feature_map.query_logits(query).reshape(batch, n_kv_heads, -1, feature_map.n_features)  # (B, K, G, R)
        query_features = torch.exp((logits - peak).clamp(max=FEATURE_LOGIT_CAP))
        numerator = numerator + query_features @ state[0]
        denominator = denominator + query_features @ state[1].unsqueeze(-1)
    return (numerator / denominator).reshape(query.shape).to(query.dtype)


def _kernels(query: torch.Tensor) -> ModuleType | None:
    """Returns `layerboost.kernels` for tensors on a GPU.

    It is None on other devices, without Triton, or without this package, because a checkpoint has no copy of it.
    """
    if not query.is_cuda:
        return None
    try:
        return importlib.import_module("layerboost.kernels")
    except ModuleNotFoundError:
        return None


def _others(valid: torch.Tensor | None, sinks: Sinks | None) -> torch.Tensor | None:
    """Returns which keys may enter the sums over old tokens, (B, S) bool: all but padding and sinks; None for all."""
    if sinks is None:
        return valid
    return ~sinks.keys if valid is None else valid & ~sinks.keys


def _linear_window_chunks(
    blocks: _Blocks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    features: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    queries, query_logits = blocks.chunks(wide(query)), blocks.chunks(logits)  # (B, K, G, N, C, D or R)
    keys, values = blocks.reach_and_sinks(wide(key)), blocks.reach_and_sinks(wide(value))  # (B, K, N, L + sinks, D)
    key_features = blocks.reach(features)  # (B, K, N, L, R)

    scores = _softcap(queries @ keys.unsqueeze(2).transpose(-1, -2) * scaling, softcap)
    scores = scores.masked_fill(~blocks.inside[:, None, None], -math.inf)
    peak = scores.amax(dim=-1, keepdim=True).detach()  # it cancels in the quotient, so it needs no gradient
    query_features = torch.exp((query_logits - peak).clamp(max=FEATURE_LOGIT_CAP))
    older = query_features @ key_features.unsqueeze(2).transpose(-1, -2) * blocks.older[:, None, None]
    if blocks.sink_index is not None:
        older = F.pad(older, (0, blocks.sink_index.shape[-1]))
    weights = torch.exp(scores - peak) + older
    numerator = weights @ values.unsqueeze(2)
    denominator = weights.sum(dim=-1, keepdim=True)

    # Sums over the keys before each chunk's reach.
    sums, norms = blocks.past(key_features, values[..., : key_features.shape[-2], :], state)
    if blocks.past_seen is not None:
        query_features = query_features * blocks.past_seen[:, None, None, :, :, None]
    numerator = numerator + query_features @ sums.unsqueeze(2)
    denominator = denominator + query_features @ norms[:, :, None, :, :, None]
    return blocks.join(numerator / denominator).to(query.dtype)


class _Blocks:
    """Cuts queries into N chunks of C tokens, and pairs each with the L = C + window - 1 keys within its reach.

    Invisible keys pad the front up to window - 1 keys before the first query, so that query i of a chunk has its
    window at keys i .. i + window - 1 of the chunk's L, and older tokens at keys below i.

    Sinks within a chunk's reach are marked there. Those before it follow the L keys as M more: of all documents only
    the one that the last key before the reach belongs to can go on in the chunk, so they are its sinks.

    Attributes:
        inside: (B, N, C, L + M) bool, the keys that a query sees inside its window or as sinks.
        older: (B, N, C, L) bool, the keys that it sees before its window, and not as sinks.
        past_seen: (B, N, C) bool, the queries whose document includes the last key before their chunk's reach; None if
            there are no segments.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        window: int,
        valid: torch.Tensor | None,
        segments: torch.Tensor | None,
        sinks: Sinks | None = None,
    ) -> None:
        self.n_apart = 0 if sinks is None else sinks.n_apart
        batch, n_keys = key.shape[0], key.shape[2] - self.n_apart
        self.n_queries, self.n_kv_heads, self.window = query.shape[2], key.shape[1], window
        self.chunk_tokens = min(self.n_queries, max(window, MIN_CHUNK_TOKENS))
        self.n_chunks = -(-self.n_queries // self.chunk_tokens)
        self.padding = (
            window - 1 - (n_keys - self.n_queries),
            self.n_chunks * self.chunk_tokens - self.n_queries,
        )
        query_index = torch.arange(self.chunk_tokens, device=query.device)[:, None]
        key_index = torch.arange(self.chunk_tokens + window - 1, device=query.device)
        inside = (key_index >= query_index) & (key_index < query_index + window)
        own = key_index == query_index + window - 1
        if valid is None:
            valid = torch.ones(batch, key.shape[2], dtype=torch.bool, device=query.device)
        seen = self._token_reach(F.pad(valid[:, self.n_apart :], self.padding))[:, :, None]  # (B, N, 1, L)
        if segments is not None:
            # Keys before the first one must belong to no real document; the padding after the last query is never used.
            self.segments = F.pad(segments[:, self.n_apart :], self.padding, value=-1)
            reach = self._token_reach(self.segments)
            seen = seen & (reach[..., window - 1 :, None] == reach[..., None, :])
        self.inside, self.older = (inside & seen) | own, (key_index < query_index) & seen
        self.past_seen = None if segments is None else self._past_seen()
        self.sink_index: torch.Tensor | None = None  # (B, N, M) or (B, 1, M)
        if sinks is not None:
            self._add_sinks(sinks, valid, segments, key_index <= query_index + window - 1, seen)

    def _add_sinks(
        self,
        sinks: Sinks,
        valid: torch.Tensor,
        segments: torch.Tensor | None,
        until_own: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        """Marks the sinks within each chunk's reach, finds those before it, and takes both out of the older keys."""
        in_reach = self._token_reach(F.pad(sinks.keys[:, self.n_apart :], self.padding))[:, :, None] & seen & until_own
        self.older = self.older & ~in_reach
        index = torch.arange(sinks.keys.shape[1], device=valid.device)
        starts = self.n_apart - self.padding[0] + self.chunk_tokens * torch.arange(self.n_chunks, device=valid.device)
        candidates = (sinks.keys & valid)[:, None]  # (B, 1 or N, S)
        if segments is not None:
            last = segments[:, (starts - 1).clamp(min=0)]  # (B, N); a chunk with nothing before it has no candidates
            candidates = candidates & (index < starts[:, None]) & (segments[:, None] == last[..., None])
        found, self.sink_index = candidates.int().topk(min(sinks.number, len(index)), dim=-1)
        if segments is None:
            found = found * (self.sink_index < starts[:, None])  # (B, N, M)
        visible = found.bool()[:, :, None].expand(-1, -1, self.chunk_tokens, -1)
        if segments is not None:
            queries = self._token_reach(self.segments)[..., self.window - 1 :]  # (B, N, C)
            visible = visible & (queries == last[..., None])[..., None]
        self.inside = torch.cat([self.inside | in_reach, visible], dim=-1)

    def _token_reach(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (B, padded S) to (B, N, L)."""
        return x.unfold(1, self.chunk_tokens + self.window - 1, self.chunk_tokens)

    def reach(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (B, K, S, X) to each chunk's keys (B, K, N, L, X)."""
        x = F.pad(x[:, :, self.n_apart :], (0, 0, *self.padding))
        return x.unfold(2, self.chunk_tokens + self.window - 1, self.chunk_tokens).transpose(-1, -2)

    def reach_and_sinks(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (B, K, S, X) to each chunk's keys with the sinks before them, (B, K, N, L + M, X)."""
        reach = self.reach(x)
        if self.sink_index is None:
            return reach
        index = self.sink_index.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        sinks = x.gather(2, index).unflatten(2, self.sink_index.shape[1:])
        return torch.cat([reach, sinks.expand(-1, -1, self.n_chunks, -1, -1)], dim=3)

    def chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (B, H, T, X) to (B, K, G, N, C, X)."""
        x = F.pad(x, (0, 0, 0, self.padding[1]))
        return x.reshape(x.shape[0], self.n_kv_heads, -1, self.n_chunks, self.chunk_tokens, x.shape[-1])

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Reshapes (B, K, G, N, C, X) to (B, H, T, X)."""
        return x.flatten(3, 4).flatten(1, 2)[:, :, : self.n_queries]

    def _past_seen(self) -> torch.Tensor:
        """Returns whether each query's document is that of the last key before its chunk's reach, (B, N, C)."""
        starts = self.chunk_tokens * torch.arange(1, self.n_chunks, device=self.segments.device)
        last = F.pad(self.segments[:, starts - 1], (1, 0), value=-1)  # (B, N)
        return self._token_reach(self.segments)[..., self.window - 1 :] == last[..., None]

    def past(
        self, key_features: torch.Tensor, values: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the state over all keys before each chunk's reach: (B, K, N, R, D) and (B, K, N, R)."""
        features, values = key_features[..., : self.chunk_tokens, :], values[..., : self.chunk_tokens, :]
        if self.past_seen is not None:
            # Only the document of a chunk's last key can continue in later chunks.
            own = self.segments[:, : self.n_chunks * self.chunk_tokens].unflatten(1, (self.n_chunks, -1))
            features = features * (own == own[..., -1:])[:, None, :, :, None]
        sums = features.transpose(-1, -2) @ values
        norms = features.sum(dim=-2)
        if self.past_seen is None:
            sums, norms = sums.cumsum(dim=2) - sums, norms.cumsum(dim=2) - norms
        else:
            sums, norms = _carry_within_document(sums, norms, own)
        if state is not None:
            sums, norms = sums + state[0].unsqueeze(2), norms + state[1].unsqueeze(2)
        return sums, norms


def _carry_within_document(
    sums: torch.Tensor, norms: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns exclusive running sums over chunks; they restart at a chunk that ends in another document."""
    total, total_norm = torch.zeros_like(sums[:, :, 0]), torch.zeros_like(norms[:, :, 0])
    carried, carried_norms = [], []
    for chunk in range(sums.shape[2]):
        carried.append(total)
        carried_norms.append(total_norm)
        if chunk + 1 < sums.shape[2]:
            previous = own[:, chunk - 1, -1] if chunk else torch.full_like(own[:, 0, -1], -1)
            goes_on = (own[:, chunk, -1] == previous)[:, None, None]
            total = total * goes_on[..., None] + sums[:, :, chunk]
            total_norm = total_norm * goes_on + norms[:, :, chunk]
    return torch.stack(carried, dim=2), torch.stack(carried_norms, dim=2)


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Computes softmax attention (B, H, T, D) over any keys; a bool `mask` must broadcast to (B, H, T, S)."""
    n_groups = query.shape[1] // key.shape[1]
    if n_groups > 1 and query.shape[2] == 1 and softcap is None:  # a group's queries see the same keys
        grouped = query.reshape(query.shape[0], key.shape[1], n_groups, -1)
        return softmax_attention(grouped, key, value, mask, scaling, softcap, dropout).reshape(query.shape)
    if n_groups > 1:
        key, value = key.repeat_interleave(n_groups, dim=1), value.repeat_interleave(n_groups, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    scores = _softcap(wide(query) @ wide(key).transpose(-1, -2) * scaling, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=dropout > 0)
    return (weights @ wide(value)).to(query.dtype)


def _step_mask(
    n_keys: int, valid: torch.Tensor | None, segments: torch.Tensor | None, sinks: Sinks | None = None
) -> torch.Tensor | None:
    """Returns the keys that the single query at the end sees, (B, 1, 1, n_keys); None if it sees all."""
    mask = None if valid is None else valid[:, -n_keys:].clone()
    if segments is not None:
        same = segments[:, -n_keys:] == segments[:, -1:]
        mask = same if mask is None else mask & same
    if sinks is not None and sinks.n_apart:
        shown = sinks.keys | (torch.arange(n_keys, device=sinks.keys.device) >= sinks.n_apart)
        mask = shown if mask is None else mask & shown
    if mask is None:
        return None
    mask[:, -1] = True
    return mask[:, None, None]


def _softcap(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _masked(features: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return features if valid is None else features * valid[:, None, :, None]


def add_to_state(
    state: tuple[torch.Tensor, torch.Tensor] | None,
    features: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds tokens to the sums of `linear_window_attention`, in place unless gradients may be wanted.

    Args:
        state: The sums so far; None starts new ones.
        features: Features b (B, K, n, R) of the keys of n tokens.
        value: Their values (B, K, n, D).
        valid: (B, n) bool, False for padding.
    """
    features, value = _masked(features, valid), wide(value)
    if state is None or torch.is_grad_enabled():
        sums, norms = features.transpose(-1, -2) @ value, features.sum(dim=2)
        return (sums, norms) if state is None else (state[0] + sums, state[1] + norms)
    if features.shape[2] == 1:
        state[0].addcmul_(features.transpose(-1, -2), value)
    else:
        state[0].add_(features.transpose(-1, -2) @ value)
    state[1].add_(features.sum(dim=2))
    return state


def wide(x: torch.Tensor) -> torch.Tensor:
    """Converts to at least single precision, for values that are summed or exponentiated."""
    return x if x.dtype == torch.float64 else x.float()
