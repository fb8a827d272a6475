"""Fits affine maps by least squares: those that stay where a layer's attention was removed.

A map takes the input of a layer's attention to what attention adds to the residual stream (NBL, arXiv 2505.21077). It
is fitted from sums over tokens, so that no token has to be kept: the ridge and the rank that predict held-out tokens
best are chosen from their sums too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .storage.publish import publish_tensors, read_tensors
from .text.sources import TextSource

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges that are tried, as shares of the mean variance of the inputs."""

RANK_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Ranks that `auto` tries, as shares of the width; from a half on, two factors are as large as the whole matrix."""

AUTO_TOLERANCE = 0.01
"""Share by which the held-out error of the rank that `auto` chooses may exceed the least one."""

Rank = int | Literal["full", "auto"]
"""Rank of a map's matrix: a number, `full`, or the smallest that is about as good (`auto`)."""


@dataclass(frozen=True)
class FittedMap:
    """Holds a fitted map y = W x + b of width d, in fp32 on the CPU.

    Attributes:
        bias: (d,).
        weight: (d, d); None if the rank is low.
        up, down: (d, rank) and (rank, d), whose product is W; None if the rank is full.
        ridge: The ridge that was chosen, as in `RIDGES`.
        error: Squared error on held-out tokens, over that of the outputs' mean: 0 is exact, 1 no better than the mean.
    """

    bias: torch.Tensor
    weight: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    ridge: float = 0.0
    error: float = 0.0

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank map; None if it is full."""
        return None if self.down is None else self.down.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by the names of the module's parameters (`treatments.AffineMap`)."""
        named = {"weight": self.weight, "up": self.up, "down": self.down, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class MapsSpec:
    """Says what maps are fitted on.

    Attributes:
        source: The text.
        tokens: Tokens to read, in sequences of `sequence_tokens`; a quarter of them judges the fits.
        sequence_tokens: Tokens of a sequence.
        rank: Rank of the maps.
    """

    source: TextSource
    tokens: int
    sequence_tokens: int
    rank: Rank = "full"

    @property
    def n_sequences(self) -> int:
        return max(2, self.tokens // self.sequence_tokens)


def save_maps(maps: Mapping[int, FittedMap], url: str) -> None:
    """Writes maps by layer as one safetensors file, to a path or an fsspec URL."""
    tensors = {f"{layer}.{name}": t.cpu() for layer, fitted in maps.items() for name, t in fitted.tensors().items()}
    about = {str(layer): {"ridge": fitted.ridge, "error": fitted.error} for layer, fitted in maps.items()}
    publish_tensors(tensors, url, {"maps": json.dumps(about)})


def load_maps(url: str) -> dict[int, FittedMap]:
    """Reads the maps that `save_maps` wrote."""
    tensors, metadata = read_tensors(url)
    named: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, name = key.split(".")
        named.setdefault(int(layer), {})[name] = tensor
    about = json.loads(metadata["maps"])
    return {layer: FittedMap(**named[layer], **about[str(layer)]) for layer in sorted(named)}  # type: ignore[arg-type]


class Moments:
    """Sums of inputs x and outputs y of width d over tokens, in fp64: all that least squares needs.

    Attributes:
        n_tokens: Number of tokens.
        x, y: (d,) sums.
        xx, xy: (d, d) sums of x x^T and of x y^T.
        yy: Sum of |y|^2.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.n_tokens = 0
        self.x, self.y, self.xx, self.xy = zeros(width), zeros(width), zeros(width, width), zeros(width, width)
        self.yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens: x and y (..., d)."""
        x, y = (values.flatten(0, -2).float() for values in (x, y))
        self.n_tokens += len(x)
        self.x += x.double().sum(dim=0)
        self.y += y.double().sum(dim=0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.double().square().sum())

    def squared_error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Returns the mean of |y - W x - b|^2 over the tokens."""
        weight, bias = weight.double(), bias.double()
        x, y, n = self.x / self.n_tokens, self.y / self.n_tokens, self.n_tokens
        quadratic = ((weight @ (self.xx / n)) * weight).sum() + bias @ bias + 2 * bias @ (weight @ x)
        linear = (weight.T * (self.xy / n)).sum() + bias @ y
        return max(0.0, self.yy / n + float(quadratic - 2 * linear))  # rounding may leave it below zero

    @property
    def variance(self) -> float:
        """The mean of |y - mean of y|^2."""
        return self.yy / self.n_tokens - float((self.y / self.n_tokens).square().sum())


def fit_map(train: Moments, held_out: Moments, rank: Rank = "full") -> FittedMap:
    """Fits a map to tokens, with the ridge and, for `auto`, the rank by which it predicts others best.

    A map of low rank is the best of its rank on the tokens that it is fitted to (reduced-rank regression).

    Args:
        train: Sums over the tokens to fit to.
        held_out: Sums over other tokens.
        rank: The rank. `auto` takes the smallest of `RANK_SHARES` of the width whose error on the held-out tokens is at
            most `AUTO_TOLERANCE` above the least, and a full matrix if none is.

    Raises:
        ValueError: The rank is below 1 or above the width, or there are no tokens.
    """
    width = len(train.x)
    if isinstance(rank, int) and not 1 <= rank <= width:
        raise ValueError(f"rank: {rank} is no rank of a map of {width} numbers; use 1 to {width}")
    if not train.n_tokens or not held_out.n_tokens:
        raise ValueError("tokens: a map needs some to be fitted to and some to be judged by; give more text")
    n = train.n_tokens
    mean_x, mean_y = train.x / n, train.y / n
    covariance = train.xx / n - torch.outer(mean_x, mean_x)
    cross = train.xy / n - torch.outer(mean_x, mean_y)
    values, vectors = torch.linalg.eigh(covariance)
    values, rotated = values.clamp(min=0), vectors.T @ cross

    def whole(ridge: float) -> torch.Tensor:
        return ((vectors / (values + ridge * values.mean()).clamp(min=1e-30)) @ rotated).T

    def judged(weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        bias = mean_y - weight @ mean_x
        return held_out.squared_error(weight, bias), bias

    errors = {ridge: judged(whole(ridge))[0] for ridge in RIDGES}
    ridge = min(errors, key=lambda ridge: errors[ridge])
    weight = whole(ridge)
    error, bias = judged(weight)
    scale = max(held_out.variance, 1e-30)
    fitted = FittedMap(bias.float().cpu(), weight.float().cpu(), ridge=ridge, error=error / scale)
    if rank == "full" or rank == width:
        return fitted
    # The leading directions of what the map writes are those that a map of lower rank must keep.
    directions = torch.linalg.eigh(weight @ cross)[1].flip(1)

    def of_rank(number: int) -> FittedMap:
        up = directions[:, :number]
        low_error, low_bias = judged(up @ (up.T @ weight))
        low = {"up": up.float().contiguous().cpu(), "down": (up.T @ weight).float().cpu()}
        return replace(fitted, bias=low_bias.float().cpu(), weight=None, error=low_error / scale, **low)

    if isinstance(rank, int):
        return of_rank(rank)
    tried = [of_rank(number) for number in auto_ranks(width)]
    least = min(each.error for each in (*tried, fitted))
    return next((each for each in tried if each.error <= least * (1 + AUTO_TOLERANCE)), fitted)


def auto_ranks(width: int) -> list[int]:
    """Returns the ranks that `auto` tries for a width, smallest first."""
    return sorted({max(1, round(width * share)) for share in RANK_SHARES})
