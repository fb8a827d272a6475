from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from layerboost.evaluation.statistics import mean_of_differences, paired_difference
from layerboost.sensitivity.ranking import (
    DropMatrix,
    RankingError,
    indistinct_neighbours,
    items_until_stable,
    rank_correlation,
    reliability,
    split_half,
    straddles,
)


def _matrix(seed=0, n_layers=8, n_items=(40, 61), noise=0.5) -> DropMatrix:
    rng = np.random.default_rng(seed)
    sensitivities = np.linspace(0, 1, n_layers)[:, None]
    return DropMatrix(
        {f"task{i}": sensitivities + noise * rng.normal(size=(n_layers, n)) for i, n in enumerate(n_items)}
    )


def _accuracies(seed=0, n_layers=8, n_items=(40, 30)) -> DropMatrix:
    rng = np.random.default_rng(seed)
    return DropMatrix(
        {f"task{i}": rng.choice([-1, 0, 1], p=[0.05, 0.8, 0.15], size=(n_layers, n)) for i, n in enumerate(n_items)}
    )


def _naive_sensitivity(matrix: DropMatrix, items: dict[str, np.ndarray]) -> np.ndarray:
    return matrix.take(items).sensitivity()


def test_sensitivity_weighs_tasks_the_same():
    matrix = DropMatrix({"a": np.array([[1.0, 3.0], [0.0, 0.0]]), "b": np.array([[0.0], [5.0]])})
    assert matrix.sensitivity() == pytest.approx([1.0, 2.5])
    assert (matrix.n_layers, matrix.n_items) == (2, 3)


def test_take_repeats_and_leaves_out():
    matrix = DropMatrix({"a": np.array([[1.0, 3.0], [0.0, 4.0]]), "b": np.ones((2, 3))})
    taken = matrix.take({"a": np.array([1, 1, 0])})
    assert taken.tasks["a"].tolist() == [[3.0, 3.0, 1.0], [4.0, 4.0, 0.0]]
    assert list(taken.tasks) == ["a"]
    with pytest.raises(RankingError, match="no task c"):
        matrix.take({"c": np.array([0])})


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one task"),
        ({"a": np.ones((2, 0))}, r"tasks.a: shape \(2, 0\)"),
        ({"a": np.ones(3)}, r"tasks.a: shape \(3,\)"),
        ({"a": np.array([[1.0, 2.0], [np.nan, 0.0]])}, "layer 1, item 0 is nan"),
        ({"a": np.ones((2, 3)), "b": np.ones((3, 3))}, "numbers of layers differ"),
    ],
)
def test_bad_drops_are_refused(tasks, message):
    with pytest.raises(RankingError, match=message):
        DropMatrix(tasks)


@pytest.mark.parametrize("make", [_matrix, _accuracies])
def test_split_half_is_that_of_naive_random_halves(make):
    matrix = make(3)
    rng = np.random.default_rng(99)
    spearman, kendall = [], []
    for _ in range(1000):
        orders = {name: rng.permutation(drops.shape[1]) for name, drops in matrix.tasks.items()}
        first = _naive_sensitivity(matrix, {name: order[: len(order) // 2] for name, order in orders.items()})
        second = _naive_sensitivity(matrix, {name: order[-(len(order) // 2) :] for name, order in orders.items()})
        spearman.append(stats.spearmanr(first, second).statistic)
        kendall.append(stats.kendalltau(first, second).statistic)
    halves = split_half(matrix, n_splits=1000)
    assert halves.n_items == sum(drops.shape[1] // 2 for drops in matrix.tasks.values())
    assert halves.spearman == pytest.approx(np.median(spearman), abs=0.05)
    assert halves.kendall == pytest.approx(np.median(kendall), abs=0.08)
    assert halves.ci_low == pytest.approx(np.quantile(spearman, 0.025), abs=0.12)
    assert halves.ci_high == pytest.approx(np.quantile(spearman, 0.975), abs=0.05)


@pytest.mark.parametrize("noise", [0.5, 2.0, 6.0])
def test_reliability_is_the_correlation_with_a_ranking_by_as_many_other_items(noise):
    rng = np.random.default_rng(7)
    effects, estimated, actual = np.arange(20.0)[:, None], [], []
    for _ in range(60):
        these, others = (effects + noise * rng.standard_normal((20, 12)) for _ in range(2))
        estimated.append(reliability(DropMatrix({"text": these}), n_splits=50))
        actual.append(stats.spearmanr(these.mean(axis=1), others.mean(axis=1)).statistic)
    assert np.mean(estimated) == pytest.approx(np.mean(actual), abs=0.02)


def test_reliability_of_unrelated_halves_is_no_more_than_their_correlation():
    drops = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert reliability(DropMatrix({"text": drops})) == split_half(DropMatrix({"text": drops})).spearman == -1


def test_splits_depend_on_the_seed_alone():
    matrix = _accuracies()
    assert split_half(matrix, seed=1) == split_half(matrix, seed=1) != split_half(matrix, seed=2)
    assert rank_correlation(matrix, matrix, seed=1) == rank_correlation(matrix, matrix, seed=1)


def test_halves_are_disjoint():
    # With one item in each half the correlation shows which: the same item in both would give 1.
    matrix = DropMatrix({"a": np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])})
    halves = split_half(matrix)
    assert (halves.spearman, halves.ci_low, halves.ci_high, halves.kendall, halves.n_items) == (-1, -1, -1, -1, 1)


def test_a_constant_half_counts_as_no_correlation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_half(DropMatrix({"a": np.full((4, 10), 0.1)})).spearman == 0.0
        correlation = rank_correlation(DropMatrix({"a": np.zeros((4, 10))}), _matrix(n_layers=4), method="kendall")
        assert (correlation.value, correlation.ci_low, correlation.ci_high) == (0.0, 0.0, 0.0)


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(RankingError, match=r"tasks.b: a single item"):
        split_half(DropMatrix({"a": np.ones((2, 4)), "b": np.ones((2, 1))}))
    with pytest.raises(RankingError, match="n_layers: 1"):
        split_half(DropMatrix({"a": np.ones((1, 4))}))
    with pytest.raises(RankingError, match="n_splits: 0"):
        items_until_stable(_matrix(), n_splits=0)


def test_items_until_stable_is_the_smallest_subset_that_another_confirms():
    matrix = _matrix(n_items=(400,), noise=2.0)
    n = items_until_stable(matrix, threshold=0.9)
    assert n is not None
    rng = np.random.default_rng(5)

    def median(size):
        orders = [rng.permutation(400) for _ in range(500)]
        subsets = (({"task0": o[:size]}, {"task0": o[-size:]}) for o in orders)
        pairs = ([_naive_sensitivity(matrix, subset) for subset in pair] for pair in subsets)
        return np.median([stats.spearmanr(*pair).statistic for pair in pairs])

    assert median(n) >= 0.88
    assert median(n // 2) < 0.9


def test_items_until_stable_ends_with_half_of_all_items():
    assert items_until_stable(_matrix(noise=0.0)) == 2
    assert items_until_stable(_matrix(n_items=(50,), noise=0.0), threshold=0.0) == 2
    noise = DropMatrix({"a": np.random.default_rng(0).normal(size=(12, 100))})
    assert items_until_stable(noise) is None
    # The last size that is tried is that of the halves.
    single = DropMatrix({"a": np.random.default_rng(1).normal(size=(12, 5))})
    assert items_until_stable(single, threshold=split_half(single).spearman) == 2
    assert items_until_stable(single, threshold=split_half(single).spearman + 1e-9) is None


@pytest.mark.parametrize("method", ["spearman", "kendall"])
@pytest.mark.parametrize("same_items", [True, False])
@pytest.mark.parametrize("make", [_matrix, _accuracies])
def test_rank_correlation_is_scipys_over_naive_resamples(method, same_items, make):
    a, b = make(1), make(2)
    if not same_items:
        b = make(2, n_items=(25,))
    naive = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}[method]
    rng = np.random.default_rng(8)

    def draw(matrix):
        return {name: rng.integers(d.shape[1], size=d.shape[1]) for name, d in matrix.tasks.items()}

    resampled = []
    for _ in range(1000):
        items = draw(a)
        pair = _naive_sensitivity(a, items), _naive_sensitivity(b, items if same_items else draw(b))
        resampled.append(naive(*pair).statistic)
    correlation = rank_correlation(a, b, method=method, same_items=same_items, confidence=0.8)
    assert correlation.value == pytest.approx(naive(a.sensitivity(), b.sensitivity()).statistic)
    low, high = np.quantile(resampled, [0.1, 0.9])
    assert correlation.ci_low == pytest.approx(low, abs=0.08)
    assert correlation.ci_high == pytest.approx(high, abs=0.08)


def test_the_same_draws_for_both_keep_equal_rankings_equal():
    matrix = _matrix(noise=3.0)
    together = rank_correlation(matrix, matrix, same_items=True)
    apart = rank_correlation(matrix, matrix)
    assert (together.value, together.ci_low, together.ci_high) == pytest.approx((1.0, 1.0, 1.0))
    # Each resample adds its own noise, so that the interval excludes the measured correlation of 1.
    assert apart.ci_high < 1.0


def test_rankings_that_do_not_compare_are_refused():
    with pytest.raises(RankingError, match="8 against 9"):
        rank_correlation(_matrix(), _matrix(n_layers=9))
    with pytest.raises(RankingError, match="same_items"):
        rank_correlation(_matrix(), _matrix(n_items=(40, 62)), same_items=True)
    with pytest.raises(RankingError, match="'pearson'"):
        rank_correlation(_matrix(), _matrix(), method="pearson")


def test_indistinct_neighbours_are_those_whose_paired_difference_may_be_zero():
    rng = np.random.default_rng(4)
    shared = 3 * rng.normal(size=60)
    levels = np.array([0.5, 0.0, 0.52, 1.0])
    # Without pairing, the shared noise would hide even the clear steps.
    matrix = DropMatrix({"a": levels[:, None] + shared + 0.2 * rng.normal(size=(4, 60))})
    (pair,) = indistinct_neighbours(matrix)
    assert {pair.lower, pair.upper} == {0, 2}
    drops = matrix.tasks["a"]
    assert pair.difference == paired_difference(drops[pair.upper], drops[pair.lower])
    assert pair.difference.mean >= 0


def test_neighbours_over_tasks_average_the_tasks_differences():
    matrix = _matrix(n_layers=3, noise=20.0)
    pairs = indistinct_neighbours(matrix, confidence=0.99)
    assert [pair.upper for pair in pairs[:-1]] == [pair.lower for pair in pairs[1:]]
    expected = mean_of_differences(
        [paired_difference(d[pairs[0].upper], d[pairs[0].lower], confidence=0.99) for d in matrix.tasks.values()],
        confidence=0.99,
    )
    assert pairs[0].difference == expected
    assert len(indistinct_neighbours(DropMatrix({"a": np.array([[0.0], [9.0]])}))) == 1


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.0, 0.05), (False, False)),
        ((0.05, 0.15), (True, False)),
        ((0.15, 0.2), (False, True)),
        ((0.0, 0.3), (True, True)),
        ((None, None), (True, True)),
        ((0.3, None), (True, True)),
    ],
)
def test_straddles_says_which_thresholds_an_interval_includes(ends, expected):
    assert straddles(*ends, remove_below=0.1, keep_above=0.2) == expected
