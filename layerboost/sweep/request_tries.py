"""Packs requests for log-probabilities into few tokens, so that what requests have in common is read once.

If requests are sorted by their tokens, those with a common beginning are neighbours and merge into a trie: the answer
choices of an item share its context, items of one document share the document so far, prompts share their examples. A
row holds the nodes of its tries in depth-first order, so that a node sees exactly the nodes whose subtree it is in:

    node q sees node k   if and only if   k <= q < end of k's subtree

Everything else in the row is invisible, including padding, and a node's position is its depth. Every request therefore
gets the log-probabilities that it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_ROW_TOKENS = 1024
"""Maximum number of tokens in a row (unless a request is longer): masks grow with the square of a row's length."""

_SIMILAR = 0.85
"""Minimum length of a forest's shortest row as a fraction of its longest; the difference is padding."""


@dataclass(frozen=True)
class Request:
    """Asks for the log-probability of the last `n_scored` of `tokens`, each given all tokens before it."""

    tokens: tuple[int, ...]
    n_scored: int

    def __post_init__(self) -> None:
        if not 0 < self.n_scored < len(self.tokens):
            raise ValueError(f"n_scored: {self.n_scored} of {len(self.tokens)} tokens; give at least 1, but not all")


@dataclass(frozen=True)
class Forest:
    """Holds tries as B rows of T nodes.

    Attributes:
        tokens, depths, ends: (B, T) int64; `ends` is the index after the last node of each node's subtree in its row.
        read_nodes: (n,) int64, the nodes whose next-token distribution is needed, as indices into the B * T nodes.
        edge_node, edge_token: (e,) int64, an index into `read_nodes`, ascending, and a token that follows there.
        edge_request: (e,) int64, the request of each edge, as an index into the packed requests.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    ends: torch.Tensor
    read_nodes: torch.Tensor
    edge_node: torch.Tensor
    edge_token: torch.Tensor
    edge_request: torch.Tensor

    def visible(self) -> torch.Tensor:
        """Returns (B, T, T) bool: True where a query (second axis) sees a key (third axis)."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < self.ends[:, None, :])

    def to(self, device: torch.device) -> Forest:
        return Forest(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Row:
    """Builds a trie; requests must be added sorted by their tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.path: list[int] = []
        self.edges: list[tuple[int, int, int]] = []  # node, token, request

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, request: Request) -> int:
        """Returns how many of the request's input tokens are in the trie already."""
        return n_common([self.tokens[node] for node in self.path], request.tokens[:-1])

    def add(self, index: int, request: Request) -> None:
        n_common = self.common(request)
        for node in self.path[n_common:]:
            self.ends[node] = len(self)
        del self.path[n_common:]
        for token in request.tokens[n_common:-1]:
            self.path.append(len(self))
            self.depths.append(len(self.path) - 1)
            self.ends.append(-1)
            self.tokens.append(token)
        first = len(request.tokens) - 1 - request.n_scored
        for depth in range(first, len(request.tokens) - 1):
            self.edges.append((self.path[depth], request.tokens[depth + 1], index))

    def close(self) -> None:
        for node in self.path:
            self.ends[node] = len(self)


def pack_requests(requests: Sequence[Request], *, batch_rows: int, hidden_size: int) -> list[Forest]:
    """Packs requests into forests of similar rows.

    A request joins the row of its neighbour if the tokens saved outweigh the attention to unrelated tokens in the row:
    a token costs about as much as attention over three times `hidden_size` tokens. A forest's rows have similar
    lengths.

    Args:
        requests: Requests in any order; equal ones are computed once.
        batch_rows: Rows in a forest of the longest rows; forests of shorter rows get more, up to as many tokens.
        hidden_size: The model's hidden size.
    """
    if not requests:
        return []
    capacity = max(max(len(request.tokens) - 1 for request in requests), min(MAX_ROW_TOKENS, 2 * hidden_size))
    rows: list[_Row] = []
    row = _Row()
    for index in sorted(range(len(requests)), key=lambda i: requests[i].tokens):
        request = requests[index]
        n_common = row.common(request)
        n_new = len(request.tokens) - 1 - n_common
        joins = 3 * n_common * hidden_size >= len(row) * n_new and len(row) + n_new <= capacity
        if len(row) and not joins:
            rows.append(row)
            row = _Row()
        row.add(index, request)
    rows.append(row)
    for row in rows:
        row.close()
    rows.sort(key=len, reverse=True)
    batch_tokens = batch_rows * len(rows[0])
    forests = []
    while rows:
        long_enough = sum(len(row) >= _SIMILAR * len(rows[0]) for row in rows)
        n_rows = max(1, min(long_enough, batch_tokens // len(rows[0])))
        forests.append(_forest(rows[:n_rows]))
        rows = rows[n_rows:]
    return forests


def _forest(rows: Sequence[_Row]) -> Forest:
    shape = (len(rows), max(map(len, rows)))
    tokens, depths = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    ends = np.tile(np.arange(1, shape[1] + 1), (shape[0], 1))  # padding sees only itself
    edges = []
    for i, row in enumerate(rows):
        tokens[i, : len(row)], depths[i, : len(row)], ends[i, : len(row)] = row.tokens, row.depths, row.ends
        edges += [(i * shape[1] + node, token, request) for node, token, request in row.edges]
    of_edge, edge_token, edge_request = (np.asarray(column) for column in zip(*sorted(edges), strict=True))
    read_nodes, edge_node = np.unique(of_edge, return_inverse=True)
    arrays = (tokens, depths, ends, read_nodes, edge_node, edge_token, edge_request)
    return Forest(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
