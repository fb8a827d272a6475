"""Computes how much a model loses if one layer's attention is treated, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..evaluation.scores import SCORES, MetricScore, QualityError, Score, Scores
from ..evaluation.statistics import Difference, mean_of_differences, paired_difference
from ..plan import Plan, Treatment
from ..registry import UnknownEntryError

MEAN_TASK = "mean"
COSINE_METRIC = "cosine_distance"

_CONFIDENCE_95 = 1.959963984540054


@dataclass(frozen=True)
class DropRow:
    """Holds one row of `sensitivity.csv` except `layer` and `treatment`; `drop` is positive if the variant is worse."""

    task: str
    metric: str
    n_items: int | None
    base: float
    ablated: float
    drop: float
    drop_stderr: float | None
    drop_ci_low: float | None
    drop_ci_high: float | None

    def to_dict(self) -> dict:
        return asdict(self)


def drops(base: Scores, variant: Scores, score: str, *, intervals: bool = True) -> list[DropRow]:
    """Returns what a variant lost on each task and, as the last row, on their mean (task `mean`): the sensitivity.

    The mean over tasks of base minus variant is Eq. 3 of LayerBoost (arXiv 2604.22050). Each task has the same weight,
    and a perplexity enters as its reciprocal, a probability, as it does in the quality. Scores are paired item by item
    if both have items; otherwise the two standard errors are treated as independent.

    Args:
        base: Scores of the untouched model. Its KL to itself is zero and may be missing.
        variant: Scores of the model with one layer treated.
        score: One of SCORES except `cosine`, whose rows `cosine_drops` gives.
        intervals: Whether rows get the ends of their intervals; their bootstrap takes nearly all of the time.

    Raises:
        QualityError: The score was not measured, or not over the same items.
    """
    described = _described(score)
    pairs = described.pairs(base, variant)
    if not pairs:
        raise QualityError(f"sensitivity.score: '{score}' was not measured; add what it needs to quality")
    differences = [_drop(before, after, intervals) for before, after in pairs]
    rows = [
        _row(after.task, after.metric, 0.0 if before is None else before.value, after.value, difference, after.n_items)
        for (before, after), difference in zip(pairs, differences, strict=True)
    ]
    if described.mean_as_probability:
        converted = [(before and _as_probability(before), _as_probability(after)) for before, after in pairs]
        differences = [
            # An accuracy is a probability already: its difference, with its bootstrap, stays the same.
            difference if pair == of_pair else _drop(*pair, intervals)
            for pair, of_pair, difference in zip(converted, pairs, differences, strict=True)
        ]
        pairs = converted
    return [*rows, _mean_row(pairs, differences, intervals)]


def item_drops(base: Scores, variant: Scores, score: str) -> dict[str, np.ndarray]:
    """Returns what each item lost, by task, for scores that are a mean of items. Positive is worse.

    Raises:
        QualityError: The score was not measured, or is no mean of items.
    """
    found = {}
    for before, after in _described(score).pairs(base, variant):
        if (items := _paired_items(before, after)) is not None:
            found[after.task] = np.subtract(*items)
    if not found:
        raise QualityError(f"sensitivity.score: '{score}' has no items of its own; choose another one")
    return found


def mean_drop(base: Scores, variant: Scores, score: str, *, intervals: bool = True) -> DropRow:
    """Returns the last row of `drops`: the mean over tasks (Eq. 3)."""
    return drops(base, variant, score, intervals=intervals)[-1]


def cosine_drops(distances: Sequence[float], *, intervals: bool = True) -> list[DropRow]:
    """Returns the rows of one layer, given its row of `cosine_scores` with one distance for each sequence."""
    difference = paired_difference(
        [0.0] * len(distances), [-distance for distance in distances], confidence=_confidence(intervals)
    )
    return [_row(task, COSINE_METRIC, 0.0, difference.mean, difference, len(distances)) for task in ("text", MEAN_TASK)]


def single_layer_plan(
    n_layers: int, layer: int, treatment: Treatment, window: int | None = None, sinks: int = 0
) -> Plan:
    """Returns the plan that treats one layer and keeps softmax in all others."""
    return Plan.uniform(Treatment.SOFTMAX, n_layers).with_layer(layer, treatment, window, sinks)


def _described(score: str) -> Score:
    try:
        return SCORES[score]
    except UnknownEntryError as error:
        raise QualityError(str(error)) from None


def _paired_items(before: MetricScore | None, after: MetricScore) -> tuple[list[float], list[float]] | None:
    """Returns the items of base (0 if None) and variant, higher is better, or None if one of them has no items."""
    base_items = [0.0] * len(after.items or ()) if before is None else before.items
    if after.items is None or base_items is None:
        return None
    sign = 1.0 if after.higher_is_better else -1.0
    return [sign * x for x in base_items], [sign * x for x in after.items]


def _confidence(intervals: bool) -> float | None:
    return 0.95 if intervals else None


def _drop(before: MetricScore | None, after: MetricScore, intervals: bool) -> Difference:
    if (items := _paired_items(before, after)) is not None:
        return paired_difference(*items, confidence=_confidence(intervals))
    sign = 1.0 if after.higher_is_better else -1.0
    base_value, base_stderr = (0.0, 0.0) if before is None else (before.value, before.stderr)
    mean = sign * (base_value - after.value)
    n_items = after.n_items or 0
    if base_stderr is None or after.stderr is None:
        return Difference(mean, None, None, None, n_items)
    stderr = (base_stderr**2 + after.stderr**2) ** 0.5
    if not intervals:
        return Difference(mean, stderr, None, None, n_items)
    return Difference(mean, stderr, mean - _CONFIDENCE_95 * stderr, mean + _CONFIDENCE_95 * stderr, n_items)


def _row(task: str, metric: str, base: float, ablated: float, drop: Difference, n_items: int | None) -> DropRow:
    return DropRow(task, metric, n_items, base, ablated, drop.mean, drop.stderr, drop.ci_low, drop.ci_high)


def _mean_row(
    pairs: list[tuple[MetricScore | None, MetricScore]], differences: list[Difference], intervals: bool
) -> DropRow:
    metrics = {after.metric for _, after in pairs}
    # With a single task its own bootstrap interval is kept, which is better than the t interval of a mean.
    mean = (
        differences[0] if len(differences) == 1 else mean_of_differences(differences, confidence=_confidence(intervals))
    )
    return _row(
        MEAN_TASK,
        metrics.pop() if len(metrics) == 1 else "mixed",
        sum(0.0 if before is None else before.value for before, _ in pairs) / len(pairs),
        sum(after.value for _, after in pairs) / len(pairs),
        mean,
        mean.n_items or None,
    )


def _as_probability(score: MetricScore) -> MetricScore:
    """Converts a perplexity or the like to a probability, the scale of the accuracies; other scores stay as is."""
    if score.higher_is_better or score.probability is None:
        return score
    value, slope = score.probability(score.value)
    return replace(
        score,
        value=value,
        stderr=None if score.stderr is None else abs(slope) * score.stderr,
        higher_is_better=True,
        items=None if score.items is None else [value + slope * (item - score.value) for item in score.items],
    )
