"""Tests rungs: their plans and shares of the budget, which plans advance, and how early ranks predict later ones."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from scipy import stats

from layerboost.healing.rungs import Agreement, Rung, agreement, rungs, total_tokens


def test_shares_rise_and_numbers_fall_in_equal_ratios_to_the_last_healings():
    ladder = rungs(27, 1, 0.001, 3)
    assert [rung.n_plans for rung in ladder] == [27, 9, 3]
    assert [rung.share for rung in ladder] == pytest.approx([0.001, 0.01, 0.1])
    assert rungs(12, 3, 0.1, 1) == [Rung(0.1, 12)]
    assert rungs(18, 3, 0.05, 2)[1] == Rung(pytest.approx(math.sqrt(0.05)), 7)


def test_every_rung_drops_plans():
    draw = random.Random(0)
    for _ in range(200):
        candidates = draw.randint(1, 6)
        plans = candidates + draw.randint(1, 20)
        ladder = rungs(plans, candidates, draw.uniform(0.01, 0.9), draw.randint(1, 6))
        numbers = [rung.n_plans for rung in ladder] + [candidates]
        assert numbers[0] == plans
        assert all(more > fewer for more, fewer in pairwise(numbers))
        shares = [rung.share for rung in ladder] + [1.0]
        assert shares == sorted(set(shares))


def test_tokens_are_those_of_all_healings_in_whole_steps():
    ladder = [Rung(0.1, 9), Rung(0.3, 3)]
    assert total_tokens(ladder, 1, lambda share: int(share * 100) // 8 * 8) == 9 * 8 + 3 * 24 + 96


def test_agreement_of_ranks_and_its_interval():
    early, late = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.1, 2.0, 2.9, 5.0, 4.0, 6.0, 7.5]
    found = agreement(early, late)
    assert found.spearman == pytest.approx(stats.spearmanr(early, late).statistic)
    assert -1 < found.ci_low < found.spearman < found.ci_high < 1
    perfect = agreement(early, early)
    assert perfect.spearman == perfect.ci_high == 1
    assert 0.5 < perfect.ci_low < 1, "seven plans do not prove that all plans agree"
    assert agreement(early[:4], late[:4]) == Agreement(1.0, None, None, 4)
    assert agreement([1.0, 1.0], [1.0, 2.0]) == Agreement(None, None, None, 2)
    assert agreement([1.0], [1.0]).spearman is None


def test_the_interval_covers():
    draw = random.Random(1)
    n_covered, n_trials, rho = 0, 400, 0.6
    true = 6 / math.pi * math.asin(rho / 2)  # Spearman's correlation of a bivariate normal
    for _ in range(n_trials):
        pairs = [(x := draw.gauss(0, 1), rho * x + math.sqrt(1 - rho * rho) * draw.gauss(0, 1)) for _ in range(12)]
        found = agreement(*zip(*pairs, strict=True))
        n_covered += found.ci_low <= true <= found.ci_high
    assert 0.91 <= n_covered / n_trials <= 0.99
