"""Measures how certain a ranking of layers is: split halves, rank correlations, close neighbours and thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ..evaluation.scores import Scores
from ..evaluation.statistics import Difference, mean_of_differences, paired_difference
from .drops import item_drops

Method = Literal["spearman", "kendall"]

# Smaller differences, as parts of the largest sensitivity, are rounding and must not break a tie.
_ROUNDING = 1e-12
_SIGNS_AT_ONCE = 4_000_000


class RankingError(ValueError):
    """Drops give no ranking, or rankings cannot be compared."""


@dataclass(frozen=True, eq=False)
class DropMatrix:
    """Holds what each item lost by the treatment of each layer; positive is worse.

    Attributes:
        tasks: fp64 (n_layers, n_items of the task) for each task; the items of a task are the same for all layers.

    Raises:
        RankingError: There is no task, a task has no items, a drop is not finite, or tasks differ in their layers.
    """

    tasks: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        tasks = {name: np.asarray(drops, dtype=np.float64) for name, drops in self.tasks.items()}
        if not tasks:
            raise RankingError("tasks: none given; at least one task must be scored")
        for name, drops in tasks.items():
            if drops.ndim != 2 or 0 in drops.shape:
                raise RankingError(
                    f"tasks.{name}: shape {drops.shape}; give (n_layers, n_items) with at least one item"
                )
            if not np.isfinite(drops).all():
                layer, item = np.argwhere(~np.isfinite(drops))[0]
                raise RankingError(
                    f"tasks.{name}: layer {layer}, item {item} is {drops[layer, item]}; score it again or leave it out"
                )
        n_layers = {name: len(drops) for name, drops in tasks.items()}
        if len(set(n_layers.values())) > 1:
            raise RankingError(f"tasks: their numbers of layers differ, {n_layers}; score all layers on every task")
        object.__setattr__(self, "tasks", tasks)

    @property
    def n_layers(self) -> int:
        return len(next(iter(self.tasks.values())))

    @property
    def n_items(self) -> int:
        """Number of items over all tasks."""
        return sum(drops.shape[1] for drops in self.tasks.values())

    def sensitivity(self) -> np.ndarray:
        """Returns the mean over tasks of the mean over items, (n_layers,); each task has the same weight."""
        return np.mean([drops.mean(axis=1) for drops in self.tasks.values()], axis=0)

    def take(self, items: Mapping[str, np.ndarray]) -> DropMatrix:
        """Returns the drops of some items, which may repeat.

        Args:
            items: Indices into the items of each task to keep; a task that is not named is left out.

        Raises:
            RankingError: A task is not one of these, or nothing is left.
        """
        unknown = sorted(set(items) - set(self.tasks))
        if unknown:
            raise RankingError(f"items: no task {', '.join(unknown)}; there are {', '.join(self.tasks)}")
        return DropMatrix({name: self.tasks[name][:, indices] for name, indices in items.items()})


@dataclass(frozen=True)
class SplitHalf:
    """Says how similar the rankings by two halves of the items are.

    Attributes:
        spearman: Median Spearman correlation over random splits.
        ci_low: 2.5th percentile of the Spearman correlation over splits.
        ci_high: 97.5th percentile of the Spearman correlation over splits.
        kendall: Median Kendall correlation (tau-b) over splits.
        n_items: Items in a half, over all tasks.
    """

    spearman: float
    ci_low: float
    ci_high: float
    kendall: float
    n_items: int


@dataclass(frozen=True)
class Correlation:
    """Holds a rank correlation and the ends of its bootstrap interval."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class NeighbourPair:
    """Holds two neighbours in the ranking; `difference` is the drop of `upper` minus that of `lower`."""

    lower: int
    upper: int
    difference: Difference


def split_half(matrix: DropMatrix, *, n_splits: int = 200, seed: int = 0) -> SplitHalf:
    """Correlates the sensitivities from two random disjoint halves of the items, halving each task.

    A task with an odd number of items leaves one out of each split. The result describes rankings by half the items;
    the ranking by all of them is more certain. The range over splits is not a confidence interval, because all splits
    use the same items.

    Args:
        matrix: Drops of at least two layers and of two items in each task.
        n_splits: Number of random splits.
        seed: Seed of the splits.

    Raises:
        RankingError: There is a single layer, a task with a single item, or no split.
    """
    halves = {name: drops.shape[1] // 2 for name, drops in matrix.tasks.items()}
    first, second = _disjoint(matrix, _orders(matrix, n_splits, seed), halves)
    spearman = _correlations(first, second, "spearman")
    low, high = np.quantile(spearman, [0.025, 0.975])
    kendall = float(np.median(_correlations(first, second, "kendall")))
    return SplitHalf(float(np.median(spearman)), float(low), float(high), kendall, sum(halves.values()))


def reliability(matrix: DropMatrix, *, n_splits: int = 200, seed: int = 0) -> float:
    """Estimates how the ranking by these items correlates with the ranking by as many other items.

    It is the median Spearman correlation of `split_half`, which is one of half as many items, carried to all of them by
    the formula of Spearman (1910) and Brown (1910). A correlation below 0 stays as it is.

    Args:
        matrix, n_splits, seed: As in `split_half`.
    """
    half = split_half(matrix, n_splits=n_splits, seed=seed).spearman
    return 2 * half / (1 + half) if half > 0 else half


def score_reliability(base: Scores, by_treatment: Mapping[str, Sequence[Scores]], score: str) -> dict[str, float]:
    """Returns the `reliability` of each treatment's ranking by a score.

    Args:
        base: Scores of the untouched model.
        by_treatment: Scores of the plans that treat one layer, first layer first.
        score: A score that is a mean of items.
    """
    found = {}
    for treatment, of_layers in by_treatment.items():
        drops = [item_drops(base, of_layer, score) for of_layer in of_layers]
        found[treatment] = reliability(
            DropMatrix({task: np.stack([each[task] for each in drops]) for task in drops[0]})
        )
    return found


def items_until_stable(matrix: DropMatrix, *, threshold: float = 0.9, n_splits: int = 200, seed: int = 0) -> int | None:
    """Finds the number of items whose ranking is confirmed by as many other items.

    Sizes grow by a third to a half at a time (2, 3, 4, 6, 8, 12, ...) and end with half of all items. Tasks share a
    size in proportion to their items, with at least one item each, so a size may come out a little smaller or larger.

    Args:
        matrix: Drops of at least two layers and of two items in each task.
        threshold: Median Spearman correlation, over splits, of the sensitivities from two disjoint random subsets.
        n_splits: Number of random splits for each size.
        seed: Seed of the splits.

    Returns:
        The smallest number of items in one subset (over all tasks) that reaches the threshold; None if half of all the
        items does not reach it.

    Raises:
        RankingError: There is a single layer, a task with a single item, or no split.
    """
    orders = _orders(matrix, n_splits, seed)
    for sizes in _subset_sizes({name: drops.shape[1] for name, drops in matrix.tasks.items()}):
        first, second = _disjoint(matrix, orders, sizes)
        if np.median(_correlations(first, second, "spearman")) >= threshold:
            return sum(sizes.values())
    return None


def rank_correlation(
    a: DropMatrix,
    b: DropMatrix,
    *,
    method: Method = "spearman",
    same_items: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Correlation:
    """Correlates two rankings of the same layers, such as those by two scores.

    The interval is the percentile bootstrap, which draws items with replacement within each task. It only says how far
    the correlation varies with the choice of items. It is not an interval for the correlation with infinitely many
    items: noise in the rankings pulls their correlation towards 0 and resampling adds the same noise once more, so that
    the interval is too low and may even exclude `value`. Compare `value` with the split-half correlations of `a` and of
    `b`, which bound what noise allows. If both rankings come from the same items, the noise that they share pulls the
    correlation up instead; `same_items` keeps this part in every resample.

    Args:
        a: Drops of the first ranking.
        b: Drops of the second ranking, of the same layers.
        method: Spearman's rho or Kendall's tau-b. Ties get average ranks; a constant ranking correlates 0.
        same_items: Whether a and b have the same items in the same order, which are then resampled together.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
        confidence: Share of the resamples in the interval.

    Raises:
        RankingError: Numbers of layers differ or are below two, or the items differ although `same_items` is set.
    """
    if a.n_layers != b.n_layers or a.n_layers < 2:
        raise RankingError(
            f"n_layers: {a.n_layers} against {b.n_layers}; rankings must be of the same two or more layers"
        )
    items_a, items_b = ({name: drops.shape[1] for name, drops in matrix.tasks.items()} for matrix in (a, b))
    if same_items and items_a != items_b:
        raise RankingError(f"same_items: tasks have {items_a} against {items_b} items; score both on the same items")
    rng = np.random.default_rng(seed)
    counts_a = _bootstrap_counts(items_a, resamples, rng)
    counts_b = counts_a if same_items else _bootstrap_counts(items_b, resamples, rng)
    resampled = _correlations(_sensitivities(a, counts_a), _sensitivities(b, counts_b), method)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = _correlations(a.sensitivity()[None], b.sensitivity()[None], method)[0]
    return Correlation(float(value), float(low), float(high))


def indistinct_neighbours(matrix: DropMatrix, *, confidence: float = 0.95) -> list[NeighbourPair]:
    """Finds the neighbouring layers whose order could as well be reversed.

    Args:
        matrix: Drops of all layers.
        confidence: Coverage probability of the interval of each paired difference.

    Returns:
        Neighbours in the ranking, least sensitive first, whose paired difference has an interval that includes zero
        (or, with a single item, no interval). Equal layers are ranked by their index.
    """
    order = np.argsort(matrix.sensitivity(), kind="stable")
    pairs = (NeighbourPair(int(i), int(j), _difference(matrix, int(j), int(i), confidence)) for i, j in pairwise(order))
    return [pair for pair in pairs if _includes(pair.difference.ci_low, pair.difference.ci_high, 0.0)]


def straddles(ci_low: float | None, ci_high: float | None, remove_below: float, keep_above: float) -> tuple[bool, bool]:
    """Returns for each of the two thresholds whether an interval includes it; an unknown end counts as yes.

    Args:
        ci_low: Lower end of a layer's drop.
        ci_high: Upper end of a layer's drop.
        remove_below: Threshold below which attention is removed.
        keep_above: Threshold from which on softmax is kept.
    """
    return _includes(ci_low, ci_high, remove_below), _includes(ci_low, ci_high, keep_above)


def _includes(ci_low: float | None, ci_high: float | None, value: float) -> bool:
    return ci_low is None or ci_high is None or ci_low <= value <= ci_high


def _difference(matrix: DropMatrix, upper: int, lower: int, confidence: float) -> Difference:
    differences = [
        paired_difference(drops[upper], drops[lower], confidence=confidence) for drops in matrix.tasks.values()
    ]
    # With a single task its own bootstrap interval is kept, which is better than the t interval of a mean.
    return differences[0] if len(differences) == 1 else mean_of_differences(differences, confidence=confidence)


def _orders(matrix: DropMatrix, n_splits: int, seed: int) -> dict[str, np.ndarray]:
    """Returns random orders of each task's items, (n_splits, n_items of the task)."""
    if matrix.n_layers < 2:
        raise RankingError(f"n_layers: {matrix.n_layers}; a ranking takes at least two layers")
    if n_splits < 1:
        raise RankingError(f"n_splits: {n_splits}; take at least one")
    single = [name for name, drops in matrix.tasks.items() if drops.shape[1] < 2]
    if single:
        raise RankingError(f"tasks.{single[0]}: a single item cannot be halved; score more items or leave the task out")
    rng = np.random.default_rng(seed)
    return {
        name: rng.permuted(np.tile(np.arange(drops.shape[1]), (n_splits, 1)), axis=1)
        for name, drops in matrix.tasks.items()
    }


def _subset_sizes(n_items: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yields the number of items of each task in a subset, for subsets that grow to half of all items."""
    total = sum(n_items.values())
    seen: set[int] = set()
    grid = sorted({size for power in range(1, total.bit_length()) for size in (2**power, 3 * 2 ** (power - 1))})
    for size in [*(size for size in grid if size < total // 2), total]:
        sizes = {name: min(n // 2, max(1, round(size * n / total))) for name, n in n_items.items()}
        if sum(sizes.values()) not in seen:
            seen.add(sum(sizes.values()))
            yield sizes


def _disjoint(
    matrix: DropMatrix, orders: dict[str, np.ndarray], sizes: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sensitivities by the first and by the last items of each order, both (n_splits, n_layers)."""
    firsts = {name: _marks(order[:, : sizes[name]], order) for name, order in orders.items()}
    lasts = {name: _marks(order[:, -sizes[name] :], order) for name, order in orders.items()}
    return _sensitivities(matrix, firsts), _sensitivities(matrix, lasts)


def _marks(chosen: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns 1 for the chosen items and 0 for the others, (n_splits, n_items)."""
    marks = np.zeros(order.shape)
    np.put_along_axis(marks, chosen, 1.0, axis=1)
    return marks


def _bootstrap_counts(n_items: dict[str, int], resamples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns how often each item is drawn, (resamples, n_items) for each task."""
    return {name: rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float) for name, n in n_items.items()}


def _sensitivities(matrix: DropMatrix, counts: dict[str, np.ndarray]) -> np.ndarray:
    """Returns sensitivities (samples, n_layers) by items weighted with counts, (samples, n_items) for each task."""
    means = [counts[name] @ drops.T / counts[name].sum(axis=1)[:, None] for name, drops in matrix.tasks.items()]
    return np.mean(means, axis=0)


def _correlations(a: np.ndarray, b: np.ndarray, method: Method) -> np.ndarray:
    """Returns the rank correlation of each row of a with the same row of b, (samples, n_layers) to (samples,)."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if method == "spearman":
        return _cosines(ranks_a - ranks_a.mean(axis=1)[:, None], ranks_b - ranks_b.mean(axis=1)[:, None])
    if method != "kendall":
        raise RankingError(f"method: '{method}' is no rank correlation; use spearman or kendall")
    # tau-b is the cosine between the signs of all pairwise differences.
    first, second = np.triu_indices(a.shape[1], k=1)
    at_once = max(1, _SIGNS_AT_ONCE // len(first))
    chunks = [slice(start, start + at_once) for start in range(0, len(a), at_once)]
    signs = (
        (np.sign(ranks[chunk][:, first] - ranks[chunk][:, second]) for ranks in (ranks_a, ranks_b)) for chunk in chunks
    )
    return np.concatenate([_cosines(*pair) for pair in signs])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns average ranks along the last axis, (samples, n_layers)."""
    from scipy.stats import rankdata  # takes half a second to import

    scale = np.abs(values).max() * _ROUNDING
    return rankdata(np.round(values / scale) if scale > 0 else values, axis=-1)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row of a with the same row of b; 0 if one of them is all zero."""
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)
