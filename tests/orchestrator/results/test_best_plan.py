"""Tests the choice of the best plan under constraints, and the advice on which of them to loosen."""

import math
from itertools import product

import numpy as np
import pytest
import yaml

from layerboost.plan import Plan
from orchestrator.recipe.constraints import ConstraintsSection
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import recipe_from_dict
from orchestrator.report.tables import CONDITION_COLUMNS, pareto_table
from orchestrator.results.best_plan import best_row, best_rows, feasible, loosenings, verdict


def row(plan, origin="search", *, quality=0.5, tok_per_s=100.0, concurrency=8, **more):
    parsed = Plan.parse(plan, 16)
    return {
        "plan_id": parsed.plan_id,
        "plan": plan,
        "window": parsed.window,
        "origin": origin,
        "healed": False,
        "engine": "transformers",
        "hardware": "Invented GPU",
        "concurrency": concurrency,
        "prompt_tokens": 64,
        "new_tokens": 8,
        "output_throughput_tok_per_s": tok_per_s,
        "quality": quality,
        "quality_retained": quality / 0.5,
        "kv_bytes_per_token": 100.0 * plan.count("S"),
        "status": "ok",
    } | more


def table(rows, constraints):
    pareto = pareto_table(rows)
    return pareto.assign(feasible=feasible(pareto, constraints))


ROWS = [
    row("SSSS", "base"),
    row("SSSN", quality=0.498, tok_per_s=120.0),
    row("SSNN", quality=0.49, tok_per_s=150.0),
    row("SNNN", quality=0.3, tok_per_s=200.0),
    row("NNNN", quality=0.2, tok_per_s=math.nan, status="failed", error="no room"),
]


@pytest.mark.parametrize(
    ("constraints", "plan"),
    [
        ({"at_least": {"quality_retained": 0.99}}, "SSSN"),
        ({"at_least": {"quality_retained": 0.97}}, "SSNN"),
        ({"at_least": {"quality": 0.5}}, "SSSS"),
        ({"at_least": {"speedup": 1.3}}, "SSNN"),
        ({"at_most": {"kv_bytes_per_token": 100}}, "SNNN"),
        ({"at_most": {"n_softmax": 2}}, "SSNN"),
        ({"at_least": {"quality_retained": 0.5}, "pin": {1: "softmax"}}, "SSNN"),
        ({"pin": {0: "none"}}, None),
        ({"at_least": {"quality_retained": 0.99, "speedup": 1.3}}, None),
    ],
)
def test_best_row(constraints, plan):
    constraints = ConstraintsSection.model_validate(constraints)
    best = best_row(table(ROWS, constraints), constraints)
    assert plan == (None if best is None else best["plan"])


def test_feasible_is_empty_without_constraints_and_for_failed_rows():
    assert table(ROWS, ConstraintsSection())["feasible"].isna().all()
    constraints = ConstraintsSection(at_least={"quality": 0.4})
    assert table(ROWS, constraints).set_index("plan")["feasible"].to_dict() | {"NNNN": None} == {
        "SSSS": True,
        "SSSN": True,
        "SSNN": True,
        "SNNN": False,
        "NNNN": None,
    }


def test_names_the_constraint_whose_loosening_costs_least():
    constraints = ConstraintsSection(at_least={"quality_retained": 0.99, "speedup": 1.4})
    rows = table(ROWS, constraints)
    assert [(bound.name, found["plan"]) for bound, found in loosenings(rows, constraints)] == [
        ("at_least.quality_retained", "SSNN"),
        ("at_least.speedup", "SSSN"),
    ]
    (said,) = verdict(rows, constraints)
    assert said.startswith("No plan holds at_least.quality_retained: 0.99, at_least.speedup: 1.4 (concurrency 8")
    assert "Loosen at_least.quality_retained to 0.98: SSNN" in said


def test_says_so_where_no_single_constraint_is_to_blame():
    constraints = ConstraintsSection(at_least={"quality_retained": 1.5, "speedup": 9}, at_most={"n_softmax": 4})
    (said,) = verdict(table(ROWS, constraints), constraints)
    assert "No single one stands in the way" in said
    assert "at_least.quality_retained to" in said and "at_least.speedup to" in said and "n_softmax to" not in said


def test_says_the_best_plan_of_each_condition_and_its_flags():
    constraints = ConstraintsSection(at_least={"quality_retained": 0.97})
    rows = [r | {"concurrency": c, "flags": "retrieval@64 -0.4"} for r in ROWS for c in (1, 8)]
    said = verdict(table(rows, constraints), constraints)
    assert len(said) == 2 and "concurrency 8" in said[0] and "concurrency 1," in said[1]
    assert all("SSNN" in sentence and "flagged (retrieval@64 -0.4)" in sentence for sentence in said)
    assert verdict(table(rows, ConstraintsSection()), ConstraintsSection()) == []


def test_the_control_is_never_the_plan_to_serve():
    constraints = ConstraintsSection(at_least={"quality_retained": 0.999})
    rows = [*ROWS, row("SSSS", "parent", quality=0.6, tok_per_s=110.0, healed=True)]
    found = table(rows, constraints)
    assert best_rows(found, constraints) == best_rows(table(ROWS, constraints), constraints) != []
    assert "the untouched base" in verdict(found, constraints)[0]
    assert found.set_index("origin")["on_front"]["base"], "it dominates nothing"
    assert not found.set_index("origin")["on_front"]["parent"]


UNSURE = [
    row("SSSS", "base", quality_retained_stderr=0.0),
    row("SSSN", quality=0.49, tok_per_s=120.0, quality_retained_stderr=0.002),
    row("SSNN", quality=0.4851, tok_per_s=150.0, quality_retained_stderr=0.014),
]


@pytest.mark.parametrize(("confidence", "plan"), [(0.5, "SSNN"), (0.51, "SSSN"), (0.95, "SSSN"), (0.9999999, "SSSS")])
def test_with_more_confidence_a_value_must_hold_its_bound_beyond_its_error(confidence, plan):
    constraints = ConstraintsSection(at_least={"quality_retained": 0.97}, confidence=confidence)
    rows = table(UNSURE, constraints)
    best = best_row(rows, constraints)
    assert best is not None and best["plan"] == plan
    (said,) = verdict(rows, constraints)
    assert (f"with {confidence:.3g} confidence" in said) == (confidence > 0.5)


def test_says_how_probable_it_is_that_a_bound_holds():
    rng = np.random.default_rng()
    value, stderr = rng.uniform(0.9, 1.0), rng.uniform(0.001, 0.05)
    least = float(value - stderr * rng.uniform(0.1, 1.5))
    only = row("SSNN", quality=value / 2, quality_retained_stderr=stderr)
    constraints = ConstraintsSection(at_least={"quality_retained": least})
    rows, (bound,) = table([only], constraints), constraints.bounds()
    held = float(np.mean(value + stderr * rng.standard_normal(200_000) >= least))
    probability = bound.probability(rows.iloc[0])
    assert probability == pytest.approx(held, abs=0.01)
    (said,) = verdict(rows, constraints)
    assert said.endswith(f" It holds at_least.quality_retained with a probability of {100 * probability:.0f} %.")
    surer = ConstraintsSection(at_least={"quality_retained": least}, confidence=0.999)
    (said,), (bound,) = verdict(table([only], surer), surer), surer.bounds()
    assert f"Loosen at_least.quality_retained to {bound.reached(rows.iloc[0]):.4g}: SSNN" in said


@pytest.mark.parametrize(
    ("quality", "words"),
    [(0.6, "more than 99 %"), (0.4, "less than 1 %"), (0.485, "50 %")],
    ids=["high", "low", "half"],
)
def test_probabilities_are_not_rounded_to_certainty(quality, words):
    constraints = ConstraintsSection(at_least={"quality_retained": 0.97})
    rows = table([row("SSNN", quality=quality, quality_retained_stderr=0.01)], constraints).assign(feasible=True)
    assert verdict(rows, constraints)[0].endswith(f"with a probability of {words}.")


def test_a_bound_on_what_has_no_error_is_held_or_not():
    (bound,) = ConstraintsSection(at_most={"kv_bytes_per_token": 200}, confidence=0.99).bounds()
    held, broken = (table([row(plan)], ConstraintsSection()).iloc[0] for plan in ("SSNN", "SSSN"))
    assert bound.holds(held) and not bound.holds(broken)
    assert bound.probability(held) is None and bound.reached(broken) == 300


def test_best_row_agrees_with_brute_force():
    rng = np.random.default_rng()
    letters = ["".join(letters) for letters in product("SLN", repeat=3)]
    for _ in range(30):
        plans = rng.choice(letters, 12, replace=False)
        rows = [row("SSS", "base")]
        rows += [row(p, quality=rng.uniform(0.2, 0.6), tok_per_s=rng.uniform(80, 300)) for p in plans if p != "SSS"]
        least, most = rng.uniform(0.5, 1.1), int(rng.integers(0, 4))
        constraints = ConstraintsSection(at_least={"quality_retained": least}, at_most={"n_softmax": most})
        allowed = [r for r in rows if r["quality_retained"] >= least and r["plan"].count("S") <= most]
        best = best_row(table(rows, constraints), constraints)
        wanted = max(allowed, key=lambda r: r["output_throughput_tok_per_s"], default=None)
        assert (None if wanted is None else wanted["plan"]) == (None if best is None else best["plan"])


def test_the_front_of_pareto_csv_is_that_of_a_brute_force_check():
    rng = np.random.default_rng()
    for _ in range(40):
        n = int(rng.integers(1, 9))
        rows = [
            row(
                "".join(rng.choice(list("SLN"), 4)),
                quality=float(rng.choice([0.1, 0.2, 0.3, rng.uniform(0, 1), math.nan])),
                tok_per_s=float(rng.choice([100.0, 110.0, rng.uniform(80, 300), math.nan])),
                concurrency=int(rng.choice([1, 8])),
                status=str(rng.choice(["ok", "ok", "ok", "failed"])),
            )
            for _ in range(n)
        ]
        pareto = pareto_table(rows)
        for _, point in pareto.iterrows():
            usable = pareto[pareto["status"].eq("ok") & pareto["concurrency"].eq(point["concurrency"])]
            usable = usable.dropna(subset=["quality", "output_throughput_tok_per_s"])
            dominated = any(
                other["quality"] >= point["quality"]
                and other["output_throughput_tok_per_s"] >= point["output_throughput_tok_per_s"]
                and (
                    other["quality"] > point["quality"]
                    or other["output_throughput_tok_per_s"] > point["output_throughput_tok_per_s"]
                )
                for _, other in usable.iterrows()
            )
            assert bool(point["on_front"]) == (point.name in usable.index and not dominated)
        assert set(CONDITION_COLUMNS) <= set(pareto.columns)


RECIPE = {"model": {"path": "some/model"}, "quality": {"text": "some/text"}}


def test_a_recipe_keeps_its_constraints_when_written_and_read():
    wanted = {"at_least": {"quality_retained": 0.99}, "at_most": {"n_softmax": 4}, "pin": {0: "softmax", 11: "none"}}
    recipe = recipe_from_dict({**RECIPE, "constraints": wanted})
    again = recipe_from_dict(yaml.safe_load(recipe.resolved_yaml()))
    assert again == recipe and again.constraints.pin == {0: "softmax", 11: "none"}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"at_least": {"qualty": 1}}, "constraints.at_least.qualty"),
        ({"at_most": {"n_softmax": -1}}, "constraints.at_most.n_softmax: -1"),
        ({"pin": {0: "sofmax"}}, "softmax"),
        ({"pin": {"x": "softmax"}}, "constraints.pin"),
        ({"confidence": 0.3}, "constraints.confidence: 0.3"),
        ({"confidence": 1}, "constraints.confidence: 1"),
    ],
)
def test_refuses_what_it_does_not_know(constraints, message):
    with pytest.raises(InputError, match=message):
        recipe_from_dict({**RECIPE, "constraints": constraints})
