"""Functions that the kernels share: tiles of row-major matrices, and masks of which keys a query meets in which way.

All matrices are row-major and contiguous, so that a tile needs no strides. Positions are indices of keys; the queries
are the last of them. Block sizes are powers of two: the part of a tile outside its matrix is read as zero and not
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK_TOKENS = 128
"""Keys between two stored states. A state has the bytes of 2 D tokens in bf16: shorter chunks write more states, longer
chunks leave more keys to be processed one by one."""

LOWEST = tl.constexpr(-1e30)
"""Initial value of a peak: below every score, but finite, so that a peak over no visible key gives no NaN."""


def launch_options(x: torch.Tensor) -> dict[str, int]:
    """Returns BLOCK tokens, BLOCK_D and BLOCK_R columns of a tile, chosen to avoid register spills and to fit an SM."""
    block_d = max(triton.next_power_of_2(x.shape[-1]), 16)
    block = min(128, 16384 // block_d) // x.element_size()
    return {
        "BLOCK": block,
        "BLOCK_D": block_d,
        "BLOCK_R": block,
        "num_warps": 8 if block_d >= 128 else 4,
        "num_stages": 2,
    }


def precision(x: torch.Tensor) -> str:
    """Returns the precision of products of fp32 tiles: nearly that of fp32 if x is fp32, otherwise TF32."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


@triton.jit
def load_tile(matrix, rows, columns, n_rows, n_columns):
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(matrix + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(matrix, rows, columns, n_rows, n_columns, tile):
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tl.store(matrix + rows[:, None] * n_columns + columns[None, :], tile.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(vector, rows, n_rows):
    return tl.load(vector + rows, mask=rows < n_rows, other=0.0)


@triton.jit
def load_valid(valid, keys, n_keys, HAS_VALID: tl.constexpr):
    """Returns which keys exist and are no padding."""
    exists = keys < n_keys
    if HAS_VALID:
        exists = exists & tl.load(valid + keys, mask=exists, other=False)
    return exists


@triton.jit
def inside_window(positions, keys, seen, window):
    """Returns (queries, keys): the pairs in softmax. A query always sees its own key, so that padding stays finite."""
    distance = positions[:, None] - keys[None, :]
    return (distance == 0) | ((distance > 0) & (distance < window) & seen[None, :])


@triton.jit
def older_than_window(positions, keys, seen, window):
    """Returns (queries, keys): the pairs that are weighted by their features."""
    return (positions[:, None] - keys[None, :] >= window) & seen[None, :]


@triton.jit
def load_sink_positions(positions, sinks, n_sinks):
    """Returns the positions of sinks as indices of keys; those beyond the last sink lie behind every query."""
    return tl.load(positions + sinks, mask=sinks < n_sinks, other=1 << 30)


@triton.jit
def sinks_before_window(positions, sink_positions, window):
    """Returns (queries, sinks): the sinks that a query sees besides its window, which holds those inside it itself."""
    return positions[:, None] - sink_positions[None, :] >= window


@triton.jit
def first_chunk(position, window, CHUNK: tl.constexpr):
    """Returns the chunk where the window of the query at `position` starts; older chunks are read from the state."""
    return tl.maximum(position - window + 1, 0) // CHUNK


@triton.jit
def end_of_block_queries(chunk, n_queries, n_keys, window, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the first query whose block reads `chunk` from the state; earlier blocks process its keys one by one."""
    position = (chunk + 1) * CHUNK + window - 1
    return tl.minimum(tl.cdiv(tl.maximum(position - (n_keys - n_queries), 0), BLOCK) * BLOCK, n_queries)


@triton.jit
def query_features(logits, peaks, offsets, CAP: tl.constexpr):
    """Returns exp(a - offset), where a is limited to peak + CAP."""
    return tl.exp(tl.minimum(logits.to(tl.float32), peaks[:, None] + CAP) - offsets[:, None])
