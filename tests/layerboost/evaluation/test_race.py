"""Tests which plans drop out of a race: against a plain computation, and how often a plan of the front does."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from layerboost.evaluation.race import winners
from layerboost.evaluation.statistics import PairingError, mean_of_differences, paired_difference


def test_a_plan_drops_out_if_a_rival_of_its_speed_is_better_for_certain():
    rng = np.random.default_rng(0)
    items = rng.normal(2.0, 1.0, 8)
    noise = [rng.normal(0.0, 0.01, 8) for _ in range(5)]
    losses = [{"text": items + more + noise[n]} for n, more in enumerate([0.0, 0.5, 0.5, -0.02, 0.7])]
    speeds, rivals = [1.2, 1.2, 1.3, 1.1, 1.1], [True] * 5
    # Plan 1 has the speed of plan 0 and loses more. Plan 2 is the fastest. Plan 3 is slower than plan 0, but no worse.
    assert winners(speeds, losses, rivals, confidence=0.95) == [None, 0, None, None, 3]
    assert winners(speeds, losses, [False, *rivals[1:3], False, True], confidence=0.95)[4] in (1, 2), (
        "of those that may win"
    )
    assert winners(speeds, losses, [False] * 5, confidence=0.95) == [None] * 5


@pytest.mark.parametrize("seed", range(4))
def test_one_task_agrees_with_the_one_sided_paired_test(seed):
    rng = np.random.default_rng(seed)
    n_plans, n_items = 12, 5
    spread = rng.normal(size=(n_plans, n_items)) * 0.05 + rng.uniform(0, 0.3, n_plans)[:, None]
    speeds = rng.choice([1.0, 1.1, 1.2, 1.3], n_plans).tolist()
    found = winners(speeds, [{"text": row} for row in spread], [True] * n_plans, confidence=0.9)
    assert any(winner is None for winner in found) and any(winner is not None for winner in found)
    for plan, winner in enumerate(found):
        faster = [n for n in range(n_plans) if n != plan and speeds[n] >= speeds[plan]]
        p_values = {n: stats.ttest_rel(spread[plan], spread[n], alternative="greater").pvalue for n in faster}
        assert (winner is not None) == any(p < 0.1 / len(faster) for p in p_values.values())
        assert winner is None or p_values[winner] < 0.1 / len(faster)


@pytest.mark.parametrize("seed", range(3))
def test_several_tasks_agree_with_the_bounds_of_single_comparisons(seed):
    rng = np.random.default_rng(seed)
    n_plans, confidence = 9, 0.9
    losses = [
        {task: rng.normal(rng.uniform(0, 0.2), spread, n) for task, n, spread in (("a", 3, 0.02), ("b", 20, 0.2))}
        for _ in range(n_plans)
    ]
    speeds = rng.choice([1.0, 1.1, 1.2], n_plans).tolist()
    found = winners(speeds, losses, [True] * n_plans, confidence=confidence)
    for plan, winner in enumerate(found):
        faster = [n for n in range(n_plans) if n != plan and speeds[n] >= speeds[plan]]
        low = {
            rival: mean_of_differences(
                [
                    paired_difference(losses[plan][task].tolist(), losses[rival][task].tolist(), confidence=None)
                    for task in ("a", "b")
                ],
                confidence=1 - 2 * (1 - confidence) / len(faster),
            ).ci_low
            for rival in faster
        }
        best = max(low, key=low.get, default=None)
        assert winner == (best if best is not None and low[best] > 0 else None)
    assert any(winner is None for winner in found) and any(winner is not None for winner in found)


def test_tasks_have_equal_weights_and_a_single_item_proves_nothing():
    short, long = np.array([0.0, 0.01]), np.linspace(0.0, 0.01, 50)
    better = {"few": short, "many": long}
    worse = {"few": short + 0.2, "many": long + 0.2 + 1e-4 * np.arange(50)}
    assert winners([1.0, 1.0], [worse, better], [True, True], confidence=0.95) == [1, None]
    mixed = {"few": short + 0.3 + 1e-3 * np.arange(2), "many": long - 0.1 - 1e-4 * np.arange(50)}
    assert winners([1.0, 1.0], [mixed, better], [True, True], confidence=0.95) == [1, None], "0.1 worse on average"
    single = [{"few": task[:1], "many": items} for task, items in ((short + 9, long), (short, long))]
    assert winners([1.0, 1.0], single, [True, True], confidence=0.95) == [None, None]


def test_thousands_of_plans_take_seconds():
    rng = np.random.default_rng(0)
    losses = [{"text": row} for row in rng.normal(size=(3000, 16))]
    start = time.process_time()
    assert len(winners(rng.normal(size=3000).tolist(), losses, [True] * 3000, confidence=0.95)) == 3000
    assert time.process_time() - start < 20
    assert winners([], [], [], confidence=0.95) == []


def test_plans_of_different_items_are_not_compared():
    with pytest.raises(PairingError, match="a has \\[2, 3\\] of them"):
        winners([1.0, 1.0], [{"a": np.zeros(3)}, {"a": np.zeros(2)}], [True, True], confidence=0.95)


def test_a_plan_of_the_front_drops_out_no_more_often_than_stated():
    rng = np.random.default_rng(1)
    n_races, n_plans, n_out = 600, 10, 0
    for _ in range(n_races):
        # All plans are as fast and as good as each other: whoever drops out is on the front.
        losses = rng.normal(size=(n_plans, 6)) + 3 * rng.normal(size=6)
        found = winners([1.0] * n_plans, [{"text": row} for row in losses], [True] * n_plans, confidence=0.9)
        n_out += sum(winner is not None for winner in found)
    assert n_out / (n_races * n_plans) < 0.1
