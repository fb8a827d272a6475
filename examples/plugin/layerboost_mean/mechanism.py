"""Computes a `mean` layer; LayerBoost keeps the window's values in the cache, and decodes by the same function."""

from typing import Any

import torch

from layerboost.treatments import Mechanism


def mean(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inside: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Returns (B, H, T, D) from the values (B, K, S, D) and a mask (B, T, S) of those that each token sees."""
    weights = inside.to(value.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[:, None] @ value).repeat_interleave(query.shape[1] // value.shape[1], dim=1)


MEAN = Mechanism(mean)
