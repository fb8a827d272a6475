"""Computes attention over forests (`request_tries.Forest`) and makes the masks of what each query sees.

Rows are short compared with a model's width, so scores are computed densely. Only the keys after a block of queries
are skipped, and after the last layer all nodes that no request reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import softmax_attention
from ..plan import Treatment
from .request_tries import Forest

_QUERY_BLOCK_TOKENS = 64

Step = tuple[Treatment, int | None, int]
"""Part of a plan at one layer: the treatment, and window and sinks if it needs a window (else None and 0)."""


@dataclass
class ForestMask:
    """Says which keys a query sees, (B, Q, T) bool: those `inside` by softmax, those `older` through the feature map.

    `columns` (Q,) are the queries that are needed after this layer, None for all T of them.
    """

    inside: torch.Tensor
    older: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def of_rows(self, rows: torch.Tensor) -> ForestMask:
        return ForestMask(self.inside[rows], None if self.older is None else self.older[rows], self.columns)


class ForestMasks:
    """Makes the masks of a forest for each layer and treatment, each mask once.

    Args:
        forest: The forest, on the model's device.
        family_masks: For each layer the family's own mask over positions, (1, 1, P, P); None if it is causal.
    """

    def __init__(self, forest: Forest, family_masks: list[torch.Tensor | None]):
        self.forest, self._family_masks = forest, family_masks
        self._visible = forest.visible()
        columns = (forest.read_nodes % forest.tokens.shape[1]).unique()
        # Gathering columns pays off only if they are at most half of all.
        self.read_columns = columns if 2 * len(columns) <= forest.tokens.shape[1] else None
        self._made: dict[Any, ForestMask] = {}

    def mask(self, layer: int, step: Step) -> ForestMask:
        is_last = layer == len(self._family_masks) - 1
        family_mask = self._family_masks[layer] if step[0].mechanism.native else None
        key = (is_last, step, None if family_mask is None else layer)
        if key not in self._made:
            self._made[key] = self._make(step, family_mask, self.read_columns if is_last else None)
        return self._made[key]

    def _make(self, step: Step, family_mask: torch.Tensor | None, columns: torch.Tensor | None) -> ForestMask:
        seen, query_depths, depths = self._visible, self.forest.depths, self.forest.depths
        if columns is not None:
            seen, query_depths = seen[:, columns], depths[:, columns]
        treatment, window, sinks = step
        if treatment.needs_window:
            assert window is not None
            is_newest = query_depths[:, :, None] - depths[:, None] < window - sinks
            inside = seen & (is_newest | (depths < sinks)[:, None])
            older = seen & ~inside if treatment.mechanism.sees_older else None
            return ForestMask(inside, older, columns)
        if family_mask is not None:
            over_positions = family_mask[0, 0] if family_mask.dtype == torch.bool else family_mask[0, 0] == 0
            seen = seen & over_positions[query_depths[:, :, None], depths[:, None]]
        return ForestMask(seen, None, columns)


@contextlib.contextmanager
def at_columns(mlp: nn.Module | None, columns: torch.Tensor | None) -> Iterator[None]:
    """Makes an MLP compute only some columns of (B, T, d), as it treats each token by itself; the others are zero."""
    if mlp is None or columns is None:
        yield
        return
    n_tokens = 0

    def gather(module: nn.Module, args: tuple) -> tuple:
        nonlocal n_tokens
        n_tokens = args[0].shape[1]
        return (args[0][:, columns], *args[1:])

    def scatter(module: nn.Module, args: tuple, output: Any) -> Any:
        some = output[0] if isinstance(output, tuple) else output
        whole = some.new_zeros(some.shape[0], n_tokens, some.shape[-1]).index_copy(1, columns, some)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = (mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forest_forward(attend: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """Turns a function of queries (B, H, Q, D) and their `ForestMask` into an attention function of transformers."""

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: ForestMask,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        columns = attention_mask.columns
        some = query if columns is None else query[:, :, columns]
        output = attend(module, some, key, value, attention_mask, scaling, softcap).transpose(1, 2)
        if columns is not None:
            whole = output.new_zeros(output.shape[0], query.shape[2], *output.shape[2:])
            output = whole.index_copy(1, columns, output)
        return output, None

    return forward


def _attend_softmax(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: ForestMask,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    n_groups = query.shape[1] // key.shape[1]
    if n_groups > 1:
        key, value = key.repeat_interleave(n_groups, dim=1), value.repeat_interleave(n_groups, dim=1)
    if mask.columns is not None:
        return softmax_attention(query, key, value, mask.inside[:, None], scaling, softcap, 0.0)
    # No query sees a later key, so a block of queries skips the keys after the block.
    outputs = []
    for start in range(0, query.shape[2], _QUERY_BLOCK_TOKENS):
        end = min(start + _QUERY_BLOCK_TOKENS, query.shape[2])
        inside = mask.inside[:, None, start:end, :end]
        outputs.append(
            softmax_attention(query[:, :, start:end], key[:, :, :end], value[:, :, :end], inside, scaling, softcap, 0.0)
        )
    return torch.cat(outputs, dim=2)


def _attend_by_pairs(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: ForestMask,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    treated = module.layerboost
    settings = {"scaling": scaling, "weights": module._modules.get(treated.treatment.value), "softcap": softcap}
    return treated.mechanism.pairs(query, key, value, mask.inside, mask.older, **settings)


def _attend_uncapped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: ForestMask,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    return _attend_softmax(module, query, key, value, mask, scaling, None)


SOFTMAX_FOREST = "layerboost_softmax_forest"
CAPPED_FOREST = "layerboost_capped_softmax_forest"
PAIRS_FOREST = "layerboost_pairs_forest"
for _name, _attend in (
    (SOFTMAX_FOREST, _attend_uncapped),
    (CAPPED_FOREST, _attend_softmax),
    (PAIRS_FOREST, _attend_by_pairs),
):
    ALL_ATTENTION_FUNCTIONS.register(_name, _forest_forward(_attend))
