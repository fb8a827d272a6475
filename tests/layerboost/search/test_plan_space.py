"""Tests which plans a search may propose."""

import pytest

from layerboost.plan import Plan, PlanError, Treatment
from layerboost.search.plan_space import Limit, PlanSpace

S, L, N = Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE


def softmax_layers(at_most: float) -> Limit:
    return Limit("n_softmax", {S: (1.0,) * 3, L: (0.0,) * 3, N: (0.0,) * 3}, at_most)


def test_holds_pins_and_limits():
    space = PlanSpace(3, (S, L, N), 16, {0: S}, (softmax_layers(2),))
    assert space.choices(0) == (S,) and space.choices(1) == (S, L, N)
    assert space.contains(Plan.parse("SLN", 16)) and space.contains(Plan.parse("SSN"))
    assert not space.holds(Plan.parse("NSS")) and not space.holds(Plan.parse("SSS"))


def test_plans_by_hand_may_have_other_treatments_than_the_search():
    window = Limit("n_window", {t: (float(t is Treatment.WINDOW),) * 3 for t in Treatment}, 1)
    space = PlanSpace(3, (S, N), 16, limits=(window,))
    by_hand = Plan.parse("SWN", 16)
    assert space.holds(by_hand) and not space.contains(by_hand)


def test_pinned_layers_get_what_they_are_pinned_to():
    assert str(PlanSpace(3, (S, L, N), 16, {1: N}).plan([L, L, S])) == "LNS"


def test_limits_survive_the_rounding_of_sums():
    limit = Limit("kv_bytes_per_token", {S: (0.1, 0.2, 0.0), N: (0.0,) * 3}, 0.3)
    assert limit.holds(Plan.parse("SSN"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pinned": {3: N}}, "pin: layer 3 is none of the model's; use 0 to 2"),
        ({"limits": (Limit("n_softmax", {S: (1.0,)}, 1),)}, "n_softmax: gives no cost of softmax"),
    ],
)
def test_refuses_what_is_not_of_the_model(arguments, message):
    with pytest.raises(PlanError, match=message):
        PlanSpace(3, (S,), **arguments)
