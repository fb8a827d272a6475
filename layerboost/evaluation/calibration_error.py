"""Computes the expected calibration error (ECE): how far a model's confidence is from how often it is right.

Guo et al. 2017 (arXiv 1706.04599): predictions are sorted into 15 bins of equal width by their confidence, and the ECE
is the mean of |accuracy - confidence| over the bins, weighted by their number of predictions. A bin's part is the
absolute mean of `correct - confidence` over all predictions, where those of other bins count as 0. The means of each
item by bin, its *gaps*, are therefore sufficient for the error, its bootstrap over items, and the comparison of two
models over the same items.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .scores import MetricScore

N_BINS = 15
RESAMPLES = 400
_RESAMPLES_AT_ONCE = 50

Gaps = list[list[list[float]]]
"""For each item, pairs of a bin and its gap; bins without predictions are left out."""


def bin_gaps(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Returns (n, 15) float64: for each item and bin the sum of `correct - confidence`, divided by its predictions.

    Args:
        confidence: (n, predictions), the probability that the model gives to its own prediction.
        correct: (n, predictions), whether the prediction is right.
    """
    confidence = confidence.double()
    bins = (confidence * N_BINS).long().clamp(0, N_BINS - 1)
    gaps = torch.zeros(len(confidence), N_BINS, dtype=torch.float64, device=confidence.device)
    return gaps.scatter_add_(1, bins, correct.double() - confidence) / confidence.shape[1]


def calibration_score(task: str, gaps: torch.Tensor) -> MetricScore:
    """Returns the metric `ece` of a task, with a bootstrap error over its items, from their gaps (n, 15)."""
    dense = gaps.cpu().numpy()
    sparse: Gaps = [[[int(b), float(row[b])] for b in np.flatnonzero(row)] for row in dense]
    stderr = float(_resampled(dense).std(ddof=1)) if len(dense) > 1 else None
    return MetricScore(task, "ece", _error(dense), stderr, False, n_items=len(dense), gaps=sparse)


def calibration_difference(base: Gaps, other: Gaps) -> tuple[float, float | None]:
    """Returns how much the other's ECE exceeds the base's, and the standard error by bootstrap over paired items.

    With few predictions the ECE is above 0 even for a calibrated model, and the more so the less confident it is.
    Therefore what noise alone would give a calibrated model with the same bins is subtracted from both, so that lower
    confidence is not held against a model. If an error is real this subtracts too much, so that it takes more items to
    notice it; with many items the correction is negligible.

    Raises:
        ValueError: If the numbers of items differ.
    """
    if len(base) != len(other):
        raise ValueError(f"gaps: {len(base)} items of the base against {len(other)}; score both over the same items")
    dense = [dense_gaps(base).numpy(), dense_gaps(other).numpy()]
    difference = _beyond_chance(dense[1]) - _beyond_chance(dense[0])
    if len(base) < 2:
        return difference, None
    return difference, float((_resampled(dense[1]) - _resampled(dense[0])).std(ddof=1))


def _error(gaps: np.ndarray) -> float:
    return float(np.abs(gaps.mean(axis=0)).sum())


def _beyond_chance(gaps: np.ndarray) -> float:
    if len(gaps) < 2:
        return _error(gaps)
    stderrs = gaps.std(axis=0, ddof=1) / math.sqrt(len(gaps))
    return _error(gaps) - math.sqrt(2 / math.pi) * float(stderrs.sum())  # the mean of |N(0, stderr)|


def _resampled(gaps: np.ndarray) -> np.ndarray:
    """Returns the ECE of resamples of the items; the same items are drawn for any gaps over equally many items."""
    rng, n = np.random.default_rng(0), len(gaps)
    found = []
    for _ in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES_AT_ONCE)
        found.append(np.abs(counts @ gaps / n).sum(axis=1))
    return np.concatenate(found)


def dense_gaps(gaps: Gaps) -> torch.Tensor:
    """Returns gaps as (n, 15) float64."""
    dense = torch.zeros(len(gaps), N_BINS, dtype=torch.float64)
    for row, pairs in zip(dense, gaps, strict=True):
        for b, gap in pairs:
            row[int(b)] = gap
    return dense
