"""Forward kernels of `linear_window`. They compute the state before each chunk of keys, and each query's output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import (
    CHUNK_TOKENS,
    LOWEST,
    first_chunk,
    inside_window,
    launch_options,
    load_rows,
    load_sink_positions,
    load_tile,
    load_valid,
    older_than_window,
    precision,
    query_features,
    sinks_before_window,
    store_tile,
)


@triton.jit
def _states_kernel(
    features, value, valid, first_sums, first_norms, sums, norms, n_keys, n_chunks,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_VALID: tl.constexpr, HAS_STATE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program carries BLOCK_R x BLOCK_D of one head's state through all chunks and writes it before each chunk."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    features, value, valid = features + head * n_keys * R, value + head * n_keys * D, valid + head // K * n_keys
    sums, norms = sums + head * n_chunks * R * D, norms + head * n_chunks * R
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total_norm = tl.zeros([BLOCK_R], tl.float32)
    if HAS_STATE:
        total += load_tile(first_sums + head * R * D, rows, columns, R, D)
        total_norm += load_rows(first_norms + head * R, rows, R)
    for chunk in range(n_chunks):
        store_tile(sums, rows, columns, R, D, total)
        if tl.program_id(2) == 0:
            tl.store(norms + rows, total_norm, mask=rows < R)
        sums, norms = sums + R * D, norms + R
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, n_keys), BLOCK):
            keys = start + tl.arange(0, BLOCK)
            seen = load_valid(valid, keys, n_keys, HAS_VALID)
            b = load_tile(features, keys, rows, n_keys, R).to(tl.float32)
            b = tl.where(seen[:, None], b, 0.0)
            v = load_tile(value, keys, columns, n_keys, D).to(tl.float32)
            total += tl.dot(tl.trans(b), v, input_precision=PRECISION)
            total_norm += tl.sum(b, axis=0)


@triton.jit
def _forward_kernel(
    query, key, value, logits, features, valid, summed_keys, sink_key, sink_value, sink_positions, sums, norms, output,
    peak, log_total, scaling, window, n_queries, n_keys, n_chunks, n_sinks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SUMMED: tl.constexpr, BLOCK_M: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK queries of one head from sinks, their window, older keys, and the state.

    The softmax over the window is online: peak and sums are rescaled as higher scores come up.
    """
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    first = n_keys - n_queries + tl.program_id(1) * BLOCK
    last = tl.minimum(first + BLOCK, n_keys)
    positions = n_keys - n_queries + rows
    query, logits, output = query + head * n_queries * D, logits + head * n_queries * R, output + head * n_queries * D
    key, value, features = (
        key + head // G * n_keys * D,
        value + head // G * n_keys * D,
        features + head // G * n_keys * R,
    )
    valid, summed_keys = valid + head // H * n_keys, summed_keys + head // H * n_keys

    q = load_tile(query, rows, columns, n_queries, D)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if BLOCK_M > 0:
        sinks = tl.arange(0, BLOCK_M)
        at = load_sink_positions(sink_positions + head // H * n_sinks, sinks, n_sinks)
        # Triton takes a name that a later loop assigns for one that the loop carries, of one shape.
        sink_k = load_tile(sink_key + head // G * n_sinks * D, sinks, columns, n_sinks, D)
        sink_v = load_tile(sink_value + head // G * n_sinks * D, sinks, columns, n_sinks, D)
        sink_scores = tl.dot(q, tl.trans(sink_k), input_precision=PRECISION) * scaling
        sink_scores = tl.where(sinks_before_window(positions, at, window), sink_scores, float("-inf"))
        m = tl.maximum(m, tl.max(sink_scores, axis=1))
        sink_weights = tl.exp(sink_scores - m[:, None])
        total += tl.sum(sink_weights, axis=1)
        summed += tl.dot(sink_weights.to(sink_v.dtype), sink_v, input_precision=PRECISION)
    for start in range(tl.maximum(first - window + 1, 0), last, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = load_valid(valid, keys, n_keys, HAS_VALID)
        k = load_tile(key, keys, columns, n_keys, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        scores = tl.where(inside_window(positions, keys, seen, window), scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, axis=1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(m - higher)
        v = load_tile(value, keys, columns, n_keys, D)
        total = total * shrink + tl.sum(weights, axis=1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        m = higher

    chunk = first_chunk(first, window, CHUNK)
    for start in range(chunk * CHUNK, last - window, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = load_valid(summed_keys, keys, n_keys, HAS_SUMMED)
        linear = tl.zeros([BLOCK, BLOCK], tl.float32)
        for r in range(0, R, BLOCK_R):
            feature = r + tl.arange(0, BLOCK_R)
            a = query_features(load_tile(logits, rows, feature, n_queries, R), m, m, CAP)
            b = load_tile(features, keys, feature, n_keys, R).to(tl.float32)
            linear += tl.dot(a, tl.trans(b), input_precision=PRECISION)
        linear = tl.where(older_than_window(positions, keys, seen, window), linear, 0.0)
        v = load_tile(value, keys, columns, n_keys, D).to(tl.float32)
        total += tl.sum(linear, axis=1)
        summed += tl.dot(linear, v, input_precision=PRECISION)

    state = (head // G * n_chunks + chunk) * R
    for r in range(0, R, BLOCK_R):
        feature = r + tl.arange(0, BLOCK_R)
        a = query_features(load_tile(logits, rows, feature, n_queries, R), m, m, CAP)
        norm = load_rows(norms + state, feature, R)
        total += tl.sum(a * norm[None, :], axis=1)
        past = load_tile(sums + state * D, feature, columns, R, D)
        summed += tl.dot(a, past, input_precision=PRECISION)

    store_tile(output, rows, columns, n_queries, D, summed / total[:, None])
    tl.store(peak + head * n_queries + rows, m, mask=rows < n_queries)
    tl.store(log_total + head * n_queries + rows, m + tl.log(total), mask=rows < n_queries)


SinkTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values of the sinks, (B, K, M, D), and their positions (B, M) as indices of the keys (int32).

A sink before the first key has a negative position, one that does not exist a position behind the last key.
"""


def block_of_sinks(sinks: SinkTensors | None) -> int:
    """Returns the rows of a tile that holds all sinks, 0 if there are none."""
    return 0 if sinks is None else max(triton.next_power_of_2(sinks[0].shape[2]), 16)


def chunk_states(
    features: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    state: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns fp32 sums (B, K, N, R, D) and norms (B, K, N, R) over all keys before each chunk of CHUNK_TOKENS keys.

    `valid` (B, S) bool says which keys are summed; None for all.
    """
    batch, n_kv_heads, n_keys, head_dim = value.shape
    n_features, n_chunks = features.shape[-1], triton.cdiv(n_keys, CHUNK_TOKENS)
    sums = value.new_empty((batch, n_kv_heads, n_chunks, n_features, head_dim), dtype=torch.float32)
    norms = value.new_empty((batch, n_kv_heads, n_chunks, n_features), dtype=torch.float32)
    blocks = launch_options(value)
    blocks["BLOCK_D"] = min(blocks["BLOCK_D"], 64)  # gives more programs, since each goes through all chunks in turn
    grid = (
        batch * n_kv_heads,
        triton.cdiv(n_features, blocks["BLOCK_R"]),
        triton.cdiv(head_dim, blocks["BLOCK_D"]),
    )
    first_sums, first_norms = (sums, norms) if state is None else state
    _states_kernel[grid](
        features, value, features if valid is None else valid, first_sums, first_norms, sums, norms, n_keys, n_chunks,
        K=n_kv_heads, D=head_dim, R=n_features, HAS_VALID=valid is not None, HAS_STATE=state is not None,
        CHUNK=CHUNK_TOKENS, PRECISION=precision(value), **blocks,
    )  # fmt: skip
    return sums, norms


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    features: torch.Tensor,
    valid: torch.Tensor | None,
    summed: torch.Tensor | None,
    sinks: SinkTensors | None,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    window: int,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the output (as `query`), and in fp32 (B, H, T) each query's peak and logarithm of its denominator."""
    batch, n_heads, n_queries, head_dim = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    sums, norms = chunk_states(features, value, summed, state)
    output = torch.empty_like(query)
    peak = query.new_empty((batch, n_heads, n_queries), dtype=torch.float32)
    log_total = torch.empty_like(peak)
    blocks = launch_options(value)
    _forward_kernel[(batch * n_heads, triton.cdiv(n_queries, blocks["BLOCK"]))](
        query, key, value, logits, features, features if valid is None else valid,
        features if summed is None else summed, *(sinks or (key, value, features)), sums, norms, output, peak,
        log_total, scaling, window, n_queries, n_keys, sums.shape[2], 0 if sinks is None else sinks[0].shape[2],
        H=n_heads, G=n_heads // n_kv_heads, D=head_dim, R=features.shape[-1], HAS_VALID=valid is not None,
        HAS_SUMMED=summed is not None, BLOCK_M=block_of_sinks(sinks), CAP=cap,
        CHUNK=CHUNK_TOKENS, PRECISION=precision(query), **blocks,
    )  # fmt: skip
    return output, peak, log_total
