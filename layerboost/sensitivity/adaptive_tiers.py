"""Sorts layers into tiers with fewer scored items: a layer is scored only until its tier is certain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Tier = Literal["remove", "middle", "keep"]

# A difference's variance below this part of the variances that it is made from is only rounding.
_ROUNDING = 1e-12

# Position of a layer with respect to a boundary between tiers.
_BELOW, _UNKNOWN, _ABOVE = -1, 0, 1


class AdaptiveError(ValueError):
    """A rule or an observation is invalid."""


@dataclass(frozen=True)
class TierRule:
    """Says which layers lose attention, which get the middle treatment and which keep softmax.

    Give either both sizes or both thresholds.

    Attributes:
        n_removed: Number of least sensitive layers that lose attention. Equal layers are ranked by their index.
        n_middle: Number of layers, following in the ranking, that get the middle treatment.
        remove_below: Layers with a mean drop below this lose attention, as in `plan_from_thresholds`.
        keep_above: Layers with a mean drop at or above this keep softmax.

    Raises:
        AdaptiveError: Sizes and thresholds are mixed or incomplete, a size is negative, or remove_below is above
            keep_above.
    """

    n_removed: int | None = None
    n_middle: int | None = None
    remove_below: float | None = None
    keep_above: float | None = None

    def __post_init__(self) -> None:
        given = tuple(name for name, value in vars(self).items() if value is not None)
        if given not in (("n_removed", "n_middle"), ("remove_below", "keep_above")):
            raise AdaptiveError(
                f"rule: {', '.join(given) or 'nothing'} given; "
                "give n_removed and n_middle, or remove_below and keep_above"
            )
        if self.n_removed is not None and self.n_middle is not None:
            for name, size in (("n_removed", self.n_removed), ("n_middle", self.n_middle)):
                if size < 0:
                    raise AdaptiveError(f"{name}: {size} is negative; give 0 or more layers")
        elif not self.thresholds[0] <= self.thresholds[1]:
            raise AdaptiveError(
                f"remove_below: {self.remove_below} is not at or below keep_above {self.keep_above}; "
                "swap or move them apart"
            )

    @property
    def sizes(self) -> tuple[int, int] | None:
        """The numbers of layers below each of the two boundaries between tiers; None for thresholds."""
        if self.n_removed is None or self.n_middle is None:
            return None
        return self.n_removed, self.n_removed + self.n_middle

    @property
    def thresholds(self) -> tuple[float, float]:
        """The two boundaries as drops; defined only for a rule by thresholds."""
        assert self.remove_below is not None and self.keep_above is not None
        return self.remove_below, self.keep_above

    def tiers(self, means: Sequence[float] | np.ndarray) -> list[Tier]:
        """Returns the tier of each layer by its mean drop, first layer first."""
        values = np.asarray(means, dtype=np.float64)
        if self.sizes is None:
            below = [values < threshold for threshold in self.thresholds]
        else:
            rank = np.empty(len(values), dtype=int)
            rank[np.argsort(values, kind="stable")] = np.arange(len(values))
            below = [rank < size for size in self.sizes]
        return [_tier(bool(first), bool(second)) for first, second in zip(*below, strict=True)]


class AdaptiveTiers:
    """Sorts layers into tiers by a group-sequential test over a fixed random order of a finite set of items.

    The result aims at the tiers that the rule gives for the means over all `n_items` items, the full budget. At each
    look all undecided layers have been scored on the first n items. A layer stops as soon as its tier is certain;
    layers that are undecided at the last look (n = n_items) are decided by the means themselves. With thresholds, a
    layer's mean is compared with each threshold. With sizes, undecided layers are compared in pairs over their common
    items, whose shared difficulty cancels: a layer is in the lower group of a boundary once so many others are
    certainly above it that the remaining ones cannot fill the group's free slots.

    The stated error is split over looks in proportion to their items, because late looks decide more and are closer to
    normal theory. Within a look it is split over the comparisons that can put a layer into a wrong tier (Bonferroni):
    each layer with each threshold, or each pair of layers of different tiers. Intervals are Student's, one-sided, with
    the finite-population correction sqrt(1 - n / n_items), and are widened if the values are skewed (Hall 1992). They
    are approximate with few items; by simulation, wrong tiers stay below a stated 5 % with sparse accuracies and
    lognormal drops, too. With sizes the error is far below it, as most pairs are far apart. If all values are equal
    there is no spread, and therefore no certainty before the last look.

    The state depends only on the observations: a restart repeats them in their order.

    Args:
        n_layers: Layers to sort.
        n_items: Items of the full budget.
        rule: The rule that defines the tiers.
        error: Probability that any layer's tier differs from the one by all items.
        first_items: Items of the first look.
        growth: Factor by which the number of items grows from one look to the next.
        weights: (n_items,) in the order of the items, positive. With n_items / (n_tasks * items of its task) for each
            item all tasks have the same weight. Only their ratios matter. The estimates are weighted means.

    Raises:
        AdaptiveError: An argument is out of its range.
    """

    def __init__(
        self,
        n_layers: int,
        n_items: int,
        rule: TierRule,
        *,
        error: float = 0.05,
        first_items: int = 16,
        growth: float = 2.0,
        weights: Sequence[float] | np.ndarray | None = None,
    ):
        _check_arguments(n_layers, n_items, rule, error, first_items, growth)
        self.n_layers = n_layers
        self.n_items = n_items
        self.rule = rule
        self.error = error
        self.looks = _looks(n_items, first_items, growth)
        self._weights = _checked_weights(weights, n_items)
        self._drops: list[np.ndarray] = [np.empty(0) for _ in range(n_layers)]
        self._sides = np.zeros((2, n_layers), dtype=int)
        self._look = 0
        if rule.sizes is not None:
            # A tier that holds no layer or all of them is decided without any items.
            self._fill_slots(np.zeros((n_layers, n_layers), dtype=bool))

    @property
    def finished(self) -> bool:
        return not self._undecided()

    @property
    def spent(self) -> float:
        """The part of the full budget, n_layers * n_items, that has been scored."""
        return sum(len(drops) for drops in self._drops) / (self.n_layers * self.n_items)

    def n_items_used(self, layer: int) -> int:
        """Returns the number of items that a layer has been scored on so far."""
        return len(self._drops[layer])

    def tiers(self) -> list[Tier] | None:
        """Returns the tier of each layer, first layer first; None until all are decided."""
        if not self.finished:
            return None
        return [_tier(first == _BELOW, second == _BELOW) for first, second in self._sides.T]

    def next_request(self) -> tuple[tuple[int, ...], int, int] | None:
        """Returns the layers to score next and the range (start, stop) of items in the order; None when finished."""
        if self.finished:
            return None
        start = 0 if self._look == 0 else self.looks[self._look - 1]
        return tuple(self._undecided()), start, self.looks[self._look]

    def observe(self, drops: Mapping[int, Sequence[float] | np.ndarray]) -> None:
        """Takes in what `next_request` asked for and decides the layers whose tier is now certain.

        Args:
            drops: For each requested layer its drops on the items start to stop, (stop - start,).

        Raises:
            AdaptiveError: Nothing was requested, or something else; the state stays as it was.
        """
        request = self.next_request()
        if request is None:
            raise AdaptiveError("drops: all layers are decided; stop when next_request returns None")
        layers, start, stop = request
        if set(drops) != set(layers):
            raise AdaptiveError(f"drops: layers {sorted(drops)} given; score layers {list(layers)} as requested")
        values = {layer: np.asarray(drops[layer], dtype=np.float64) for layer in layers}
        for layer, items in values.items():
            if items.shape != (stop - start,) or not np.isfinite(items).all():
                raise AdaptiveError(
                    f"drops: layer {layer} has shape {items.shape} with {int((~np.isfinite(items)).sum())} values not "
                    f"finite; give one finite drop for each of the items {start} to {stop}"
                )
        for layer, items in values.items():
            self._drops[layer] = np.concatenate([self._drops[layer], items])
        self._look += 1
        if self.rule.sizes is None:
            self._compare_with_thresholds(layers)
        else:
            self._compare_pairs(layers)

    def _undecided(self) -> list[int]:
        # A layer below the first boundary is also below the second, and one above the second also above the first.
        first, second = self._sides
        decided = (first == _BELOW) | (second == _ABOVE) | ((first == _ABOVE) & (second == _BELOW))
        return [int(layer) for layer in np.flatnonzero(~decided)]

    def _compare_with_thresholds(self, layers: tuple[int, ...]) -> None:
        means, residuals = self._estimates(layers)
        index = np.array(layers)
        thresholds = self.rule.thresholds
        squares, cubes = (residuals**2).mean(axis=1), (residuals**3).mean(axis=1)
        comparisons = self.n_layers * len(set(thresholds))
        down = self._reach(squares, cubes, np.zeros_like(squares), comparisons)
        up = self._reach(squares, -cubes, np.zeros_like(squares), comparisons)
        for side, threshold in zip(self._sides, thresholds, strict=True):
            side[index[means + up < threshold]] = _BELOW
            side[index[means - down >= threshold]] = _ABOVE

    def _compare_pairs(self, layers: tuple[int, ...]) -> None:
        means, residuals = self._estimates(layers)
        n = residuals.shape[1]
        # Moments of the differences of all pairs (j minus i) follow from the products of the layers' residuals.
        products, products_2 = residuals @ residuals.T / n, residuals @ (residuals**2).T / n
        own, cubes = np.diag(products), np.diag(products_2)
        own_sums = own[:, None] + own[None, :]
        cubes_of_differences = cubes[None, :] - cubes[:, None] - 3 * products_2 + 3 * products_2.T
        removed, treated = self.rule.sizes or (0, 0)
        # Only a wrong order of layers of different tiers gives a wrong tier, and only in one of both directions.
        n_pairs = removed * (self.n_layers - removed) + (treated - removed) * (self.n_layers - treated)
        reach = self._reach(own_sums - 2 * products, cubes_of_differences, own_sums, n_pairs)
        differences = means[None, :] - means[:, None]
        certain = differences > reach
        if self._look == len(self.looks):
            index = np.arange(len(layers))
            certain |= (differences == 0) & (index[:, None] < index[None, :])
        below = np.zeros((self.n_layers, self.n_layers), dtype=bool)
        below[np.ix_(layers, layers)] = certain
        self._fill_slots(below)

    def _fill_slots(self, below: np.ndarray) -> None:
        """Decides sides by counting; `below[i, j]` (n_layers, n_layers) says that layer i is certainly below j."""
        for side, size in zip(self._sides, self.rule.sizes or (), strict=True):
            changed = True
            while changed:
                unknown = np.flatnonzero(side == _UNKNOWN)
                free_below = size - int((side == _BELOW).sum())
                among = below[np.ix_(unknown, unknown)]
                side[unknown[among.sum(axis=0) >= free_below]] = _ABOVE
                side[unknown[among.sum(axis=1) >= len(unknown) - free_below]] = _BELOW
                changed = bool((side[unknown] != _UNKNOWN).any())

    def _estimates(self, layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns weighted means of layers over the items so far, (layers,), and the items' residuals (layers, n)."""
        drops = np.stack([self._drops[layer] for layer in layers])
        weights = self._weights[: drops.shape[1]]
        means = np.array([np.average(row, weights=weights) for row in drops])
        # The residuals are linearised, because the sum of the sampled weights varies, too.
        return means, weights * (drops - means[:, None]) / weights.mean()

    def _reach(self, squares: np.ndarray, cubes: np.ndarray, scale: np.ndarray, comparisons: int) -> np.ndarray:
        """Returns how far a mean must be above a value to be certainly above it; 0 at the last look.

        Args:
            squares: Second moment of the residuals of each mean.
            cubes: Third moment of the residuals.
            scale: Quantity that the rounding error of `squares` is relative to.
            comparisons: Number of comparisons that share the error of a look.
        """
        if self._look == len(self.looks):
            return np.zeros_like(squares)
        n = self.looks[self._look - 1]
        share = self.error * n / sum(self.looks[:-1]) / max(comparisons, 1)
        spread = squares > _ROUNDING * scale
        squares = np.where(spread, squares, 1.0)
        quantile = _skewed_quantile(-stdtrit(n - 1, share), cubes / squares**1.5 / math.sqrt(n))
        return np.where(spread, quantile * np.sqrt(squares / (n - 1) * (1 - n / self.n_items)), np.inf)


def _skewed_quantile(quantile: float, skewness: np.ndarray) -> np.ndarray:
    """Returns the upper quantile of a studentised mean by Hall's monotone transformation, at least `quantile`.

    Args:
        quantile: Upper quantile without skewness.
        skewness: Skewness of the values, divided by the square root of their number.
    """
    skewness = np.minimum(skewness, -(_ROUNDING**0.5))  # positive skewness would shorten this side
    return np.maximum(quantile, 3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1))


def _tier(below_first: bool, below_second: bool) -> Tier:
    return "remove" if below_first else "middle" if below_second else "keep"


def _looks(n_items: int, first_items: int, growth: float) -> tuple[int, ...]:
    """Returns the numbers of items at which to look, the last one being `n_items`."""
    looks = []
    n = first_items
    while n < n_items:
        looks.append(n)
        n = math.ceil(n * growth)
    return (*looks, n_items)


def _checked_weights(weights: Sequence[float] | np.ndarray | None, n_items: int) -> np.ndarray:
    if weights is None:
        return np.ones(n_items)
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n_items,):
        raise AdaptiveError(f"weights: shape {values.shape}; give one for each of the {n_items} items")
    if not (np.isfinite(values) & (values > 0)).all():
        raise AdaptiveError(f"weights: the smallest is {values.min()}; all must be finite and above 0")
    return values


def _check_arguments(
    n_layers: int, n_items: int, rule: TierRule, error: float, first_items: int, growth: float
) -> None:
    for name, value, least in (("n_layers", n_layers, 1), ("n_items", n_items, 1), ("first_items", first_items, 2)):
        if value < least:
            raise AdaptiveError(f"{name}: {value}; give at least {least}")
    if not 0 < error < 1:
        raise AdaptiveError(f"error: {error} is no probability between 0 and 1; 0.05 is usual")
    if not growth > 1:
        raise AdaptiveError(f"growth: {growth}; looks must grow, give more than 1")
    if rule.sizes is not None and rule.sizes[1] > n_layers:
        raise AdaptiveError(
            f"rule: n_removed {rule.n_removed} and n_middle {rule.n_middle} are more than the {n_layers} layers; "
            "make one smaller"
        )
