"""Tests that tables of many plans equal the naive forms, which read and bootstrap everything for each plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerboost.evaluation.scores import MetricScore, QualityError, Scores, mean_score
from layerboost.evaluation.statistics import mean_of_differences, paired_difference
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import drops, item_drops, single_layer_plan
from orchestrator.results.ablations import Ablations, measured_scores
from orchestrator.results.cost import cost_table
from orchestrator.results.plans import search_base_key
from orchestrator.results.rankings import interaction_bases, interaction_rows
from orchestrator.results.reading import RecordReader
from orchestrator.results.sensitivity import cost_matrix, sensitivity_rows
from orchestrator.run.entries import AblationEntry, Finalist, FinalistEntry, Trial, UnitKeys
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.kinds import PARTS_OF_STAGES, SCORES, kind_made_by
from orchestrator.run.records import find_record, scores_of
from orchestrator.run.state import RunState

N_LAYERS, WINDOW = 5, 8
TASKS, FINAL_TASK = {"recall": 12, "holder": 11}, {"naming": 13}
N_SEQUENCES, N_TRIALS = 10, 25
ABLATED = (Treatment.NONE, Treatment.LINEAR_WINDOW)


class Drawn:
    """Draws a run with fresh random scores.

    Each record lies in a folder of its stage, as earlier versions filed it. The run lists it as a unit of the stage.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.rng = folder, np.random.default_rng()
        self.state = RunState("model", N_LAYERS, "nll", {})

    def scores(self, tasks: dict[str, int], *, text: bool) -> dict[str, Any]:
        found: list[MetricScore] = []
        for task, n_items in tasks.items():
            margins = self.rng.normal(0.5, 1.0, n_items)
            found.append(mean_score(task, "acc", (margins > 0).astype(float).tolist(), True, primary=True))
            found.append(mean_score(task, "margin", margins.tolist(), True))
        if tasks:  # this score is no mean of items, the others are
            found.append(
                MetricScore("wiki", "word_perplexity", float(self.rng.uniform(9, 20)), 0.3, False, primary=True)
            )
        if text:
            nll, kl = self.rng.normal(2.0, 0.3, N_SEQUENCES), self.rng.uniform(0, 0.1, N_SEQUENCES)
            found.append(mean_score("text", "nll", nll.tolist(), False, primary=not tasks))
            found.append(mean_score("text", "kl", kl.tolist(), False))
        return {"scores": Scores(found).to_dict()}

    def record(self, stage: str, result: dict[str, Any], **identity: Any) -> str:
        spent = {"duration_s": float(self.rng.uniform(0, 9)), "tokens": int(self.rng.integers(1, 99))}
        self.folder.write_record(stage, identity, {**result, **spent})
        key = unit_key(identity)
        listed = UnitKeys(kind_made_by(stage).folder, (key,))
        self.state.units.setdefault("sensitivity" if stage == "sweep" else stage, []).append(listed)
        return key

    def plan(self, letters: str = "SNLW") -> Plan:
        return Plan.parse("".join(self.rng.choice(list(letters), N_LAYERS)), WINDOW)


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, RunState]:
    drawn = Drawn(RunFolder(tmp_path))
    state, softmax = drawn.state, Plan.uniform(Treatment.SOFTMAX, N_LAYERS)
    everything = TASKS | FINAL_TASK
    state.base_key = drawn.record("evaluate", drawn.scores(everything, text=True), of="base")
    for source, tokens, tasks in (("text", 64, {}), ("tasks", None, TASKS), ("text", 32, {})):
        base = drawn.record("sensitivity", drawn.scores(tasks, text=not tasks), of="base", source=source, tokens=tokens)
        for treatment in ABLATED:
            for layer in range(N_LAYERS):
                plan = single_layer_plan(N_LAYERS, layer, treatment, WINDOW).to_dict()
                scores = drawn.scores(tasks, text=not tasks)
                key = drawn.record("sensitivity", scores, **plan, source=source, tokens=tokens)
                state.sensitivity.append(AblationEntry(source, tokens, layer, treatment.value, key, base))
        if source == "text":
            cosine = drawn.record(
                "sensitivity", {"cosine": drawn.rng.uniform(size=(N_LAYERS, 9)).tolist()}, tokens=tokens
            )
            state.sensitivity.append(AblationEntry(source, tokens, None, "none", cosine, None))
    state.sensitivity[3] = replace(state.sensitivity[3], key=unit_key({"of": "a unit that failed"}))
    plans = [softmax, Plan.parse("N" * N_LAYERS), *(drawn.plan("SNL") for _ in range(N_TRIALS)), drawn.plan("W")]
    for n, plan in enumerate([*plans, plans[2]]):
        stage = ("search", "refine", "sensitivity")[n % 3]
        key = drawn.record(stage, drawn.scores(TASKS, text=True), plan=plan.to_dict(), of="trial")
        state.trials.append(Trial(plan, "search" if n else "base", key=key))
    state.trials.append(Trial(drawn.plan("NL"), "search", key=unit_key({"of": "no record"})))
    healed = drawn.record("heal", {}, of="healing")
    for plan, healed_key in ((softmax, None), (plans[1], None), (plans[3], None), (plans[4], healed)):
        key = drawn.record("measure", drawn.scores(everything, text=True), plan=plan.to_dict(), healed=healed_key)
        state.finalists.append(FinalistEntry(Finalist(plan, "search", healed_key), key))
    for share in range(30):
        drawn.record("sweep", {"log_p": drawn.rng.normal(size=(3, 50)).tolist()}, share=share)
    for name in (*SCORES.earlier, SCORES.folder, "sweep", "heal", "halving", "sample", "throughput"):
        drawn.folder.write_record(name, {"of": "another run"}, {"duration_s": 1e6, "tokens": 10**6})
    return drawn.folder, state


def test_interactions_are_those_of_reading_and_bootstrapping_each_layer_for_each_plan(run):
    folder, state = run
    records = RecordReader(folder)
    found = list(interaction_rows(records, state, Ablations(records, state, interaction_bases(state))))
    assert found == list(naive_interactions(folder, state))
    assert {row["score"] for row in found} == {"benchmark", "margin", "nll", "kl"}
    assert len({row["plan_id"] for row in found}) > N_TRIALS // 2
    stderrs = [row["interaction_stderr"] for row in found if row["score"] != "benchmark"]
    assert min(stderrs) > 0


def test_drops_of_layers_are_those_of_reading_each_of_them_for_each_table(run):
    folder, state = run
    wanted = list(naive_sensitivity(folder, state))
    assert Ablations(RecordReader(folder), state).rows == wanted
    assert sensitivity_rows(folder, state) == wanted
    without = [row | {"drop_ci_low": None, "drop_ci_high": None} for row in wanted]
    assert sensitivity_rows(folder, state, intervals=False) == without
    costs = {t.value: [float("inf")] * N_LAYERS for t in ABLATED}
    for row in wanted:
        if row["task"] == "mean":
            costs[row["treatment"]][row["layer"]] = row["drop"]
    assert cost_matrix(folder, state) == costs


@pytest.mark.parametrize("read_before", [False, True])
def test_costs_are_those_of_holding_all_records(run, read_before):
    folder, state = run
    records = RecordReader(folder)
    if read_before:
        list(interaction_rows(records, state, Ablations(records, state, interaction_bases(state))))
    found = cost_table(records, state).to_dict("records")
    wanted = naive_costs(folder, state)
    assert {row["stage"]: row["units"] for row in found} == {stage: units for stage, (units, _) in wanted.items()}
    assert {row["stage"]: row["worker seconds"] for row in found} == pytest.approx(
        {stage: seconds for stage, (_, seconds) in wanted.items()}, abs=0.051
    )


def test_a_report_reads_no_scores_twice(run, monkeypatch):
    folder, state = run
    read: list[str] = []
    read_bytes = RunFolder.read_bytes
    monkeypatch.setattr(
        RunFolder, "read_bytes", lambda self, name: (_noted(read, self, name), read_bytes(self, name))[1]
    )
    records = RecordReader(folder)
    list(interaction_rows(records, state, Ablations(records, state, interaction_bases(state))))
    cost_table(records, state)
    assert len(read) == len(set(read))
    assert len([name for name in read if "/sweep/" in name]) == 30


def _noted(read: list[str], folder: RunFolder, name: str) -> None:
    if folder.exists(name):  # a record is looked for in one stage after the other
        read.append(name)


# These are the naive forms: every table reads what it needs, and every plan computes its layers again.


def naive_interactions(folder: RunFolder, state: RunState) -> Iterator[dict[str, Any]]:
    seen: set[tuple[Plan, str]] = set()
    trials, finalists = ([entry.to_dict() for entry in entries] for entries in (state.trials, state.finalists))
    for base_key, tried in ((search_base_key(state), trials), (state.base_key, finalists)):
        base = scores_of(folder, base_key)
        assert base is not None
        layers = naive_single_layers(folder, state, base)
        for entry in tried:
            plan = Plan.from_dict(entry)
            treated = {t for t in plan.treatments if t is not Treatment.SOFTMAX}
            scores = scores_of(folder, entry.get("key") or entry.get("quality_key"))
            if scores is None or entry.get("healed_key") or not treated:
                continue
            for score in measured_scores(scores):
                singles = [layers.get((t, layer, score)) for layer, t in enumerate(plan.treatments) if t in treated]
                if (plan, score) in seen or None in singles:
                    continue
                seen.add((plan, score))
                about = {"plan_id": plan.plan_id, **plan.to_dict(), "origin": entry["origin"], "score": score}
                yield {**about, **naive_interaction(base, scores, [s for s in singles if s is not None], score)}


def naive_single_layers(folder: RunFolder, state: RunState, base: Scores) -> dict[tuple[Treatment, int, str], Scores]:
    of_base = {(score.task, score.metric): score.n_items for score in base.metrics}
    found: dict[tuple[Treatment, int, str], Scores] = {}
    for unit in state.sensitivity:
        record = find_record(folder, unit.key)
        if record is None or "scores" not in record:
            continue
        scores = Scores.from_dict(record["scores"])
        if all(of_base.get((s.task, s.metric)) == s.n_items for s in scores.metrics if s.metric != "kl"):
            for score in measured_scores(scores):
                found.setdefault((Treatment(unit.treatment), unit.layer, score), scores)
    return found


def naive_interaction(base: Scores, plan: Scores, singles: list[Scores], score: str) -> dict[str, Any]:
    measured = drops(base, plan, score)[-1]
    row = {
        "predicted_drop": float(sum(drops(base, single, score)[-1].drop for single in singles)),
        "measured_drop": measured.drop,
        "measured_drop_stderr": measured.drop_stderr,
    }
    try:
        by_task = item_drops(base, plan, score)
        of_singles = [item_drops(base, single, score) for single in singles]
    except QualityError:
        return {**row, "interaction_stderr": None}
    differences = [
        paired_difference(items.tolist(), np.sum([single[task] for single in of_singles], axis=0).tolist())
        for task, items in by_task.items()
    ]
    return {**row, "interaction_stderr": mean_of_differences(differences).stderr}


def naive_sensitivity(folder: RunFolder, state: RunState) -> Iterator[dict[str, Any]]:
    chosen = state.sensitivity[0].source, state.sensitivity[0].context_tokens
    for unit in state.sensitivity:
        record = find_record(folder, unit.key)
        if record is None:
            continue
        is_chosen = (unit.source, unit.context_tokens) == chosen
        if "cosine" in record:
            for layer, distances in enumerate(record["cosine"]):
                interval = paired_difference([0.0] * len(distances), [-distance for distance in distances])
                yield {
                    "layer": layer,
                    "treatment": unit.treatment,
                    "task": "text",
                    "metric": "cosine_distance",
                    "n_items": len(distances),
                    "base": 0.0,
                    "ablated": interval.mean,
                    "drop": interval.mean,
                    "drop_stderr": interval.stderr,
                    "drop_ci_low": interval.ci_low,
                    "drop_ci_high": interval.ci_high,
                }
            continue
        base, variant = scores_of(folder, unit.base_key), Scores.from_dict(record["scores"])
        assert base is not None
        for score in measured_scores(variant):
            for row in drops(base, variant, score):
                if row.task == "mean" and not (is_chosen and score == state.score):
                    continue
                values = row.to_dict()
                if row.task != "mean" and not is_chosen and unit.source != "tasks":
                    values["task"] = f"{unit.source} {unit.context_tokens}"
                yield {"layer": unit.layer, "treatment": unit.treatment, **values}


def naive_costs(folder: RunFolder, state: RunState) -> dict[str, tuple[int, float]]:
    """Returns the number of units and the seconds of each stage that has any."""
    # A plan that two stages have judged is read where it was first, and counts for that stage alone.
    names = ("heal", "sweep", *reversed(SCORES.earlier))
    took = {record.key: record.result["duration_s"] for name in names for record in folder.records(name)}
    found: dict[str, list[float]] = {}
    for stage in PARTS_OF_STAGES:
        keys = dict.fromkeys(key for unit in state.units.get(stage, ()) for key in unit.keys)
        found[stage] = [took.pop(key) for key in keys if key in took]
    return {stage: (len(seconds), sum(seconds)) for stage, seconds in found.items() if seconds}
