"""How much a model loses when one layer's attention is treated: scores of single layers, with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..evaluation.scores import AS_PROBABILITY, MetricScore, QualityError, Scores
from ..evaluation.statistics import Difference, mean_of_differences, paired_difference
from ..plan import Plan, Treatment

SCORES = ("benchmark", "margin", "nll", "kl", "cosine")
"""What a drop can be measured by: each benchmark's own metric, the margin of its right answers, the NLL of a text, the
divergence from the base over a text, and how far attention turns the residual stream (needs no ablation)."""

MEAN_TASK = "mean"
COSINE_METRIC = "cosine_distance"

_CONFIDENCE_95 = 1.959963984540054


@dataclass(frozen=True)
class DropRow:
    """One row of `sensitivity.csv`, but for `layer` and `treatment`; `drop` is positive where the variant is worse."""

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


def drops(base: Scores, variant: Scores, score: str) -> list[DropRow]:
    """What a variant lost on each task, and on their mean (task `mean`, the last row): the layer's sensitivity.

    The mean over tasks of base minus variant is Eq. 3 of LayerBoost (arXiv 2604.22050); each task weighs the same, and
    a perplexity counts in it as the probability that it is the reciprocal of, as it does in the quality. Scores are
    paired item by item where both have items; else the two standard errors are taken as independent.

    Args:
        base: scores of the untouched model. Its KL to itself is zero and need not be there.
        variant: scores of the model with one layer treated.
        score: one of SCORES but `cosine`, which `cosine_drops` gives.

    Raises:
        QualityError: the score was not measured, or not over the same items.
    """
    pairs = list(_pairs(base, variant, score))
    if not pairs:
        raise QualityError(f"sensitivity.score: '{score}' was not measured; add what it needs to quality")
    differences = [_drop(before, after) for before, after in pairs]
    rows = [
        _row(after.task, after.metric, 0.0 if before is None else before.value, after.value, difference, after.n_items)
        for (before, after), difference in zip(pairs, differences, strict=True)
    ]
    if score == "benchmark":
        pairs = [(_as_probability(before), _as_probability(after)) for before, after in pairs]
        differences = [_drop(before, after) for before, after in pairs]
    return [*rows, _mean_row(pairs, differences)]


def item_drops(base: Scores, variant: Scores, score: str) -> dict[str, np.ndarray]:
    """What each item lost, by task; only where the score is a mean of items. Positive is worse.

    Raises:
        QualityError: the score was not measured.
    """
    found = {}
    for before, after in _pairs(base, variant, score):
        if (items := _paired_items(before, after)) is not None:
            found[after.task] = np.subtract(*items)
    if not found:
        raise QualityError(f"sensitivity.score: '{score}' has no items of its own; choose another one")
    return found


def mean_drop(base: Scores, variant: Scores, score: str) -> DropRow:
    """The last row of `drops`: the mean over tasks (Eq. 3)."""
    return drops(base, variant, score)[-1]


def cosine_drops(distances: Sequence[float]) -> list[DropRow]:
    """The rows of one layer from its row of `cosine_scores`, one distance for each sequence."""
    difference = paired_difference([0.0] * len(distances), [-distance for distance in distances])
    return [_row(task, COSINE_METRIC, 0.0, difference.mean, difference, len(distances)) for task in ("text", MEAN_TASK)]


def single_layer_plan(n_layers: int, layer: int, treatment: Treatment, window: int | None = None) -> Plan:
    """The plan that treats one layer and keeps softmax in all others."""
    return Plan.uniform(Treatment.SOFTMAX, n_layers).with_layer(layer, treatment, window)


def _pairs(base: Scores, variant: Scores, score: str):
    if score not in SCORES or score == "cosine":
        raise QualityError(f"sensitivity.score: '{score}' compares no scores; use one of {', '.join(SCORES[:-1])}")
    for after in variant.metrics:
        if score == "benchmark" and (not after.primary or after.task == "text"):
            continue
        if score != "benchmark" and after.metric != score:
            continue
        yield (None if score == "kl" else base.get(after.task, after.metric)), after


def _paired_items(before: MetricScore | None, after: MetricScore) -> tuple[list[float], list[float]] | None:
    """The items of base and variant, higher is better; None where one of them has none. A base that is None is 0."""
    base_items = [0.0] * len(after.items or ()) if before is None else before.items
    if after.items is None or base_items is None:
        return None
    sign = 1.0 if after.higher_is_better else -1.0
    return [sign * x for x in base_items], [sign * x for x in after.items]


def _drop(before: MetricScore | None, after: MetricScore) -> Difference:
    if (items := _paired_items(before, after)) is not None:
        return paired_difference(*items)
    sign = 1.0 if after.higher_is_better else -1.0
    base_value, base_stderr = (0.0, 0.0) if before is None else (before.value, before.stderr)
    mean = sign * (base_value - after.value)
    n_items = after.n_items or 0
    if base_stderr is None or after.stderr is None:
        return Difference(mean, None, None, None, n_items)
    stderr = (base_stderr**2 + after.stderr**2) ** 0.5
    return Difference(mean, stderr, mean - _CONFIDENCE_95 * stderr, mean + _CONFIDENCE_95 * stderr, n_items)


def _row(task: str, metric: str, base: float, ablated: float, drop: Difference, n_items: int | None) -> DropRow:
    return DropRow(task, metric, n_items, base, ablated, drop.mean, drop.stderr, drop.ci_low, drop.ci_high)


def _mean_row(pairs: list[tuple[MetricScore | None, MetricScore]], differences: list[Difference]) -> DropRow:
    metrics = {after.metric for _, after in pairs}
    # One task alone keeps its bootstrap interval.
    mean = differences[0] if len(differences) == 1 else mean_of_differences(differences)
    return _row(
        MEAN_TASK,
        metrics.pop() if len(metrics) == 1 else "mixed",
        sum(0.0 if before is None else before.value for before, _ in pairs) / len(pairs),
        sum(after.value for _, after in pairs) / len(pairs),
        mean,
        mean.n_items or None,
    )


def _as_probability(score: MetricScore) -> MetricScore:
    """The score on the scale of the accuracies beside it, where it is a perplexity or the like."""
    convert_value = AS_PROBABILITY.get(score.metric.partition("@")[0])
    if score.higher_is_better or convert_value is None:
        return score
    value, slope = convert_value(score.value)
    return replace(
        score,
        value=value,
        stderr=None if score.stderr is None else abs(slope) * score.stderr,
        higher_is_better=True,
        items=None if score.items is None else [value + slope * (item - score.value) for item in score.items],
    )
