"""Plans successive halving over healing tokens: the budget is spent in rungs, after each of which the best go on.

Quality before healing does not always rank plans like quality after it, so many plans are healed on few tokens and few
on all (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943). Each healing of a rung is complete, with its own
transfer, warm-up and decay: it ranks plans no worse than the first part of a long healing, whose state would have to be
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import ndtri


@dataclass(frozen=True)
class Rung:
    """Describes healings of `n_plans` plans, each on `share` of the budget."""

    share: float
    n_plans: int


@dataclass(frozen=True)
class Agreement:
    """Says how well one ranking of plans predicts a later one.

    Attributes:
        spearman: Rank correlation; None below two plans, and if all plans of one ranking are equal.
        ci_low, ci_high: Ends of its 95 % interval over the choice of plans; None below five plans.
        n_plans: Plans that both rankings have.
    """

    spearman: float | None
    ci_low: float | None
    ci_high: float | None
    n_plans: int


def rungs(plans: int, candidates: int, first: float, rungs: int) -> list[Rung]:
    """Returns the rungs before the whole budget; shares rise and numbers fall in equal ratios to (1, `candidates`).

    A rung that would drop no plan is left out, so that there may be fewer rungs than asked for.

    Args:
        plans: Plans healed in the first rung; more than `candidates`.
        candidates: Plans healed on the whole budget.
        first: Share of the budget of the first rung, between 0 and 1.
        rungs: Number of rungs, at least one.
    """
    found = [
        Rung(first ** (1 - rung / rungs), round(plans * (candidates / plans) ** (rung / rungs)))
        for rung in range(rungs)
    ]
    following = [rung.n_plans for rung in found[1:]] + [candidates]
    return [rung for rung, n_left in zip(found, following, strict=True) if rung.n_plans > n_left]


def total_tokens(rungs: Sequence[Rung], candidates: int, tokens_at: Callable[[float], int]) -> int:
    """Returns the tokens of all rungs and of the last healings.

    Args:
        rungs: The rungs.
        candidates: Number of healings on the whole budget.
        tokens_at: Returns the tokens, in whole steps, of one healing with a share of the budget.
    """
    return sum(rung.n_plans * tokens_at(rung.share) for rung in rungs) + candidates * tokens_at(1.0)


def agreement(early: Sequence[float], late: Sequence[float]) -> Agreement:
    """Returns Spearman's correlation between values of the same plans at two times.

    The interval is Fisher's with the variance of Bonett and Wright (Psychometrika 2000, 65:23). A perfect correlation
    of n plans enters as half way to the next value that n plans can have, as it does not prove perfect agreement.

    Args:
        early, late: Values of the same plans in the same order.
    """
    n = len(early)
    if n < 2 or len(set(early)) < 2 or len(set(late)) < 2:
        return Agreement(None, None, None, n)
    from scipy.stats import spearmanr  # takes half a second to import

    value = float(spearmanr(early, late).statistic)
    if n < 5:
        return Agreement(value, None, None, n)
    highest = 1 - 6 / (n * (n * n - 1))
    inner = min(max(value, -highest), highest)
    reach = float(ndtri(0.975)) * math.sqrt((1 + inner * inner / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(inner) + sign * reach) for sign in (-1, 1))
    return Agreement(value, min(low, value), max(high, value), n)
