"""What the kernels share: tiles of row-major matrices, and which keys a query meets how.

Row-major and contiguous throughout, so that a tile needs no strides. Positions are indices of keys; the queries are
the last of them. Block sizes are powers of two: what a tile has beyond its matrix is read as zero and not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK_TOKENS = 128
"""Keys between two stored states, each of the bytes of 2 D tokens in bf16: shorter chunks write more states, longer
ones leave more keys to be met one by one."""

LOWEST = tl.constexpr(-1e30)
"""Below every score, yet finite, so that a peak over nothing visible gives no NaN."""


def launch_options(x: torch.Tensor) -> dict[str, int]:
    """BLOCK tokens, BLOCK_D and BLOCK_R columns of a tile, of sizes at which no kernel spills much or fills an SM."""
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
    """How products of fp32 tiles are taken: as exactly as fp32 where x is fp32, else with the range of fp32 alone."""
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
    """Which keys exist and are no padding."""
    exists = keys < n_keys
    if HAS_VALID:
        exists = exists & tl.load(valid + keys, mask=exists, other=False)
    return exists


@triton.jit
def inside_window(positions, keys, seen, window):
    """(queries, keys): what softmax meets. A query always sees its own key, so that padding stays finite."""
    distance = positions[:, None] - keys[None, :]
    return (distance == 0) | ((distance > 0) & (distance < window) & seen[None, :])


@triton.jit
def older_than_window(positions, keys, seen, window):
    """(queries, keys): what the features meet."""
    return (positions[:, None] - keys[None, :] >= window) & seen[None, :]


@triton.jit
def first_chunk(position, window, CHUNK: tl.constexpr):
    """The chunk in which the window of the query at `position` starts: all before it is read from the state."""
    return tl.maximum(position - window + 1, 0) // CHUNK


@triton.jit
def end_of_block_queries(chunk, n_queries, n_keys, window, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The first query whose block reads `chunk` from the state; the blocks before it meet its keys one by one."""
    position = (chunk + 1) * CHUNK + window - 1
    return tl.minimum(tl.cdiv(tl.maximum(position - (n_keys - n_queries), 0), BLOCK) * BLOCK, n_queries)


@triton.jit
def query_features(logits, peaks, offsets, CAP: tl.constexpr):
    """exp(a - offset), where a is held below peak + CAP."""
    return tl.exp(tl.minimum(logits.to(tl.float32), peaks[:, None] + CAP) - offsets[:, None])
