"""Finds what a model lost although its accuracy held: generation, retrieval at a distance, or calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .calibration_error import calibration_difference
from .scores import MetricScore, QualityError, Scores, retained
from .statistics import mean_stderr

HELD_FROM = 0.97
"""Share of the base's accuracy from which a model's accuracy counts as held."""

N_STDERRS = 2.0
LEAST_RELATIVE_FALL = 0.10
"""Smallest fall of generation and retrieval that is flagged, relative to the base."""

LEAST_ECE_RISE = 0.03


@dataclass(frozen=True)
class Flag:
    """Describes one thing that a model lost.

    Attributes:
        aspect: `generation`, `retrieval` or `calibration`.
        name: The task, or the metric for retrieval.
        base: The base's score.
        value: The model's score.
        difference: value - base; for calibration what exceeds chance (`calibration_difference`).
        stderr: Standard error of the difference, paired item by item if both have items.
    """

    aspect: str
    name: str
    base: float
    value: float
    difference: float
    stderr: float


def flags(base: Scores, other: Scores) -> list[Flag]:
    """Returns what a model lost against its base although its accuracy held.

    Accuracy means the quality without the tasks that generate, or the text's likelihood if there are no other tasks.
    It held if it is at least 97 % of the base's, or if its fall is within its standard error. If it did not hold there
    are no flags, because the quality already shows the loss. A loss is flagged if it exceeds two standard errors and,
    for generation and retrieval, 10 % of the base's score or, for the expected calibration error, 0.03. Calibration is
    checked for the text and for the tasks and groups that enter the quality, not for a group's parts.

    Raises:
        QualityError: If the two were not measured by the same tasks.
    """
    if not _accuracy_held(base, other):
        return []
    judged = {score.task for score in base.primary()} | {"text"}
    measured = {(score.task, score.metric): score for score in other.metrics}
    found = []
    for before in base.metrics:
        after = measured.get((before.task, before.metric))
        if after is None:
            continue
        if before.generated and before.primary and before.higher_is_better:
            found.append(_fall("generation", before.task, before, after))
        elif before.metric.startswith("retrieval@"):
            found.append(_fall("retrieval", before.metric, before, after))
        elif before.metric == "ece" and before.task in judged:
            found.append(_rise_of_ece(before, after))
    return [flag for flag in found if flag is not None]


def flag_text(found: Sequence[Flag]) -> str:
    """Returns flags in the form that tables show: `retrieval@128 -0.41; calibration arc_easy +0.08`."""
    names = [flag.name if flag.aspect == "retrieval" else f"{flag.aspect} {flag.name}" for flag in found]
    return "; ".join(f"{name} {flag.difference:+.2f}" for name, flag in zip(names, found, strict=True))


def _accuracy_held(base: Scores, other: Scores) -> bool:
    judged = [_accuracy(scores) for scores in (base, other)]
    if not all(scores.metrics for scores in judged):
        return False
    ratio, stderr = retained(*judged)
    return ratio >= HELD_FROM or (stderr is not None and ratio + stderr >= 1.0)


def _accuracy(scores: Scores) -> Scores:
    read = [score for score in scores.primary() if not score.generated]
    if read:
        return Scores(read)
    return Scores([replace(s, primary=True) for s in scores.metrics if (s.task, s.metric) == ("text", "nll")])


def _fall(aspect: str, name: str, before: MetricScore, after: MetricScore) -> Flag | None:
    difference, stderr = after.value - before.value, _difference_stderr(before, after)
    if stderr is None or -difference <= N_STDERRS * stderr or -difference < LEAST_RELATIVE_FALL * before.value:
        return None
    return Flag(aspect, name, before.value, after.value, difference, stderr)


def _rise_of_ece(before: MetricScore, after: MetricScore) -> Flag | None:
    if before.gaps is None or after.gaps is None:
        return None
    try:
        difference, stderr = calibration_difference(before.gaps, after.gaps)
    except ValueError as error:
        raise QualityError(f"scores: {before.task}/ece: {error}") from error
    if stderr is None or difference <= N_STDERRS * stderr or difference < LEAST_ECE_RISE:
        return None
    return Flag("calibration", before.task, before.value, after.value, difference, stderr)


def _difference_stderr(before: MetricScore, after: MetricScore) -> float | None:
    if before.items is not None and after.items is not None:
        if len(before.items) != len(after.items):
            raise QualityError(
                f"scores: {before.task}/{before.metric}: {len(before.items)} items of the base against "
                f"{len(after.items)}; judge both over the same items"
            )
        return mean_stderr([a - b for a, b in zip(after.items, before.items, strict=True)])
    if before.stderr is None or after.stderr is None:
        return None
    return math.hypot(before.stderr, after.stderr)
