"""Tests rankings, correlations, interactions and uncertain tiers on records with known numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerboost.evaluation.scores import MetricScore, Scores, mean_score, quality
from layerboost.evaluation.statistics import paired_difference
from layerboost.plan import Plan
from orchestrator.results.ablations import Ablations
from orchestrator.results.plans import candidate_rows
from orchestrator.results.rankings import (
    correlation_rows,
    interaction_bases,
    interaction_rows,
    ranking_rows,
    tier_rows,
    views,
)
from orchestrator.results.reading import RecordReader
from orchestrator.results.sensitivity import sensitivity_rows
from orchestrator.run.entries import AblationEntry, BaselineEntry, FittedTiming, HealedEntry, SpeedFit, Trial
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.state import RunState

N_LAYERS, N_ITEMS = 4, 40
RNG = np.random.default_rng()
BASE = RNG.normal(2.0, 0.3, N_ITEMS)
DROPS = np.array([0.1, 0.1, 0.5, 0.3])[:, None] + RNG.normal(0, 0.02, (N_LAYERS, N_ITEMS))
"""The NLL that each removed layer adds to each sequence; the first two layers are nearly indistinguishable."""


def _scores(nll: np.ndarray) -> dict[str, Any]:
    metrics = [mean_score("text", "nll", nll.tolist(), False, primary=True)]
    return {"scores": Scores(metrics).to_dict()}


def _ablations(folder: RunFolder, state: RunState) -> Ablations:
    return Ablations(RecordReader(folder), state, interaction_bases(state))


def _interactions(folder: RunFolder, state: RunState) -> list[dict[str, Any]]:
    return list(interaction_rows(RecordReader(folder), state, _ablations(folder, state)))


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, RunState]:
    folder = RunFolder(tmp_path)

    def record(name: str, result: dict[str, Any]) -> str:
        identity = {"of": name}
        folder.write_record("sensitivity", identity, {**result, "duration_s": 1.0})
        return unit_key(identity)

    base = record("base", _scores(BASE))
    cosine = record("cosine", {"cosine": DROPS.tolist()})
    state = RunState("model", N_LAYERS, "nll", {}, base_key=base)
    state.sensitivity = [
        AblationEntry("text", 512, layer, "none", record(f"layer{layer}", _scores(BASE + DROPS[layer])), base)
        for layer in range(N_LAYERS)
    ]
    state.sensitivity.append(AblationEntry("text", 512, None, "none", cosine, None))
    pair = record("pair", _scores(BASE + DROPS[0] + DROPS[2] + 0.25))
    state.trials = [
        Trial(Plan.parse("SSSS"), "base", key=base),
        Trial(Plan.parse("NSNS"), "search", remove_below=0.1, keep_above=0.4, key=pair),
        Trial(Plan.parse("LSNS", 8), "search", key=pair),
    ]
    state.healed = [HealedEntry(Plan.parse("NSNS"), "search", "healed", "judged")]
    return folder, state


def test_a_score_that_is_no_mean_of_items_gives_no_ranking(run):
    folder, state = run
    perplexity = MetricScore("wiki", "word_perplexity", 20.0, None, False, primary=True)

    def with_perplexity(key: str) -> None:
        record = folder.read_record("sensitivity", key)
        scores = Scores.from_dict(record.result["scores"])
        scores.metrics.append(perplexity)
        folder.write_record("sensitivity", record.identity, {**record.result, "scores": scores.to_dict()})

    for key in {*(unit.key for unit in state.sensitivity[:N_LAYERS]), state.base_key, state.trials[1].key}:
        with_perplexity(key)
    assert {view.score for view in views(_ablations(folder, state), state)} == {"nll", "cosine"}
    rows = {row["score"]: row for row in _interactions(folder, state)}
    assert rows["benchmark"]["interaction_stderr"] is None and rows["nll"]["interaction_stderr"] > 0


def test_a_baseline_is_judged_by_what_the_search_judges_by(run):
    folder, state = run
    metrics = [
        mean_score("text", "nll", BASE.tolist(), False, primary=True),
        MetricScore("last", "acc", 0.1, None, True, primary=True),
    ]
    identity = {"of": "baseline"}
    folder.write_record("sensitivity", identity, {"scores": Scores(metrics).to_dict(), "duration_s": 1.0})
    state.trials = [replace(trial, quality=0.5, quality_stderr=0.1, speedup=1.0) for trial in state.trials]
    state.baselines = [BaselineEntry(Plan.parse("NNSS"), "first", 1.2, unit_key(identity))]
    *_, row = candidate_rows(RecordReader(folder), state, lambda plan, concurrency: None)
    assert row["quality"] == pytest.approx(quality(Scores(metrics[:1]))[0])

    # Before the finalists are timed, speeds come from the timings of the search.
    timing = {"of": "timing"}
    folder.write_record("throughput", timing, {"output_throughput_tok_per_s": 100.0})
    state.speed = SpeedFit((FittedTiming(Plan.parse("SSSS"), 8, unit_key(timing)),))
    base, *others = candidate_rows(RecordReader(folder), state, lambda plan, concurrency: (float(concurrency), 0.5))
    assert (base["output_throughput_tok_per_s"], base["predicted_throughput_tok_per_s"]) == (100, 8)
    assert {row["output_throughput_tok_per_s"] for row in others} == {None}


def test_every_score_is_a_ranking_and_the_chosen_one_comes_first(run):
    found = views(_ablations(*run), run[1])
    assert [(view.name, view.is_chosen) for view in found] == [("nll text 512", True), ("cosine text 512", False)]
    np.testing.assert_allclose(found[0].matrix.sensitivity(), DROPS.mean(axis=1), rtol=1e-9)
    rows = list(ranking_rows(found))
    assert [row["n_items"] for row in rows] == [N_ITEMS] * 2
    assert rows[0]["ranking"].split()[2:] == ["3", "2"]
    assert rows[0]["split_half_spearman"] >= 0.8
    assert {frozenset(pair.split("<")) for pair in rows[0]["indistinct_pairs"].split()} <= {frozenset("01")}


def test_rankings_of_one_treatment_are_compared_in_both_ways(run):
    rows = list(correlation_rows(views(_ablations(*run), run[1])))
    assert [(row["view_a"], row["view_b"], row["method"]) for row in rows] == [
        ("nll text 512", "cosine text 512", method) for method in ("spearman", "kendall")
    ]
    assert rows[0]["correlation"] == pytest.approx(1.0), "the cosines are the same numbers"


def test_the_interaction_of_a_plan_is_what_its_layers_cost_together_and_not_alone(run):
    (row,) = _interactions(*run)
    assert (row["plan"], row["score"]) == ("NSNS", "nll"), "the window's cost was not measured, the base has none"
    predicted = DROPS[0].mean() + DROPS[2].mean()
    assert row["predicted_drop"] == pytest.approx(predicted)
    assert row["measured_drop"] == pytest.approx(predicted + 0.25)
    assert row["interaction_stderr"] == pytest.approx(0.0, abs=1e-9), "the pair adds the same to each item"


def test_layers_whose_interval_holds_a_threshold_are_named(run):
    folder, state = run
    rows = list(tier_rows(sensitivity_rows(folder, state), state))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row, drops in zip(rows, DROPS, strict=True):
        interval = paired_difference(drops.tolist(), [0.0] * N_ITEMS)
        assert (row["drop_ci_low"], row["drop_ci_high"]) == pytest.approx((interval.ci_low, interval.ci_high))
        holds = [
            name
            for name, threshold in (("remove_below", 0.1), ("keep_above", 0.4))
            if interval.ci_low <= threshold <= interval.ci_high
        ]
        assert row["straddles"].split() == holds
    assert Plan.parse(rows[0]["plan"]).count("none") == 2


def test_an_adaptive_sweep_gives_drops_and_no_rankings(run):
    folder, state = run
    state.adaptive = {"spent": 0.4, "tiers": [], "error": 0.05}
    assert views(_ablations(folder, state), state) == []
    assert len([row for row in sensitivity_rows(folder, state) if row["task"] == "mean"]) == N_LAYERS
