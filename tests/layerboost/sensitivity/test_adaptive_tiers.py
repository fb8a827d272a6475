from __future__ import annotations

import numpy as np
import pytest

from layerboost.plan import Treatment, plan_from_thresholds
from layerboost.sensitivity.adaptive_tiers import AdaptiveError, AdaptiveTiers, TierRule

N_LAYERS = 12
SIZES = TierRule(n_removed=4, n_middle=4)
THRESHOLDS = TierRule(remove_below=0.1, keep_above=0.2)
SPREAD = np.linspace(0.0, 0.3, N_LAYERS)
# These drops put near ties across the boundaries of SIZES, which even many items hardly distinguish.
NEAR_TIES = SPREAD + np.where(np.isin(np.arange(N_LAYERS), [3, 7]), 0.025, 0.0)


def _drops(rng, sensitivities, n_items, own_noise=0.1):
    """Draws heavy-tailed drops (n_layers, n_items); hard items are hard for all layers."""
    shared = 1 + 0.5 * rng.standard_t(4, size=n_items)
    own = own_noise * rng.standard_t(4, size=(len(sensitivities), n_items))
    return sensitivities[:, None] * shared + 0.3 * rng.standard_t(4, size=n_items) + own


def _run(drops, rule, **kwargs):
    tiers = AdaptiveTiers(*drops.shape, rule, **kwargs)
    while (request := tiers.next_request()) is not None:
        layers, start, stop = request
        tiers.observe({layer: drops[layer, start:stop] for layer in layers})
    return tiers


@pytest.mark.parametrize("rule", [SIZES, THRESHOLDS])
@pytest.mark.parametrize("sensitivities", [SPREAD, NEAR_TIES])
def test_wrong_tiers_are_no_more_than_stated(rule, sensitivities):
    wrong = 0
    for seed in range(300):
        drops = _drops(np.random.default_rng(seed), sensitivities, 400)
        wrong += _run(drops, rule, error=0.05).tiers() != rule.tiers(drops.mean(axis=1))
    assert wrong <= 0.05 * 300


@pytest.mark.parametrize("sign", [1, -1])
def test_wrong_tiers_are_no_more_than_stated_for_skewed_drops_near_the_thresholds(sign):
    near, rule, wrong = np.array([0.05, 0.09, 0.11, 0.19, 0.21, 0.25]), THRESHOLDS, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        drops = near[:, None] + sign * 0.3 * (rng.lognormal(size=(6, 500)) - np.exp(0.5))
        wrong += _run(drops, rule, error=0.05).tiers() != rule.tiers(drops.mean(axis=1))
    assert wrong <= 0.05 * 300


def test_wrong_tiers_are_no_more_than_stated_for_accuracies():
    wrong = 0
    for seed in range(300):
        chance = np.random.default_rng(seed).random((N_LAYERS, 600))
        drops = np.where(chance < 0.01, -1.0, np.where(chance < 0.02 + SPREAD[:, None], 1.0, 0.0))
        wrong += _run(drops, THRESHOLDS, error=0.05).tiers() != THRESHOLDS.tiers(drops.mean(axis=1))
    assert wrong <= 0.05 * 300


@pytest.mark.parametrize("rule", [SIZES, TierRule(remove_below=0.095, keep_above=0.205)])
def test_an_easy_case_takes_much_less_than_the_full_budget(rule):
    sensitivities = np.repeat([0.0, 0.15, 0.3], 4)
    spent = [
        _run(_drops(np.random.default_rng(seed), sensitivities, 2000, own_noise=0.05), rule).spent for seed in range(20)
    ]
    assert np.mean(spent) < 0.35


def test_clear_layers_stop_and_close_ones_go_on():
    rng = np.random.default_rng(5)
    drops = np.array([0.0, 0.5, 0.5001, 1.0])[:, None] + 0.1 * rng.normal(size=(4, 500))
    tiers = _run(drops, TierRule(n_removed=2, n_middle=0))
    assert [tiers.n_items_used(layer) for layer in range(4)] == [16, 500, 500, 16]
    assert tiers.spent == pytest.approx(1032 / 2000)


@pytest.mark.parametrize("seed", range(5))
def test_ties_take_the_full_budget_and_give_its_tiers(seed):
    drops = np.tile(np.random.default_rng(seed).normal(size=100), (N_LAYERS, 1))
    tiers = _run(drops, SIZES)
    assert tiers.spent == 1.0
    assert tiers.tiers() == SIZES.tiers(drops.mean(axis=1)) == ["remove"] * 4 + ["middle"] * 4 + ["keep"] * 4


def test_items_that_all_agree_give_no_certainty_before_the_last():
    assert _run(np.zeros((3, 50)), THRESHOLDS).spent == 1.0
    assert _run(np.tile([[0.0], [1.0]], 50), TierRule(n_removed=1, n_middle=0)).spent == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_noise_at_the_full_budget_gives_exactly_its_tiers(seed):
    rng = np.random.default_rng(seed)
    drops = rng.integers(-1, 2, size=(8, 15)).astype(float)
    rules = [
        TierRule(n_removed=int(rng.integers(4)), n_middle=int(rng.integers(5))),
        TierRule(remove_below=0.0, keep_above=0.2),
    ]
    for rule in rules:
        assert _run(drops, rule, first_items=15).tiers() == rule.tiers(drops.mean(axis=1))


def test_tiers_by_thresholds_are_those_of_the_plan():
    drops = [-0.1, 0.1, 0.15, 0.2, 0.3, 0.0999]
    letters = {Treatment.NONE: "remove", Treatment.WINDOW: "middle", Treatment.SOFTMAX: "keep"}
    plan = plan_from_thresholds(drops, 0.1, 0.2, Treatment.WINDOW, 16)
    assert THRESHOLDS.tiers(drops) == [letters[treatment] for treatment in plan.treatments]


def test_tiers_by_sizes_are_those_of_the_ranking():
    assert TierRule(n_removed=1, n_middle=2).tiers([0.3, 0.1, 0.1, 0.2]) == ["keep", "remove", "middle", "middle"]


@pytest.mark.parametrize(("n_removed", "n_middle", "tier"), [(0, 0, "keep"), (0, 3, "middle"), (3, 0, "remove")])
def test_a_tier_of_all_layers_takes_no_items(n_removed, n_middle, tier):
    tiers = AdaptiveTiers(3, 100, TierRule(n_removed=n_removed, n_middle=n_middle))
    assert tiers.finished
    assert tiers.next_request() is None
    assert tiers.tiers() == [tier] * 3
    assert tiers.spent == 0.0


@pytest.mark.parametrize("rule", [SIZES, THRESHOLDS])
def test_weights_make_tasks_weigh_the_same(rule):
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(100):
        # The drops of the small task have another order than those of the large one.
        first, second = _drops(rng, SPREAD, 100), _drops(rng, SPREAD[::-1] * 0.5, 300)
        order = rng.permutation(400)
        drops = np.hstack([first, second])[:, order]
        weights = np.repeat([2.0, 2 / 3], [100, 300])[order]
        target = rule.tiers((first.mean(axis=1) + second.mean(axis=1)) / 2)
        wrong += _run(drops, rule, weights=weights).tiers() != target
    assert wrong <= 5


def test_replaying_the_observations_gives_the_same_state():
    drops = _drops(np.random.default_rng(1), SPREAD, 300)
    first, replayed = AdaptiveTiers(N_LAYERS, 300, SIZES), AdaptiveTiers(N_LAYERS, 300, SIZES)
    records = []
    while (request := first.next_request()) is not None:
        layers, start, stop = request
        records.append({layer: drops[layer, start:stop].tolist() for layer in layers})
        first.observe(records[-1])
        # After a restart at any point the same requests follow in the same order.
        replayed = AdaptiveTiers(N_LAYERS, 300, SIZES)
        for record in records:
            replayed.observe(record)
        assert replayed.next_request() == first.next_request()
        assert replayed.spent == first.spent
    assert len(records) > 1
    assert first.tiers() == replayed.tiers() is not None


def test_looks_grow_and_end_with_all_items():
    assert AdaptiveTiers(2, 100, THRESHOLDS).looks == (16, 32, 64, 100)
    assert AdaptiveTiers(2, 64, THRESHOLDS, first_items=4, growth=4).looks == (4, 16, 64)
    assert AdaptiveTiers(2, 10, THRESHOLDS).looks == (10,)
    tiers = AdaptiveTiers(2, 100, THRESHOLDS)
    assert tiers.next_request() == ((0, 1), 0, 16)
    assert tiers.tiers() is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "nothing given"),
        ({"n_removed": 1}, "n_removed given; give n_removed and n_middle"),
        ({"n_removed": 1, "n_middle": 1, "keep_above": 0.1}, "keep_above given"),
        ({"n_removed": -1, "n_middle": 1}, "n_removed: -1 is negative"),
        ({"remove_below": 0.3, "keep_above": 0.2}, "remove_below: 0.3"),
        ({"remove_below": float("nan"), "keep_above": 0.2}, "remove_below: nan"),
    ],
)
def test_rules_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(AdaptiveError, match=message):
        TierRule(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_layers": 0}, "n_layers: 0"),
        ({"n_items": 0}, "n_items: 0"),
        ({"n_layers": 7}, "more than the 7 layers"),
        ({"error": 0.0}, "error: 0.0"),
        ({"first_items": 1}, "first_items: 1"),
        ({"growth": 1.0}, "growth: 1.0"),
        ({"weights": [1.0] * 99}, r"weights: shape \(99,\)"),
        ({"weights": [1.0] * 99 + [0.0]}, "weights: the smallest is 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(AdaptiveError, match=message):
        AdaptiveTiers(**{"n_layers": 8, "n_items": 100, "rule": SIZES, **kwargs})


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        ({0: [0.0] * 16}, r"layers \[0\] given; score layers \[0, 1\]"),
        ({0: [0.0] * 16, 1: [0.0] * 15}, r"layer 1 has shape \(15,\)"),
        ({0: [0.0] * 16, 1: [0.0] * 15 + [float("nan")]}, "layer 1 has .* 1 values not finite"),
    ],
)
def test_observations_that_were_not_asked_for_are_refused_and_change_nothing(drops, message):
    tiers = AdaptiveTiers(2, 100, THRESHOLDS)
    with pytest.raises(AdaptiveError, match=message):
        tiers.observe(drops)
    assert tiers.spent == 0.0
    assert tiers.next_request() == ((0, 1), 0, 16)


def test_observations_after_the_end_are_refused():
    tiers = AdaptiveTiers(2, 100, TierRule(n_removed=0, n_middle=0))
    with pytest.raises(AdaptiveError, match="all layers are decided"):
        tiers.observe({})
