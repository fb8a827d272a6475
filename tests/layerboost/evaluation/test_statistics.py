from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from layerboost.evaluation.statistics import (
    Difference,
    PairingError,
    mean_of_differences,
    mean_stderr,
    paired_difference,
    ratio_residual_stderr,
)


def _items(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=n)
    return 5 + hardness + 0.1 * rng.normal(size=n), 4 + hardness + 0.1 * rng.normal(size=n)


def test_paired_difference_is_base_minus_other_with_the_error_of_the_differences():
    base, other = _items(50)
    difference = paired_difference(base, other)
    assert difference.mean == pytest.approx((base - other).mean())
    assert difference.stderr == pytest.approx((base - other).std(ddof=1) / math.sqrt(50))
    assert difference.n_items == 50
    # The difficulty of an item that both models share cancels; unpaired, the error would be about ten times as large.
    assert difference.stderr < 0.2 * math.hypot(mean_stderr(base), mean_stderr(other))


def test_interval_is_the_symmetric_studentised_bootstrap_of_the_mean():
    rng = np.random.default_rng(7)
    values = rng.exponential(size=40)
    deviations = []
    for _ in range(4000):
        drawn = values[rng.integers(40, size=40)]
        deviations.append(abs(drawn.mean() - values.mean()) / mean_stderr(drawn))
    difference = paired_difference(values, np.zeros(40), resamples=4000)
    reach = np.quantile(deviations, 0.95) * difference.stderr
    assert difference.ci_low == pytest.approx(values.mean() - reach, abs=0.15 * difference.stderr)
    assert difference.ci_high == pytest.approx(values.mean() + reach, abs=0.15 * difference.stderr)


@pytest.mark.parametrize("values", [[0.1, 0.4, -0.2, 0.9], [0.0] * 299 + [1.0], [0.0] * 50 + [1.0] * 2, [1.0, 1.1]])
def test_interval_is_finite_and_never_narrower_than_students(values):
    difference = paired_difference(values, np.zeros(len(values)))
    least = stats.t.ppf(0.975, len(values) - 1) * difference.stderr
    assert least - 1e-12 <= difference.ci_high - difference.mean < 20 * difference.stderr
    assert difference.mean - difference.ci_low == pytest.approx(difference.ci_high - difference.mean)


_ACCURACY_LIKE = {"a": [-1.0, 0.0, 1.0], "p": [0.03, 0.89, 0.08]}


@pytest.mark.parametrize(
    ("name", "n", "kwargs", "truth"),
    [
        ("normal", 20, {}, 0.0),
        ("normal", 50, {}, 0.0),
        ("exponential", 50, {}, 1.0),
        ("exponential", 200, {}, 1.0),
        ("lognormal", 50, {"sigma": 0.5}, math.exp(0.125)),
        ("lognormal", 100, {"sigma": 0.5}, math.exp(0.125)),
        ("standard_t", 100, {"df": 3}, 0.0),
        ("choice", 200, _ACCURACY_LIKE, 0.05),
        ("choice", 300, _ACCURACY_LIKE, 0.05),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(name, n, kwargs, truth):
    draws = getattr(np.random.default_rng(11), name)(size=(1000, n), **kwargs)
    zeros = np.zeros(n)
    differences = [paired_difference(draw, zeros, resamples=500) for draw in draws]
    covered = np.mean([d.ci_low <= truth <= d.ci_high for d in differences])
    assert 0.93 <= covered <= 0.97


def test_interval_of_a_mean_over_tasks_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(1000):
        # If a small task has most of the error, the normal interval would cover less than 92 %.
        small, large = rng.normal(size=10), rng.normal(0.5, size=400)
        mean = mean_of_differences([paired_difference(x, np.zeros(len(x)), resamples=1) for x in (small, large)])
        covered += mean.ci_low <= 0.25 <= mean.ci_high
    assert 930 <= covered <= 970


def test_interval_depends_on_the_seed_alone(monkeypatch):
    base, other = _items(30)
    first = paired_difference(base, other, seed=1)
    assert first == paired_difference(base, other, seed=1)
    assert first != paired_difference(base, other, seed=2)
    monkeypatch.setattr("layerboost.evaluation.statistics._RESAMPLED_VALUES_AT_ONCE", 100)
    assert paired_difference(base, other, seed=1) == first


def test_one_item_has_no_error_and_equal_items_have_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_difference([0.5], [0.25]) == Difference(0.25, None, None, None, 1)
        assert paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == Difference(0.0, 0.0, 0.0, 0.0, 3)
        assert mean_stderr([2.0]) is None


@pytest.mark.parametrize(("base", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_items_that_do_not_pair_are_refused(base, other):
    with pytest.raises(PairingError, match="same items"):
        paired_difference(base, other)
    with pytest.raises(PairingError, match="same items"):
        ratio_residual_stderr(base, other, 1.0)


def test_mean_over_tasks_weighs_tasks_equally_and_adds_their_errors():
    first, second = paired_difference(*_items(10)), paired_difference(*_items(1000, seed=1))
    mean = mean_of_differences([first, second])
    assert mean.mean == pytest.approx((first.mean + second.mean) / 2)
    assert mean.stderr == pytest.approx(math.hypot(first.stderr, second.stderr) / 2)
    assert mean.n_items == 1010
    freedom = (first.stderr**2 + second.stderr**2) ** 2 / (first.stderr**4 / 9 + second.stderr**4 / 999)
    assert mean.ci_high - mean.mean == pytest.approx(stats.t.ppf(0.975, freedom) * mean.stderr)
    assert mean.mean - mean.ci_low == pytest.approx(mean.ci_high - mean.mean)


def test_mean_over_tasks_with_exact_errors_has_the_normal_interval():
    mean = mean_of_differences([Difference(0.2, 0.1, None, None, 0), Difference(0.0, 0.0, 0.0, 0.0, 5)])
    assert mean.ci_high - mean.mean == pytest.approx(1.959964 * 0.05, rel=1e-6)
    equal = mean_of_differences([Difference(0.2, 0.0, 0.2, 0.2, 5)])
    assert (equal.ci_low, equal.ci_high) == (0.2, 0.2)


def test_mean_over_tasks_without_all_errors_has_none():
    assert mean_of_differences([paired_difference(*_items(10)), paired_difference([1.0], [0.0])]).stderr is None
    with pytest.raises(PairingError, match="at least one"):
        mean_of_differences([])
