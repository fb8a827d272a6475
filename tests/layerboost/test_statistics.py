from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from layerboost.statistics import (
    Difference,
    PairingError,
    mean_of_differences,
    mean_stderr,
    paired_difference,
    ratio_of_means,
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
    # What makes an item hard for both cancels: unpaired, the error would be about ten times as large.
    assert difference.stderr < 0.2 * math.hypot(mean_stderr(base), mean_stderr(other))


def test_interval_is_the_percentile_bootstrap_of_the_mean():
    base, other = _items(40, seed=3)
    rng = np.random.default_rng(7)
    means = [(base - other)[rng.integers(40, size=40)].mean() for _ in range(4000)]
    difference = paired_difference(base, other, resamples=4000)
    assert difference.ci_low == pytest.approx(np.quantile(means, 0.025), abs=0.1 * difference.stderr)
    assert difference.ci_high == pytest.approx(np.quantile(means, 0.975), abs=0.1 * difference.stderr)


def test_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        base, other = _items(30, seed)
        difference = paired_difference(base, other, confidence=0.9, resamples=400)
        covered += difference.ci_low <= 1.0 <= difference.ci_high
    assert 0.82 <= covered / 200 <= 0.96


def test_interval_depends_on_the_seed_alone(monkeypatch):
    base, other = _items(30)
    first = paired_difference(base, other, seed=1)
    assert first == paired_difference(base, other, seed=1)
    assert first != paired_difference(base, other, seed=2)
    monkeypatch.setattr("layerboost.statistics._RESAMPLED_VALUES_AT_ONCE", 100)
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
        ratio_of_means(base, other)


def test_mean_over_tasks_weighs_tasks_equally_and_adds_their_errors():
    first, second = paired_difference(*_items(10)), paired_difference(*_items(1000, seed=1))
    mean = mean_of_differences([first, second])
    assert mean.mean == pytest.approx((first.mean + second.mean) / 2)
    assert mean.stderr == pytest.approx(math.hypot(first.stderr, second.stderr) / 2)
    assert mean.n_items == 1010
    assert mean.ci_high - mean.mean == pytest.approx(1.959964 * mean.stderr, rel=1e-6)
    assert mean.mean - mean.ci_low == pytest.approx(mean.ci_high - mean.mean)


def test_mean_over_tasks_without_all_errors_has_none():
    assert mean_of_differences([paired_difference(*_items(10)), paired_difference([1.0], [0.0])]).stderr is None
    with pytest.raises(PairingError, match="at least one"):
        mean_of_differences([])


def test_ratio_error_is_that_of_many_repetitions():
    ratios = np.array([ratio_of_means(*_items(60, seed))[0] for seed in range(2000)])
    base, other = _items(60, seed=5)
    ratio, stderr = ratio_of_means(base, other)
    assert ratio == pytest.approx(other.mean() / base.mean())
    assert stderr == pytest.approx(ratios.std(), rel=0.3)


def test_ratio_of_equal_models_is_exactly_one_and_of_a_base_at_zero_is_nothing():
    base, _ = _items(20)
    assert ratio_of_means(base, base) == (1.0, 0.0)
    ratio, stderr = ratio_of_means([0.0, 0.0], [1.0, 0.0])
    assert math.isnan(ratio)
    assert stderr is None
