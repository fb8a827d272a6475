"""Tests the speed model: it recovers known times with honest errors, and its plans determine every time."""

import json
import random

import numpy as np
import pytest

from layerboost.plan import Plan, Treatment
from layerboost.speed.speed_model import SpeedFitError, SpeedModel, counts, design_plans

N, WINDOW = 12, 16
SECONDS = {Treatment.SOFTMAX: 5e-3, Treatment.LINEAR_WINDOW: 4e-3, Treatment.WINDOW: 1.5e-3, Treatment.NONE: 0.0}
SECONDS[Treatment.AFFINE] = 0.7e-3
SLIDING = tuple(512 if layer % 6 else None for layer in range(N))


def _step_s(plan, native=(None,) * N):
    sliding = sum(t is Treatment.SOFTMAX and n is not None for t, n in zip(plan.treatments, native, strict=True))
    return 2e-2 + sum(SECONDS[treatment] for treatment in plan.treatments) - 2e-3 * sliding


def _random_plan(rng):
    weights = [rng.random() for _ in Treatment]
    return Plan(tuple(rng.choices(list(Treatment), weights, k=N)), WINDOW)


def _design(**changes):
    return design_plans(N, tuple(Treatment), WINDOW, 8, **changes)


@pytest.mark.parametrize("native", [None, SLIDING])
def test_times_without_noise_are_found_exactly_from_eight_plans(native):
    plans = _design(native_windows=native)
    assert len(plans) == 8
    points = [(plan, _step_s(plan, native or (None,) * N), 0.0) for plan in plans]
    model = SpeedModel.fit(points, concurrency=32, native_windows=native)
    rng = random.Random(1)
    for plan in (_random_plan(rng) for _ in range(20)):
        assert model.predict(plan)[0] == pytest.approx(32 / _step_s(plan, native or (None,) * N), rel=1e-6)
    times = model.layer_times()
    assert set(times) == set(Treatment) and times[Treatment.NONE] == [0.0] * N
    assert times[Treatment.WINDOW] == pytest.approx([1.5e-3] * N)
    expected = [5e-3 - (2e-3 if native and native[layer] else 0) for layer in range(N)]
    assert times[Treatment.SOFTMAX] == pytest.approx(expected)


def test_the_stated_error_is_that_of_new_plans():
    rng, noise = random.Random(0), np.random.default_rng(0)
    scaled, relative, design = [], [], _design()
    for _ in range(40):
        measured = [_step_s(plan) * (1 + 0.03 * noise.standard_normal()) for plan in design]
        points = [(plan, seconds, 0.03 * seconds) for plan, seconds in zip(design, measured, strict=True)]
        model = SpeedModel.fit(points, concurrency=8)
        for plan in (_random_plan(rng) for _ in range(10)):
            throughput, stderr = model.predict(plan)
            seen = 8 / (_step_s(plan) * (1 + 0.03 * noise.standard_normal()))
            scaled.append((throughput - seen) / stderr)
            relative.append(abs(throughput / seen - 1))
    assert 0.6 < np.std(scaled) < 1.1 and np.median(relative) < 0.04


def test_plans_that_do_not_add_up_show_in_the_error():
    def not_additive(plan):  # a mixture costs a quarter more than its parts
        return _step_s(plan) * (1.25 if len(set(plan.treatments)) > 1 else 1.0)

    models = [
        SpeedModel.fit([(plan, seconds(plan), 0.0) for plan in _design()], concurrency=1)
        for seconds in (_step_s, not_additive)
    ]
    assert models[0].scatter == pytest.approx(0.01) and models[1].scatter > 0.06


def test_times_are_never_negative():
    # The windowed plans are timed as if they were faster than plans without attention.
    points = [(plan, _step_s(plan) - 4e-3 * plan.count(Treatment.WINDOW) / N * 5, 0.0) for plan in _design()]
    model = SpeedModel.fit(points, concurrency=1)
    assert (
        min(model.rest_s, *model.attention_s) >= 0
        and model.attention_s[model.kinds.index((Treatment.WINDOW, None))] == 0
    )


def test_what_was_not_measured_is_not_predicted():
    plans = design_plans(N, (), WINDOW, 4)
    model = SpeedModel.fit([(plan, _step_s(plan), 0.0) for plan in plans], concurrency=1)
    assert model.window is None and {t for plan in plans for t in plan.treatments} == {
        Treatment.SOFTMAX,
        Treatment.NONE,
    }
    assert model.predict(Plan.parse("S" * 11 + "W", WINDOW)) is None
    assert SpeedModel.fit([(plan, _step_s(plan), 0.0) for plan in _design()], concurrency=1).predict(
        Plan.uniform(Treatment.WINDOW, N, WINDOW + 1)
    ) is None  # fmt: skip


@pytest.mark.parametrize(
    "plans, message",
    [
        ([], "0 measured plans"),
        (_design()[:4], "4 measured plans do not tell 4 times"),
        ([plan for plan in _design() if plan.count(Treatment.SOFTMAX) in (0, 12)][:4], "4 measured plans"),
        ([Plan.parse(text * 6) for text in ("SN", "NS", "SN", "SN")], "4 measured plans do not tell 2 times"),
        ([*_design(), Plan.uniform(Treatment.WINDOW, N, 8)], "windows \\[8, 16\\]"),
    ],
)
def test_too_little_to_fit_is_refused(plans, message):
    with pytest.raises(SpeedFitError, match=message):
        SpeedModel.fit([(plan, _step_s(plan), 0.0) for plan in plans], concurrency=1)


def test_a_model_survives_json():
    plans = _design(native_windows=SLIDING)
    points = [(plan, _step_s(plan, SLIDING), 1e-4) for plan in plans]
    model = SpeedModel.fit(points, concurrency=2, native_windows=SLIDING)
    again = SpeedModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again == model and again.predict(plans[-1]) == model.predict(plans[-1])


def test_the_design_begins_with_the_uniform_plans_holds_the_given_ones_and_tells_every_time():
    given = Plan.parse("SSNNLLWWSNSN", WINDOW)
    plans = _design(given=[given, Plan.uniform(Treatment.NONE, N), Plan.uniform(Treatment.WINDOW, N, 3)])
    assert plans[:5] == [Plan.uniform(treatment, N, WINDOW) for treatment in Treatment] and plans[5] == given
    assert len(plans) == len(set(plans)) == 8
    assert len({counts(plan, (None,) * N) for plan in plans}) == 8
    for mixture in plans[6:]:
        assert max(map(mixture.count, Treatment)) <= N // 2
        halves = [mixture.treatments[: N // 2], mixture.treatments[N // 2 :]]
        assert all(abs(halves[0].count(t) - halves[1].count(t)) <= 1 for t in Treatment)


@pytest.mark.parametrize("n_layers, n", [(1, 8), (2, 3), (3, 8), (36, 8), (80, 10)])
def test_the_design_fits_models_of_any_depth(n_layers, n):
    plans = design_plans(n_layers, tuple(Treatment), WINDOW, n)
    if n_layers == 1:
        assert len(plans) == 5
        return
    assert len(plans) == max(n, 6)
    model = SpeedModel.fit([(plan, 1.0 + plan.count(Treatment.SOFTMAX), 0.0) for plan in plans], concurrency=1)
    assert model.layer_times()[Treatment.SOFTMAX] == pytest.approx([1.0] * n_layers)


def test_counts_ignore_the_order_but_not_the_parents_windows():
    one, other = Plan.parse("SN" * 6), Plan.parse("NS" * 6)
    assert counts(one, (None,) * N) == counts(other, (None,) * N)
    assert counts(one, (None, 8) * 6) != counts(other, (None, 8) * 6)
