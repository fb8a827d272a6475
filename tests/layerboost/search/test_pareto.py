"""Compares the front with a naive reference on fresh random points, and the dominated area with counted cells."""

import itertools
import math
import random

import pytest

from layerboost.search.pareto import choose_spread, front, hypervolume

NAN = math.nan


def naive_front(points):
    def dominates(a, b):
        return a[0] >= b[0] and a[1] >= b[1] and (a[0] > b[0] or a[1] > b[1])

    usable = [not (math.isnan(x) or math.isnan(y)) for x, y in points]
    return [
        usable[i] and not any(usable[j] and dominates(points[j], points[i]) for j in range(len(points)))
        for i in range(len(points))
    ]


@pytest.fixture
def fresh():
    """Returns a generator with a new seed in each run; pytest prints the seed if the test fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_front_equals_naive_on_random_points_with_ties_duplicates_and_nan(fresh):
    for _ in range(300):
        levels = fresh.choice([2, 4, 10, 1000])
        values = [float(v) for v in range(levels)] + [NAN] * fresh.randrange(3) + [math.inf, -math.inf][: levels % 3]
        points = [(fresh.choice(values), fresh.choice(values)) for _ in range(fresh.randrange(40))]
        assert front(points) == naive_front(points), points


def test_front_does_not_depend_on_order(fresh):
    points = [(fresh.randrange(6) / 3, fresh.randrange(6) / 3) for _ in range(25)]
    order = list(range(len(points)))
    fresh.shuffle(order)
    straight, shuffled = front(points), front([points[i] for i in order])
    assert [straight[i] for i in order] == shuffled


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1.0, 1.0)], [True]),
        ([(NAN, 1.0)], [False]),
        ([(NAN, 9.0), (9.0, NAN), (1.0, 1.0)], [False, False, True]),
        ([(1.0, 2.0), (1.0, 2.0)], [True, True]),
        ([(1.0, 2.0), (1.0, 3.0)], [False, True]),
        ([(2.0, 2.0), (1.0, 2.0)], [True, False]),
        ([(0.0, 1.0), (-0.0, 1.0)], [True, True]),
        ([(-0.0, 1.0), (0.0, 2.0)], [False, True]),
        ([(1.0, math.inf), (math.inf, 1.0), (0.0, 0.0)], [True, True, False]),
        ([(0.1 + 0.2, 1.0), (0.3, 1.0)], [True, False]),
    ],
)
def test_front_edge_cases(points, expected):
    assert front(points) == expected


def test_hypervolume_equals_counted_cells(fresh):
    for _ in range(100):
        reference = (fresh.randrange(-2, 3), fresh.randrange(-2, 3))
        points = [(fresh.randrange(-3, 9), fresh.randrange(-3, 9)) for _ in range(fresh.randrange(8))]
        cells = sum(
            any(x + 1 <= px and y + 1 <= py for px, py in points)
            for x in range(reference[0], 9)
            for y in range(reference[1], 9)
        )
        assert hypervolume(points, reference) == cells, (points, reference)


def test_hypervolume_ignores_nan_and_dominated_points():
    assert hypervolume([(2.0, 3.0)], (0.0, 1.0)) == 4.0
    assert hypervolume([(2.0, 3.0), (1.0, 2.0), (NAN, 99.0), (2.0, 3.0)], (0.0, 1.0)) == 4.0
    assert hypervolume([(0.0, 99.0)], (0.0, 1.0)) == 0.0


def test_hypervolume_refuses_a_nan_reference():
    with pytest.raises(ValueError, match="reference"):
        hypervolume([(1.0, 1.0)], (NAN, 0.0))


def test_the_spread_takes_the_largest_boxes_first_and_goes_on_behind_the_front():
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (1.0, 1.0), (float("nan"), 9.0)]
    assert choose_spread(points, 1, (0.0, 0.0)) == [1]
    assert set(choose_spread(points, 3, (0.0, 0.0))) == {0, 1, 2}
    assert choose_spread(points, 9, (0.0, 0.0))[-1] == 3
    assert choose_spread(points, 0, (0.0, 0.0)) == []


def test_the_greedy_spread_is_near_the_best_choice():
    rng = random.Random()
    for _ in range(20):
        points = [(rng.random(), rng.random()) for _ in range(9)]
        chosen = hypervolume([points[i] for i in choose_spread(points, 3, (0.0, 0.0))], (0.0, 0.0))
        best = max(hypervolume(list(trio), (0.0, 0.0)) for trio in itertools.combinations(points, 3))
        assert chosen >= (1 - 1 / math.e) * best - 1e-12
