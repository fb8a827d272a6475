"""Backward kernels of `linear_window`. They recompute the weights of all pairs and store nothing of size T x S.

With P the normalised weight of a query and a key, o the output and delta = do . o, the gradient of a weight before
normalisation is P (do . v - delta), for the window as well as for the features. The gradient of what queries read from
the state reaches the keys through a state, too: sums of features x do and of features x delta over all later blocks of
queries. Peaks are treated as constants, because they cancel except where a feature is capped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .forward import SinkTensors, block_of_sinks, chunk_states
from .tiles import (
    CHUNK_TOKENS,
    end_of_block_queries,
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
def _query_kernel(
    query, key, value, valid, sink_key, sink_value, sink_positions, d_output, delta, log_total, d_query,
    scaling, window, n_queries, n_keys, n_sinks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of BLOCK queries of one head from the scores of sinks and inside their windows."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    first = n_keys - n_queries + tl.program_id(1) * BLOCK
    positions = n_keys - n_queries + rows
    key, value, valid = key + head // G * n_keys * D, value + head // G * n_keys * D, valid + head // H * n_keys
    q = load_tile(query + head * n_queries * D, rows, columns, n_queries, D)
    do = load_tile(d_output + head * n_queries * D, rows, columns, n_queries, D)
    row_delta = load_rows(delta + head * n_queries, rows, n_queries)
    offset = load_rows(log_total + head * n_queries, rows, n_queries)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if BLOCK_M > 0:
        sinks = tl.arange(0, BLOCK_M)
        at = load_sink_positions(sink_positions + head // H * n_sinks, sinks, n_sinks)
        # Triton takes a name that a later loop assigns for one that the loop carries, of one shape.
        sink_k = load_tile(sink_key + head // G * n_sinks * D, sinks, columns, n_sinks, D)
        sink_v = load_tile(sink_value + head // G * n_sinks * D, sinks, columns, n_sinks, D)
        sink_scores = tl.dot(q, tl.trans(sink_k), input_precision=PRECISION) * scaling
        sink_scores = tl.where(sinks_before_window(positions, at, window), sink_scores, float("-inf"))
        sink_ds = tl.exp(sink_scores - offset[:, None]) * (
            tl.dot(do, tl.trans(sink_v), input_precision=PRECISION) - row_delta[:, None]
        )
        dq += tl.dot(sink_ds.to(sink_k.dtype), sink_k, input_precision=PRECISION)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK, n_keys), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = load_valid(valid, keys, n_keys, HAS_VALID)
        k = load_tile(key, keys, columns, n_keys, D)
        v = load_tile(value, keys, columns, n_keys, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        scores = tl.where(inside_window(positions, keys, seen, window), scores, float("-inf"))
        ds = tl.exp(scores - offset[:, None]) * (
            tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None]
        )
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_tile(d_query + head * n_queries * D, rows, columns, n_queries, D, dq * scaling)


@triton.jit
def _sinks_kernel(
    query, sink_key, sink_value, sink_positions, d_output, delta, log_total, d_sink_key, d_sink_value,
    scaling, window, n_queries, n_keys, n_sinks,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one head's sinks from all queries of the group that see them besides their windows."""
    head = tl.program_id(0).to(tl.int64)
    sinks, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = load_sink_positions(sink_positions + head // K * n_sinks, sinks, n_sinks)
    k = load_tile(sink_key + head * n_sinks * D, sinks, columns, n_sinks, D)
    v = load_tile(sink_value + head * n_sinks * D, sinks, columns, n_sinks, D)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for group in range(G):
        query_head = head * G + group
        for start in range(0, n_queries, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            q = load_tile(query + query_head * n_queries * D, rows, columns, n_queries, D)
            do = load_tile(d_output + query_head * n_queries * D, rows, columns, n_queries, D)
            row_delta = load_rows(delta + query_head * n_queries, rows, n_queries)
            offset = load_rows(log_total + query_head * n_queries, rows, n_queries)
            visible = sinks_before_window(n_keys - n_queries + rows, at, window) & (rows < n_queries)[:, None]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            weights = tl.exp(tl.where(visible, scores, float("-inf")) - offset[:, None])
            ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
            dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    store_tile(d_sink_key + head * n_sinks * D, sinks, columns, n_sinks, D, dk * scaling)
    store_tile(d_sink_value + head * n_sinks * D, sinks, columns, n_sinks, D, dv)


@triton.jit
def _logits_kernel(
    value, logits, features, valid, sums, norms, d_output, delta, peak, log_total, d_logits,
    window, n_queries, n_keys, n_chunks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_VALID: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of BLOCK x BLOCK_R query logits of one head from older keys and the state."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    first = n_keys - n_queries + tl.program_id(1) * BLOCK
    positions = n_keys - n_queries + rows
    value, valid = value + head // G * n_keys * D, valid + head // H * n_keys
    features, logits = features + head // G * n_keys * R, logits + head * n_queries * R
    do = load_tile(d_output + head * n_queries * D, rows, columns, n_queries, D)
    row_delta = load_rows(delta + head * n_queries, rows, n_queries)

    chunk = first_chunk(first, window, CHUNK)
    state = (head // G * n_chunks + chunk) * R
    past = load_tile(sums + state * D, feature, columns, R, D)
    norm = load_rows(norms + state, feature, R)
    da = tl.dot(do.to(tl.float32), tl.trans(past), input_precision=PRECISION) - row_delta[:, None] * norm[None, :]
    for start in range(chunk * CHUNK, tl.minimum(first + BLOCK, n_keys) - window, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = load_valid(valid, keys, n_keys, HAS_VALID)
        v = load_tile(value, keys, columns, n_keys, D)
        b = load_tile(features, keys, feature, n_keys, R).to(tl.float32)
        d_linear = tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None]
        d_linear = tl.where(older_than_window(positions, keys, seen, window), d_linear, 0.0)
        da += tl.dot(d_linear, b, input_precision=PRECISION)

    row_peak = load_rows(peak + head * n_queries, rows, n_queries)
    offset = load_rows(log_total + head * n_queries, rows, n_queries)
    a = load_tile(logits, rows, feature, n_queries, R).to(tl.float32)
    da = tl.where(a <= row_peak[:, None] + CAP, da * query_features(a, row_peak, offset, CAP), 0.0)
    store_tile(d_logits + head * n_queries * R, rows, feature, n_queries, R, da)


@triton.jit
def _state_gradients_kernel(
    logits, d_output, delta, peak, log_total, d_sums, d_norms, window, n_queries, n_keys, n_chunks,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, for each chunk, over all queries that read it from the state, from the last chunk to the first."""
    head = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total_norm = tl.zeros([BLOCK_R], tl.float32)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step
        end = end_of_block_queries(chunk, n_queries, n_keys, window, CHUNK, BLOCK)
        if step > 0:
            previous_end = end_of_block_queries(chunk + 1, n_queries, n_keys, window, CHUNK, BLOCK)
            for group in range(G):
                query_head = head * G + group
                for start in range(end, previous_end, BLOCK):
                    rows = start + tl.arange(0, BLOCK)
                    do = load_tile(d_output + query_head * n_queries * D, rows, columns, n_queries, D)
                    row_delta = load_rows(delta + query_head * n_queries, rows, n_queries)
                    row_peak = load_rows(peak + query_head * n_queries, rows, n_queries)
                    offset = load_rows(log_total + query_head * n_queries, rows, n_queries)
                    a = load_tile(logits + query_head * n_queries * R, rows, feature, n_queries, R)
                    a = query_features(a, row_peak, offset, CAP)
                    total += tl.dot(tl.trans(a), do.to(tl.float32), input_precision=PRECISION)
                    total_norm += tl.sum(a * row_delta[:, None], axis=0)
        store_tile(d_sums + (head * n_chunks + chunk) * R * D, feature, columns, R, D, total)
        if tl.program_id(2) == 0:
            tl.store(d_norms + (head * n_chunks + chunk) * R + feature, total_norm, mask=feature < R)


@triton.jit
def _key_value_kernel(
    query, key, value, logits, features, valid, summed_keys, d_sums, d_output, delta, peak, log_total, d_key, d_value,
    scaling, window, n_queries, n_keys, n_chunks,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SUMMED: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of BLOCK keys (by their scores) and values from the queries of all heads of the group."""
    head = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    before = n_keys - n_queries
    first = tl.program_id(1) * BLOCK
    chunk = first // CHUNK
    end = end_of_block_queries(chunk, n_queries, n_keys, window, CHUNK, BLOCK)
    features = features + head * n_keys * R
    seen = load_valid(valid + head // K * n_keys, keys, n_keys, HAS_VALID)
    summed = load_valid(summed_keys + head // K * n_keys, keys, n_keys, HAS_SUMMED)
    k = load_tile(key + head * n_keys * D, keys, columns, n_keys, D)
    v = load_tile(value + head * n_keys * D, keys, columns, n_keys, D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for group in range(G):
        query_head = head * G + group
        for start in range(
            tl.maximum(first - before, 0), tl.minimum(first + BLOCK + window - 1 - before, n_queries), BLOCK
        ):
            rows = start + tl.arange(0, BLOCK)
            q = load_tile(query + query_head * n_queries * D, rows, columns, n_queries, D)
            do = load_tile(d_output + query_head * n_queries * D, rows, columns, n_queries, D)
            row_delta = load_rows(delta + query_head * n_queries, rows, n_queries)
            offset = load_rows(log_total + query_head * n_queries, rows, n_queries)
            inside = inside_window(before + rows, keys, seen, window) & (rows < n_queries)[:, None]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            weights = tl.exp(tl.where(inside, scores, float("-inf")) - offset[:, None])
            ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
            dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
        for start in range(tl.maximum(first + window - before, 0), end, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            do = load_tile(d_output + query_head * n_queries * D, rows, columns, n_queries, D)
            row_peak = load_rows(peak + query_head * n_queries, rows, n_queries)
            offset = load_rows(log_total + query_head * n_queries, rows, n_queries)
            linear = tl.zeros([BLOCK, BLOCK], tl.float32)
            for r in range(0, R, BLOCK_R):
                feature = r + tl.arange(0, BLOCK_R)
                a = load_tile(logits + query_head * n_queries * R, rows, feature, n_queries, R)
                b = load_tile(features, keys, feature, n_keys, R).to(tl.float32)
                linear += tl.dot(query_features(a, row_peak, offset, CAP), tl.trans(b), input_precision=PRECISION)
            older = older_than_window(before + rows, keys, summed, window) & (rows < end)[:, None]
            dv += tl.dot(tl.trans(tl.where(older, linear, 0.0)), do.to(tl.float32), input_precision=PRECISION)
    for r in range(0, R, BLOCK_R):
        feature = r + tl.arange(0, BLOCK_R)
        b = tl.where(summed[:, None], load_tile(features, keys, feature, n_keys, R).to(tl.float32), 0.0)
        later = load_tile(d_sums + (head * n_chunks + chunk) * R * D, feature, columns, R, D)
        dv += tl.dot(b, later, input_precision=PRECISION)
    store_tile(d_key + head * n_keys * D, keys, columns, n_keys, D, dk * scaling)
    store_tile(d_value + head * n_keys * D, keys, columns, n_keys, D, dv)


@triton.jit
def _features_kernel(
    value, logits, valid, d_sums, d_norms, d_output, delta, peak, log_total, d_features,
    window, n_queries, n_keys, n_chunks,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_VALID: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of BLOCK_R features of BLOCK keys from the queries of all heads of the group."""
    head = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    before = n_keys - n_queries
    first = tl.program_id(1) * BLOCK
    chunk = first // CHUNK
    end = end_of_block_queries(chunk, n_queries, n_keys, window, CHUNK, BLOCK)
    seen = load_valid(valid + head // K * n_keys, keys, n_keys, HAS_VALID)
    v = load_tile(value + head * n_keys * D, keys, columns, n_keys, D)
    state = (head * n_chunks + chunk) * R
    later = load_tile(d_sums + state * D, feature, columns, R, D)
    later_norm = load_rows(d_norms + state, feature, R)
    db = tl.dot(v.to(tl.float32), tl.trans(later), input_precision=PRECISION) - later_norm[None, :]
    for group in range(G):
        query_head = head * G + group
        for start in range(tl.maximum(first + window - before, 0), end, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            do = load_tile(d_output + query_head * n_queries * D, rows, columns, n_queries, D)
            row_delta = load_rows(delta + query_head * n_queries, rows, n_queries)
            row_peak = load_rows(peak + query_head * n_queries, rows, n_queries)
            offset = load_rows(log_total + query_head * n_queries, rows, n_queries)
            a = load_tile(logits + query_head * n_queries * R, rows, feature, n_queries, R)
            d_linear = tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None]
            older = older_than_window(before + rows, keys, seen, window) & (rows < end)[:, None]
            d_linear = tl.where(older, d_linear, 0.0)
            db += tl.dot(tl.trans(d_linear), query_features(a, row_peak, offset, CAP), input_precision=PRECISION)
    store_tile(d_features + head * n_keys * R, keys, feature, n_keys, R, tl.where(seen[:, None], db, 0.0))


def backward(
    d_output: torch.Tensor,
    output: torch.Tensor,
    peak: torch.Tensor,
    log_total: torch.Tensor,
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
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of query, key, value, logits, features, and keys and values of the sinks, in their dtypes.

    Those of the sinks are None if there are none.
    """
    batch, n_heads, n_queries, head_dim = query.shape
    n_kv_heads, n_keys, n_features = key.shape[1], key.shape[2], features.shape[-1]
    d_output = d_output.contiguous()
    delta = (d_output.float() * output.float()).sum(dim=-1)
    has_valid, has_summed = valid is not None, summed is not None
    sums, norms = chunk_states(features, value, summed, state)
    valid, summed = features if valid is None else valid, features if summed is None else summed
    n_chunks = sums.shape[2]
    d_query, d_key, d_value, d_logits, d_features = (torch.empty_like(x) for x in (query, key, value, logits, features))

    blocks = launch_options(value)
    sizes = {"G": n_heads // n_kv_heads, "D": head_dim, "PRECISION": precision(query), **blocks}
    featured = {**sizes, "R": n_features, "CAP": cap, "CHUNK": CHUNK_TOKENS}
    query_blocks, key_blocks = triton.cdiv(n_queries, blocks["BLOCK"]), triton.cdiv(n_keys, blocks["BLOCK"])
    feature_blocks = triton.cdiv(n_features, blocks["BLOCK_R"])

    n_sinks, block_m = 0 if sinks is None else sinks[0].shape[2], block_of_sinks(sinks)
    unfeatured = {name: size for name, size in sizes.items() if name != "BLOCK_R"}
    _query_kernel[(batch * n_heads, query_blocks)](
        query, key, value, valid, *(sinks or (key, value, features)), d_output, delta, log_total, d_query,
        scaling, window, n_queries, n_keys, n_sinks, H=n_heads, HAS_VALID=has_valid, BLOCK_M=block_m, **unfeatured,
    )  # fmt: skip
    d_sink_key, d_sink_value = None, None
    if sinks is not None:
        d_sink_key, d_sink_value = torch.empty_like(sinks[0]), torch.empty_like(sinks[1])
        _sinks_kernel[(batch * n_kv_heads,)](
            query, *sinks, d_output, delta, log_total, d_sink_key, d_sink_value,
            scaling, window, n_queries, n_keys, n_sinks, K=n_kv_heads, BLOCK_M=block_m, **unfeatured,
        )  # fmt: skip
    _logits_kernel[(batch * n_heads, query_blocks, feature_blocks)](
        value, logits, features, summed, sums, norms, d_output, delta, peak, log_total, d_logits,
        window, n_queries, n_keys, n_chunks, H=n_heads, HAS_VALID=has_summed, **featured,
    )  # fmt: skip
    d_sums, d_norms = sums, norms  # reuses the memory, as the states were read for the last time above
    narrow = min(blocks["BLOCK_D"], 64)
    _state_gradients_kernel[(batch * n_kv_heads, feature_blocks, triton.cdiv(head_dim, narrow))](
        logits, d_output, delta, peak, log_total, d_sums, d_norms, window, n_queries, n_keys, n_chunks,
        **{**featured, "BLOCK_D": narrow},
    )  # fmt: skip
    _key_value_kernel[(batch * n_kv_heads, key_blocks)](
        query, key, value, logits, features, valid, summed, d_sums, d_output, delta, peak, log_total, d_key, d_value,
        scaling, window, n_queries, n_keys, n_chunks, K=n_kv_heads, HAS_VALID=has_valid, HAS_SUMMED=has_summed,
        **featured,
    )  # fmt: skip
    _features_kernel[(batch * n_kv_heads, key_blocks, feature_blocks)](
        value, logits, summed, d_sums, d_norms, d_output, delta, peak, log_total, d_features,
        window, n_queries, n_keys, n_chunks, K=n_kv_heads, HAS_VALID=has_summed, **featured,
    )  # fmt: skip
    return d_query, d_key, d_value, d_logits, d_features, d_sink_key, d_sink_value
