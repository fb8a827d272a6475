"""Holds scores and computes quality from them; it needs no model, so that records can be compared at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..registry import Registry
from .statistics import PairingError, mean_of_independent, mean_stderr, ratio_residual_stderr


class QualityError(ValueError):
    """Reports a quality that cannot be measured or compared as asked."""


@dataclass(frozen=True)
class QualitySpec:
    """Specifies what a model is judged by.

    The likelihood is measured over the first `n_sequences` sequences into which the text is packed (`data.pack`); None
    means all full ones. Each token of a sequence except the first is predicted from those before it.

    Attributes:
        tasks: lm-eval names (tasks, groups, tags) or paths of task files.
        limit: Number of items of each task, from its first; None means all.
        text: Source of the text for likelihood (`data.read_documents`); None means no text.
        n_sequences: Number of sequences of the text; None means all.
        sequence_tokens: Tokens in a sequence.
        batch_size: Sequences or requests in a forward pass.
        num_fewshot: Number of examples in a prompt; None means each task's own number.
        retrieval: Distances in tokens over which the model must recall what the text said (`retrieval`).
        likelihood_only: Whether of a text only the likelihood is measured, neither the divergence from the untouched
            model nor the calibration.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    text: str | None = None
    n_sequences: int | None = 64
    sequence_tokens: int = 512
    batch_size: int = 8
    num_fewshot: int | None = None
    retrieval: tuple[int, ...] = ()
    likelihood_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "retrieval", tuple(self.retrieval))
        if not self.tasks and self.text is None:
            raise QualityError("quality: neither tasks nor text; name at least one benchmark or a text")
        least = {"limit": 1, "n_sequences": 1, "sequence_tokens": 2, "batch_size": 1, "num_fewshot": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise QualityError(f"quality.{name}: {value} is too small; give at least {minimum}")


@dataclass
class MetricScore:
    """Holds one metric of one task.

    Attributes:
        task: lm-eval's name of the task or group, or `text`.
        metric: lm-eval's name of the metric, followed by `@filter` if the filter is not the default one; `margin`,
            `ece`, `nll`, `kl` or `retrieval@<distance>` for ours.
        value: The task's score.
        stderr: Its standard error; None if lm-eval gives none.
        higher_is_better: Direction of the metric.
        items: Score of each item in the task's order, whose mean is `value`; None if the value is no mean of items.
        n_items: Number of items scored.
        primary: Whether the metric represents its task in the quality.
        generated: Whether the model wrote the answers itself instead of reading given ones.
        gaps: For `ece`, the data from which its error and paired comparisons are computed (`calibration`).
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    items: list[float] | None = None
    n_items: int | None = None
    primary: bool = False
    generated: bool = False
    gaps: list[list[list[float]]] | None = None

    def __post_init__(self) -> None:
        if self.n_items is None and self.items is not None:
            self.n_items = len(self.items)

    @property
    def unfiltered_metric(self) -> str:
        """The metric's name without its filter or distance."""
        return self.metric.partition("@")[0]

    @property
    def probability(self) -> Callable[[float], tuple[float, float]] | None:
        """The function from a value to the probability that it stands for and its derivative; None if there is none."""
        return AS_PROBABILITY.get(self.unfiltered_metric)


def filtered_metric(metric: str, filter_name: str) -> str:
    """Returns the name of lm-eval's metric after one of a task's filters; the default filter adds nothing to it."""
    return metric if filter_name == "none" else f"{metric}@{filter_name}"


@dataclass
class Scores:
    """Holds all metrics of one model."""

    metrics: list[MetricScore] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the scores as plain values that JSON can hold."""
        return {"metrics": [asdict(metric) for metric in self.metrics]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Returns the scores that `to_dict` wrote."""
        return cls([MetricScore(**metric) for metric in values["metrics"]])

    def get(self, task: str, metric: str) -> MetricScore:
        """Returns one metric.

        Raises:
            QualityError: If it was not measured, naming what was.
        """
        for score in self.metrics:
            if (score.task, score.metric) == (task, metric):
                return score
        measured = ", ".join(f"{score.task}/{score.metric}" for score in self.metrics)
        raise QualityError(f"metric: {task}/{metric} was not measured; there are {measured}")

    def primary(self) -> list[MetricScore]:
        """Returns the metrics that make the quality: one for each task, or the text's likelihood without tasks."""
        return [score for score in self.metrics if score.primary]


def mean_score(
    task: str, metric: str, items: list[float], higher_is_better: bool, *, primary: bool = False
) -> MetricScore:
    """Returns the score of a metric that is the mean of its items."""
    value = math.fsum(items) / len(items)
    return MetricScore(task, metric, value, mean_stderr(items), higher_is_better, items, primary=primary)


def quality(scores: Scores) -> tuple[float, float | None]:
    """Returns a model's quality, higher is better, and its standard error.

    It is the mean over tasks of each one's primary metric, or exp(-NLL) of the text without tasks. Perplexities count
    as their reciprocal, which is a probability like accuracies are. Tasks are independent of each other.

    Raises:
        QualityError: If there is no primary metric or one is of the kind where lower is better.
    """
    terms = _quality_terms(scores)
    return math.fsum(term.value for term in terms) / len(terms), mean_of_independent([term.stderr for term in terms])


def retained(base: Scores, other: Scores) -> tuple[float, float | None]:
    """Returns the other model's quality divided by the base's, and its standard error by the delta method.

    Within a task the models are paired item by item if both have items; tasks are independent of each other. The ratio
    is NaN, without standard error, if the base's quality is zero.

    Raises:
        QualityError: If the two were not measured by the same tasks.
    """
    base_terms, other_terms = _quality_terms(base), _quality_terms(other)
    names, other_names = [term.name for term in base_terms], [term.name for term in other_terms]
    if names != other_names:
        raise QualityError(
            f"scores: {', '.join(other_names)} against the base's {', '.join(names)}; judge both by the same tasks"
        )
    base_quality, other_quality = quality(base)[0], quality(other)[0]
    if base_quality == 0.0:
        return math.nan, None
    ratio = other_quality / base_quality
    residuals = [_residual_stderr(b, o, ratio) for b, o in zip(base_terms, other_terms, strict=True)]
    stderr = mean_of_independent(residuals)
    return ratio, None if stderr is None else stderr / abs(base_quality)


@dataclass(frozen=True)
class _Term:
    """Holds a task's contribution to the quality; `items` average to `value`, and their spread gives its error."""

    name: str
    value: float
    stderr: float | None
    items: list[float] | None


AS_PROBABILITY: dict[str, Callable[[float], tuple[float, float]]] = {
    "nll": lambda x: (math.exp(-x), -math.exp(-x)),
    "perplexity": lambda x: (1 / x, -1 / x**2),
    "word_perplexity": lambda x: (1 / x, -1 / x**2),
    "byte_perplexity": lambda x: (1 / x, -1 / x**2),
    "bits_per_byte": lambda x: (2**-x, -math.log(2) * 2**-x),
}
"""Functions from a lower-is-better metric to the probability that it stands for, and its derivative."""


def _quality_terms(scores: Scores) -> list[_Term]:
    if not scores.primary():
        raise QualityError("scores: no quality metric among them; evaluate at least one task or a text")
    return [_quality_term(score) for score in scores.primary()]


def _quality_term(score: MetricScore) -> _Term:
    name = f"{score.task}/{score.metric}"
    if score.higher_is_better:
        return _Term(name, score.value, score.stderr, score.items)
    if score.probability is None:
        raise QualityError(
            f"quality.tasks: {name} is better when lower; use a task with a metric that is better when higher"
        )
    value, slope = score.probability(score.value)
    # To first order, the transformed mean changes with each item like this linear function of the item.
    items = None if score.items is None else [value + slope * (item - score.value) for item in score.items]
    return _Term(name, value, None if score.stderr is None else abs(slope) * score.stderr, items)


def _residual_stderr(base: _Term, other: _Term, ratio: float) -> float | None:
    """Returns the standard error of other - ratio * base in one task."""
    if base.items is not None and other.items is not None:
        try:
            return ratio_residual_stderr(base.items, other.items, ratio)
        except PairingError as error:
            raise QualityError(f"scores: {base.name}: {error}") from error
    if base.stderr is None or other.stderr is None:
        return None
    return math.hypot(other.stderr, ratio * base.stderr)


Selection = Callable[[Scores], list[MetricScore]]
"""Selects from a model's scores the metrics that a sensitivity score compares, or makes others from them."""


@dataclass(frozen=True)
class Score:
    """Describes one way to measure what a model with treated layers has lost.

    Attributes:
        name: Name in recipes and tables.
        summary: One line for messages and help.
        source: Where it is measured, on the quality's `tasks` or on a `text`.
        select: Selects the metrics that it compares; None if no treated model is judged (`cosine`).
        base_is_zero: Whether the untouched model has 0 by definition and is not measured.
        mean_as_probability: Whether perplexities count in the mean over tasks as the probabilities they stand for.
        kept: Returns the share of the base's quality, or likelihood, that a plan keeps, from minus its mean drop and
            the base's quality (None if that is unknown).
        ranks_texts: Whether layers are ranked by it over further texts and lengths too.
    """

    name: str
    summary: str
    source: Literal["tasks", "text"]
    select: Selection | None
    base_is_zero: bool = False
    mean_as_probability: bool = False
    kept: Callable[[float, float | None], float] = lambda gained, base: math.exp(gained)
    ranks_texts: bool = False

    @property
    def judges_plans(self) -> bool:
        """Whether it can judge a plan, and not only a single layer."""
        return self.select is not None

    def is_measured(self, scores: Scores) -> bool:
        return self.select is not None and bool(self.select(scores))

    def pairs(self, base: Scores, variant: Scores) -> list[tuple[MetricScore | None, MetricScore]]:
        """Returns pairs of metrics to compare, of the untouched model (None stands for zero) and of a variant.

        Raises:
            QualityError: It judges no variants, or the base lacks a metric of the variant.
        """
        if self.select is None:
            known = ", ".join(score.name for score in SCORES if score.judges_plans)
            raise QualityError(f"sensitivity.score: '{self.name}' compares no scores; use one of {known}")
        after = self.select(variant)
        if self.base_is_zero:
            return [(None, score) for score in after]
        before = {(score.task, score.metric): score for score in self.select(base)}
        return [(before.get((s.task, s.metric)) or base.get(s.task, s.metric), s) for s in after]


def metrics_named(metric: str) -> Selection:
    """Returns a selection of the metrics with one name, of all tasks."""
    return lambda scores: [score for score in scores.metrics if score.metric == metric]


def _of_benchmarks(scores: Scores) -> list[MetricScore]:
    return [score for score in scores.primary() if score.task != "text"]


def _kept_of_base(gained: float, base: float | None) -> float:
    return 1 + gained / base if base else gained


SCORES: Registry[Score] = Registry(
    "sensitivity.score",
    (
        Score(
            "benchmark",
            "each benchmark's own metric",
            "tasks",
            _of_benchmarks,
            mean_as_probability=True,
            kept=_kept_of_base,
        ),
        Score("margin", "the margin of the benchmarks' right answers", "tasks", metrics_named("margin")),
        Score("nll", "the negative log-likelihood of a text", "text", metrics_named("nll"), ranks_texts=True),
        Score("kl", "the divergence from the base over a text", "text", metrics_named("kl"), base_is_zero=True),
        Score("cosine", "how far attention turns the residual stream; needs no ablation", "text", None),
    ),
)
"""The scores that may judge layers and plans, in the order of tables; plug-ins add to them."""
