"""Tests the baselines: the published hybrids, and other plans with the same attention budget."""

import pytest

from layerboost.plan import Plan, Treatment
from layerboost.search.baselines import (
    BaselineError,
    baseline_plans,
    check_baseline,
    is_of_same_budget,
    n_baseline_plans,
)

BUDGET = Plan.parse("SNLLNSLSNLNN", 16)
COSINE = [0.9, 0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.05, 0.95, 0.01]


def plan_of(name, n_layers=12, **given):
    found = baseline_plans(name, n_layers, **given)
    assert list(found) == [name]
    return found[name]


def test_uniform_baselines():
    assert plan_of("window", 4, window=16) == Plan.parse("WWWW", 16)
    assert plan_of("linear_window", 4, window=16) == Plan.parse("LLLL", 16)
    assert plan_of("linear", 4, window=16) == Plan.parse("LLLL", 1)
    assert plan_of("parent", 4, window=16) == Plan.parse("SSSS"), "the control treats nothing"


@pytest.mark.parametrize(
    ("name", "n_layers", "plan"),
    [
        ("interleaved_1/2", 8, "SLSLSLSL"),
        ("interleaved_1/4", 8, "LSLLLSLL"),
        ("interleaved_1/4", 12, "LSLLLSLLLSLL"),
        ("interleaved_1/3", 3, "LSL"),
    ],
)
def test_a_share_of_the_layers_is_softmax_evenly_spread(name, n_layers, plan):
    assert plan_of(name, n_layers, window=8) == Plan.parse(plan, 8)
    windowed = plan_of(name, n_layers, window=8, middle=Treatment.WINDOW)
    assert windowed == Plan.parse(plan.replace("L", "W"), 8)


@pytest.mark.parametrize("name", ["interleaved", "cosine", "first", "last", "random"])
def test_a_budget_is_kept_to_the_layer(name):
    plan = plan_of(name, budget=BUDGET, cosine=COSINE)
    assert is_of_same_budget(name) and plan.window == 16
    assert sorted(str(plan)) == sorted(str(BUDGET))


def test_layers_are_treated_in_the_order_that_the_name_says():
    assert str(plan_of("first", budget=BUDGET)) == "NNNNNLLLLSSS"
    assert str(plan_of("last", budget=BUDGET)) == "SSSLLLLNNNNN"
    assert str(plan_of("cosine", budget=BUDGET, cosine=COSINE)) == "SNLNSNLLLNSN"
    assert str(plan_of("interleaved", 6, budget=Plan.parse("SSLLNN", 4))) == "SLNSLN"
    assert str(plan_of("first", 4, budget=Plan.parse("SLWN", 4))) == "NWLS"


def test_random_plans_follow_the_seed_and_differ():
    found = baseline_plans("random:3", 12, budget=BUDGET, seed=1)
    assert list(found) == ["random_1", "random_2", "random_3"]
    assert len(set(found.values())) == 3 == n_baseline_plans("random:3")
    assert found == baseline_plans("random:3", 12, budget=BUDGET, seed=1)
    assert found != baseline_plans("random:3", 12, budget=BUDGET, seed=2)
    assert plan_of("random", budget=BUDGET, seed=1) == found["random_1"]


@pytest.mark.parametrize("name", ["randm", "random:0", "interleaved_2/2", "interleaved_1/0", "interleaved_3/2", ""])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(BaselineError, match=f"baseline: '{name}' is unknown; use one of window, .*random:3"):
        check_baseline(name)


def test_what_a_baseline_needs_is_asked_for():
    with pytest.raises(BaselineError, match="'first' is made for a plan"):
        baseline_plans("first", 12)
    with pytest.raises(BaselineError, match="needs a distance for each of the 12 layers"):
        baseline_plans("cosine", 12, budget=BUDGET)
    with pytest.raises(ValueError, match="the model has 11 layers"):
        baseline_plans("last", 11, budget=BUDGET)
