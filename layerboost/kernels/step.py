"""Decodes `linear_window` by kernels: one token of each sequence attends to the slots of its window and the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import LOWEST, load_rows, load_tile, precision, query_features, store_tile


@triton.jit
def _step_kernel(
    query, key, value, visible, logits, sums, norms, output, scaling, n_slots, ring_stride,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_STATE: tl.constexpr, CAP: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_V output columns of one group of heads, which share keys, values and state."""
    head = tl.program_id(0).to(tl.int64)
    group, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    own_columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key, value, visible = key + head * ring_stride, value + head * ring_stride, visible + head // K * n_slots
    q = load_tile(query + head * G * D, group, columns, G, D)
    m = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    summed = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for start in range(0, n_slots, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        seen = slots < n_slots
        if HAS_VISIBLE:
            seen = seen & tl.load(visible + slots, mask=seen, other=False)
        k = load_tile(key, slots, columns, n_slots, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, axis=1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(m - higher)
        v = load_tile(value, slots, own_columns, n_slots, D)
        total = total * shrink + tl.sum(weights, axis=1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        m = higher
    if HAS_STATE:
        for r in range(0, R, BLOCK_R):
            feature = r + tl.arange(0, BLOCK_R)
            a = query_features(load_tile(logits + head * G * R, group, feature, G, R), m, m, CAP)
            norm = load_rows(norms + head * R, feature, R)
            total += tl.sum(a * norm[None, :], axis=1)
            past = load_tile(sums + head * R * D, feature, own_columns, R, D)
            summed += tl.dot(a, past, input_precision=PRECISION)
    store_tile(output + head * G * D, group, own_columns, G, D, summed / total[:, None])


@triton.jit
def _evict_kernel(
    features, value, sums, norms, mask,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    goes = True
    if HAS_MASK:
        goes = tl.load(mask + head // K)
    if goes:
        rows, columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        sums, norms = sums + head * R * D, norms + head * R
        b = load_rows(features + head * R, rows, R).to(tl.float32)
        v = tl.load(value + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        store_tile(sums, rows, columns, R, D, load_tile(sums, rows, columns, R, D) + b[:, None] * v[None, :])
        norm = load_rows(norms, rows, R)
        tl.store(norms + rows, norm + b, mask=rows < R)


def linear_window_step(
    query: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    logits: torch.Tensor,
    *,
    scaling: float,
    logit_cap: float,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax over the slots of a window, in any order, plus linear attention over the state.

    Both parts have one common denominator. No gradient passes through.

    Args:
        query: (B, H, D).
        key_ring, value_ring: (B, K, W, D), including the query's own token; they may be the first W slots of longer
            rings.
        logits: (B, H, R), a_r(q).
        scaling: Factor on the scores.
        logit_cap: Maximum of a_r minus the largest score of the window.
        state: Sums (B, K, R, D) and norms (B, K, R), fp32 and contiguous, over all older tokens.
        visible: (B, W) bool, False for slots that are empty or hold padding, True for the query's own; None means all
            True.

    Returns:
        (B, H, D) in the dtype of `query`.

    Raises:
        ValueError: A ring or a state has another layout and would have to be copied at each step.
    """
    batch, n_kv_heads, n_slots, head_dim = key_ring.shape
    n_heads, n_features = logits.shape[1:]
    ring_stride = key_ring.stride(1)
    for name, ring in (("key_ring", key_ring), ("value_ring", value_ring)):
        if ring.stride() != (n_kv_heads * ring_stride, ring_stride, head_dim, 1):
            raise ValueError(
                f"{name}: strides {ring.stride()}; give contiguous rings of one length, or their first slots"
            )
    if state is not None:
        _check_state(state)
    query, logits = query.contiguous(), logits.contiguous()
    output = torch.empty_like(query)
    visible = None if visible is None else visible.contiguous()
    block_v = min(triton.next_power_of_2(head_dim), 64)  # gives more programs than heads if there are few sequences
    sums, norms = (logits, logits) if state is None else state
    with torch.cuda.device_of(query):
        _step_kernel[(batch * n_kv_heads, triton.cdiv(head_dim, block_v))](
            query, key_ring, value_ring, logits if visible is None else visible, logits, sums, norms, output,
            scaling, n_slots, ring_stride,
            K=n_kv_heads, G=n_heads // n_kv_heads, D=head_dim, R=n_features, HAS_VISIBLE=visible is not None,
            HAS_STATE=state is not None, CAP=logit_cap, BLOCK_G=max(triton.next_power_of_2(n_heads // n_kv_heads), 16),
            BLOCK=32, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_V=block_v, BLOCK_R=32, PRECISION=precision(query),
            num_stages=2,
        )  # fmt: skip
    return output


def linear_window_evict(
    features: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor,
    norms: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Adds the tokens that leave their windows to the state, in place.

    Args:
        features: (B, K, R), b_r(k) of the token that leaves.
        value: (B, K, D), its value.
        sums, norms: (B, K, R, D) and (B, K, R), fp32 and contiguous.
        mask: (B,) bool, False for sequences from which no token, or only padding, leaves; None means all True.

    Raises:
        ValueError: The state is not fp32 or not contiguous.
    """
    _check_state((sums, norms))
    batch, n_kv_heads, n_features, head_dim = sums.shape
    mask = None if mask is None else mask.contiguous()
    with torch.cuda.device_of(sums):
        _evict_kernel[(batch * n_kv_heads, triton.cdiv(n_features, 32))](
            features.contiguous(), value.contiguous(), sums, norms, features if mask is None else mask,
            K=n_kv_heads, D=head_dim, R=n_features, HAS_MASK=mask is not None,
            BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_R=32,
        )  # fmt: skip


def _check_state(state: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, part in zip(("sums", "norms"), state, strict=True):
        if part.dtype != torch.float32 or not part.is_contiguous():
            raise ValueError(f"{name}: {part.dtype} with strides {part.stride()}; the state is fp32 and contiguous")
