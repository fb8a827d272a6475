"""Holds packed token sequences with their documents and targets, and deals them out in global batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from typing import Self


class BatchError(ValueError):
    """The sequences cannot be divided into the batches that were asked for."""


@dataclass(frozen=True, eq=False)
class PackedText:
    """Holds rows of tokens and what a model must know about them. Indexing and slicing select rows.

    Attributes:
        input_ids: (B, T) token ids.
        position_ids: (B, T) positions that restart at 0 with each document, which makes attention stay inside a
            document; None if each row is one text.
        targets: (B, T) bool, True for the tokens that the model learns to predict; None if these are all tokens but
            each row's first.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2:
            raise BatchError(f"sequences: shape {tuple(self.input_ids.shape)} is not (sequences, tokens); use pack()")
        for name in ("position_ids", "targets"):
            value = getattr(self, name)
            if value is not None and value.shape != self.input_ids.shape:
                raise BatchError(
                    f"{name}: shape {tuple(value.shape)} is not that of the tokens, {tuple(self.input_ids.shape)}; "
                    "give one for each token"
                )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequence_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def n_targets(self) -> int:
        """Number of tokens to predict in all rows."""
        if self.targets is None:
            return len(self) * (self.sequence_tokens - 1)
        return int(self.targets[:, 1:].sum())

    def __getitem__(self, rows: slice | torch.Tensor) -> Self:
        return self._map(lambda x: x[rows])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that are set, by name, as `Distillation` and `AttentionTransfer` take them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.long() if name != "targets" else value for name, value in found.items() if value is not None
        }

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda x: x.to(device))

    def split(self, n: int) -> Iterator[Self]:
        """Yields `n` consecutive slices of the rows whose sizes differ by one row at most."""
        for rows in torch.arange(len(self)).tensor_split(n):
            yield self[rows]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        optional = (None if x is None else change(x) for x in (self.position_ids, self.targets))
        return type(self)(change(self.input_ids), *optional)


@dataclass(frozen=True, eq=False)
class GlobalBatches:
    """Deals out batches that depend only on the seed and the step, however many workers share them.

    Each epoch is one permutation of the sequences. Batches continue across epochs, so that every sequence is used once
    in each epoch even if the batch size does not divide their number. Any step can be asked for directly, which makes
    resuming exact.

    Attributes:
        text: The sequences.
        batch_sequences: Sequences in a global batch, summed over all workers.
        seed: Seed of the permutations.
    """

    text: PackedText
    batch_sequences: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_sequences < 1:
            raise BatchError(f"batch_sequences: {self.batch_sequences} is below 1; ask for at least one sequence")
        if len(self.text) == 0:
            raise BatchError("sequences: there are none; give a longer text")

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in a global batch."""
        return self.batch_sequences * self.text.sequence_tokens

    def indices(self, step: int) -> np.ndarray:
        """Returns the rows of the global batch of `step`; steps count from 0."""
        if step < 0:
            raise BatchError(f"step: {step} is negative; steps count from 0")
        n = len(self.text)
        epochs, offsets = np.divmod(np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences), n)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _epoch_order(self.seed, int(epoch), n)[offsets[here]]
        return rows

    def batch(self, step: int) -> PackedText:
        """Returns the global batch of `step`; each worker takes its own slice of it."""
        return self.text[torch.from_numpy(self.indices(step))]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
