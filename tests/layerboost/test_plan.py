"""Tests plans: parsing, identity, thresholds."""

import random

import pytest

from layerboost.plan import Plan, PlanError, Treatment, plan_from_thresholds


def test_a_plan_reads_back_from_its_letters():
    letters = "".join(random.choices("SLWN", k=12))
    plan = Plan.parse(letters + "W", window=8)
    assert str(plan) == letters + "W" and len(plan) == 13
    assert Plan.from_dict(plan.to_dict()) == plan
    assert sum(plan.count(treatment) for treatment in Treatment) == 13


def test_the_id_knows_letters_and_window_but_no_window_that_nothing_uses():
    assert Plan.parse("SW", 8).plan_id != Plan.parse("SW", 9).plan_id != Plan.parse("WS", 9).plan_id
    assert Plan.parse("SN", 8) == Plan.parse("sn") and Plan.parse("SN", 8).plan_id == Plan.parse("SN").plan_id
    assert len(Plan.parse("SN").plan_id) == 12


def test_sinks_belong_to_the_id_where_a_window_holds_them_and_nowhere_else():
    with_sinks = Plan.parse("SW", 8, sinks=2)
    assert with_sinks != Plan.parse("SW", 8) and with_sinks.plan_id != Plan.parse("SW", 8).plan_id
    assert with_sinks.newest_tokens == 6 and Plan.from_dict(with_sinks.to_dict()) == with_sinks
    assert Plan.parse("SN", 8, sinks=2) == Plan.parse("SN")
    assert Plan.parse("SW", 8).to_dict() == {"plan": "SW", "window": 8}  # ids of plans without sinks stay the same
    assert Plan.parse("SW", 8).plan_id == "8fc9b33d2bd9"
    assert with_sinks.with_layer(0, Treatment.LINEAR_WINDOW) == Plan.parse("LW", 8, sinks=2)


def test_with_layer_changes_one_layer():
    plan = Plan.uniform(Treatment.SOFTMAX, 3).with_layer(1, Treatment.WINDOW, 4)
    assert str(plan) == "SWS" and plan.window == 4


def test_thresholds_sort_layers_into_tiers_with_closed_lower_and_open_upper_ends():
    plan = plan_from_thresholds([-0.1, 0.0, 0.1, 0.2, 0.3], 0.1, 0.2, Treatment.LINEAR_WINDOW, 16)
    assert str(plan) == "NNLSS"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plan.parse("SSX"), "'X'"),
        (lambda: Plan.parse(""), "no layers"),
        (lambda: Plan.parse("SW"), "window: None"),
        (lambda: Plan.parse("SL", 0), "window: 0"),
        (lambda: Plan.parse("SL", 4, sinks=4), "sinks: 4.*give 0 to 3"),
        (lambda: Plan.parse("SL", 4, sinks=-1), "sinks: -1"),
        (lambda: Plan.parse("SN").check_length(3), "2 letters; the model has 3 layers"),
        (lambda: plan_from_thresholds([0.1], 0.2, 0.1, Treatment.WINDOW, 4), "above keep_above"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_value(make, message):
    with pytest.raises(PlanError, match=message):
        make()
