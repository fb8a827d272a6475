"""Successive halving over healing tokens: which plans are healed on what share of the budget, and which of them go on.

Quality before healing does not always order plans as quality after it, so many plans are healed on few tokens and few
on all (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943). A rung is a healing of its own, with its own
transfer, warm-up and decay: it orders plans no worse than the first part of a long one, of which nothing must be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Rung:
    """Healings of `n_plans` plans, each on `share` of the budget."""

    share: float
    n_plans: int


@dataclass(frozen=True)
class Agreement:
    """How well one ranking of plans tells a later one.

    Attributes:
        spearman: rank correlation; None below two plans, and where all plans of one ranking are equal.
        ci_low, ci_high: ends of its 95 % interval over the choice of plans; None below five plans.
        n_plans: plans that both rankings have.
    """

    spearman: float | None
    ci_low: float | None
    ci_high: float | None
    n_plans: int


def rungs(plans: int, candidates: int, first: float, rungs: int) -> list[Rung]:
    """The rungs before the whole budget: shares rise and numbers fall in equal ratios to (1, `candidates`).

    A rung that would drop no plan is left out, so that there may be fewer than asked for.

    Args:
        plans: healed in the first rung; more than `candidates`.
        candidates: healed on the whole budget.
        first: share of the budget of the first rung, between 0 and 1.
        rungs: how many, at least one.
    """
    found = [
        Rung(first ** (1 - rung / rungs), round(plans * (candidates / plans) ** (rung / rungs)))
        for rung in range(rungs)
    ]
    following = [rung.n_plans for rung in found[1:]] + [candidates]
    return [rung for rung, n_left in zip(found, following, strict=True) if rung.n_plans > n_left]


def total_tokens(rungs: Sequence[Rung], candidates: int, tokens_at: Callable[[float], int]) -> int:
    """Tokens of all rungs and of the last healings.

    Args:
        tokens_at: tokens that one healing takes of a share of the budget, in whole steps.
    """
    return sum(rung.n_plans * tokens_at(rung.share) for rung in rungs) + candidates * tokens_at(1.0)


def agreement(early: Sequence[float], late: Sequence[float]) -> Agreement:
    """Spearman's correlation of what plans are worth at two times.

    The interval is Fisher's with the variance of Bonett and Wright (Psychometrika 2000, 65:23). A perfect correlation
    of n plans is taken as half way to the next one that n plans can have, for it does not prove perfect agreement.

    Args:
        early, late: of the same plans in the same order.
    """
    n = len(early)
    if n < 2 or len(set(early)) < 2 or len(set(late)) < 2:
        return Agreement(None, None, None, n)
    value = float(stats.spearmanr(early, late).statistic)
    if n < 5:
        return Agreement(value, None, None, n)
    highest = 1 - 6 / (n * (n * n - 1))
    inner = min(max(value, -highest), highest)
    reach = float(stats.norm.ppf(0.975)) * math.sqrt((1 + inner * inner / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(inner) + sign * reach) for sign in (-1, 1))
    return Agreement(value, min(low, value), max(high, value), n)
