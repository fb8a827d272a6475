"""From records to tables: what `run.json` lists, read back as the rows that users see. Computes no model."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from layerboost.evaluation import QualityError, Scores, quality, retained
from layerboost.pareto import front
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity import MEAN_TASK, SCORES, cosine_drops, drops
from layerboost.verdict import flag_text, flags
from orchestrator.identity import TASKS_SOURCE, TEXT_SOURCE
from orchestrator.recipe import InputError
from orchestrator.run_folder import RunFolder

RUN_FILE, RECIPE_FILE = "run.json", "recipe.yaml"
SCORE_STAGES = ("evaluate", "sensitivity", "search", "refine", "curve", "measure")
"""Stages whose records are scores: one that is there serves whichever stage asks."""

REFINED = "refined"
"""Origin of plans that refinement found."""

CANDIDATE_ORIGINS = ("search", "given", REFINED)
"""Origins of the plans that candidates for healing are chosen from; every other healed plan is a baseline."""

SWEEP = "sweep"
"""Stage of the records that hold what plans say to shares of the items, from which their scores are made."""


@dataclass(frozen=True)
class Finalist:
    """One model of pareto.csv: a plan on the parent's weights, or healed (then with the key of its healing)."""

    plan: Plan
    origin: str
    healed_key: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.plan.to_dict(), "origin": self.origin, "healed_key": self.healed_key}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finalist:
        return cls(Plan.from_dict(data), data["origin"], data["healed_key"])


@dataclass
class RunState:
    """What belongs to a run, by the keys of its records; the content of `run.json`.

    Attributes:
        sensitivity: `source`, `context_tokens`, `layer`, `treatment`, `key` and `base_key` of each ablation; the rows
            of the source that the chosen score needs come first.
        adaptive: `spent`, `tiers`, `error` where items were spent adaptively.
        trials: points of the search with their plan, thresholds, origin, status, quality, both objectives of the
            search (`objective`, and `speedup`, which is predicted), and the `key` of their scores.
        baselines: `plan`, `window`, `origin`, predicted `speedup` of each baseline, and the `key` of its scores.
        healed: `plan`, `window`, `origin`, `key` of each healed plan, the `quality_key` of its checkpoint, and its
            `curve`: `share`, `tokens` and `key` of each point before that.
        finalists: `Finalist.to_dict()` and `quality_key` of each.
        branches: `Finalist.to_dict()` and `key` of each healed plan whose branches were checked.
        throughput: `Finalist.to_dict()`, `concurrency`, `prompt_tokens`, `new_tokens` and `key` of each timing.
        speed: what the speed of all plans is predicted from; see `orchestrator.stages.speed`.
        lengths: the same of each timing over lengths.
        halving: `plan`, `window`, `origin`, `rung`, `share`, `tokens`, predicted `speedup`, `survived`, `key` (of the
            healing) and `quality_key` of each plan in each rung.
        estimates: what each stage was expected to cost before the run; see `orchestrator.estimate`.
        stage_s: seconds that each stage took, all calls of the command together.
        failures: `stage`, `name`, `error` of each unit that failed for good.
    """

    model: str
    n_layers: int
    score: str
    environment: dict[str, Any]
    base_key: str | None = None
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    adaptive: dict[str, Any] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    healed: list[dict[str, Any]] = field(default_factory=list)
    finalists: list[dict[str, Any]] = field(default_factory=list)
    branches: list[dict[str, Any]] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] | None = None
    lengths: list[dict[str, Any]] = field(default_factory=list)
    halving: list[dict[str, Any]] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list)
    stage_s: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_state(folder: RunFolder) -> RunState:
    """Reads which records belong to the run in a folder.

    Raises:
        InputError: the folder holds no run.
    """
    try:
        return RunState(**json.loads(folder.read_bytes(RUN_FILE)))
    except FileNotFoundError:
        raise InputError("DIR", folder, f"has no {RUN_FILE}; give the --out of an earlier run") from None


def cost_matrix(folder: RunFolder, state: RunState) -> dict[Treatment, list[float]]:
    """The drop of each layer by each treatment that was measured, first layer first; infinite where none is there."""
    rows = [row for row in sensitivity_rows(folder, state) if row["task"] == MEAN_TASK]
    costs = {Treatment(row["treatment"]): [math.inf] * state.n_layers for row in rows}
    for row in rows:
        costs[Treatment(row["treatment"])][row["layer"]] = row["drop"]
    return costs


def sensitivity_rows(folder: RunFolder, state: RunState) -> list[dict[str, Any]]:
    """Rows of sensitivity.csv: the recorded ablations against the base over the same items, by every score measured.

    Only the chosen score has rows with the task `mean`. Further texts and lengths are tasks of their own.
    """
    if not state.sensitivity:
        return []
    chosen = state.sensitivity[0]["source"], state.sensitivity[0]["context_tokens"]
    rows = []
    for unit in state.sensitivity:
        record = find_record(folder, unit["key"])
        base = scores_of(folder, unit["base_key"])
        if record is None:
            continue
        is_chosen = (unit["source"], unit["context_tokens"]) == chosen
        if "cosine" in record:
            found = [
                (layer, row)
                for layer, distances in enumerate(record["cosine"])
                for row in cosine_drops(distances)
                if row.task != MEAN_TASK or state.score == "cosine"
            ]
        elif base is not None:
            variant = Scores.from_dict(record["scores"])
            found = [
                (unit["layer"], row)
                for score in measured_scores(variant)
                for row in drops(base, variant, score)
                if row.task != MEAN_TASK or (is_chosen and score == state.score)
            ]
        else:
            continue
        for layer, row in found:
            values = row.to_dict()
            if row.task != MEAN_TASK and not is_chosen and unit["source"] != TASKS_SOURCE and "cosine" not in record:
                values["task"] = source_label(unit)
            rows.append({"layer": layer, "treatment": unit["treatment"], **values})
    return rows


def source_label(unit: dict[str, Any]) -> str:
    """What a source of items is called: the text's name and the tokens of its sequences."""
    tokens = unit["context_tokens"]
    return unit["source"] if tokens is None else f"{unit['source']} {tokens}"


def measured_scores(scores: Scores) -> list[str]:
    """The scores that were measured of a variant."""
    metrics = {score.metric for score in scores.metrics}
    has_tasks = any(score.primary and score.task != TEXT_SOURCE for score in scores.metrics)
    return [
        score for score in SCORES if (score == "benchmark" and has_tasks) or (score != "cosine" and score in metrics)
    ]


Predictor = Callable[[Plan, int], tuple[float, float] | None]
"""Output throughput (tok/s) of a plan at a concurrency, and its standard error; None where nothing predicts it."""


def search_base_key(state: RunState) -> str | None:
    """Key of the base's scores by what the search judges by; None where it has none."""
    return next((trial.get("key") for trial in state.trials if trial["origin"] == "base"), None)


def candidate_rows(folder: RunFolder, state: RunState, predict: Predictor) -> list[dict[str, Any]]:
    """Rows of candidates.csv: the first trial of each plan, and the baselines that are none.

    Throughput is that at the highest concurrency; where no plan's speed was fitted, it is predicted as the base's times
    the plan's gain in bytes. `on_front` is of quality and predicted speed.
    """
    trials = list({Plan.from_dict(trial): trial for trial in reversed(state.trials)}.values())[::-1]
    searched = {Plan.from_dict(trial) for trial in trials}
    base = scores_of(folder, search_base_key(state))
    trials += [
        _baseline_trial(folder, entry, base) for entry in state.baselines if Plan.from_dict(entry) not in searched
    ]
    timed = state.throughput or (state.speed or {"measured": []})["measured"]
    concurrency = max((unit["concurrency"] for unit in timed), default=0)
    measured = {}
    for unit in timed:
        record = find_record(folder, unit["key"], ("throughput",))
        if record is None or unit["concurrency"] != concurrency:
            continue
        measured[Plan.from_dict(unit)] = record["output_throughput_tok_per_s"]
    base_tok_per_s = measured.get(Plan.uniform(Treatment.SOFTMAX, state.n_layers))
    nan = float("nan")
    points = [(nan, nan) if trial["quality"] is None else (trial["quality"], trial["speedup"]) for trial in trials]
    rows = []
    for trial, on_front in zip(trials, front(points), strict=True):
        plan = Plan.from_dict(trial)
        predicted = predict(plan, concurrency)
        if predicted is None and base_tok_per_s is not None and trial["speedup"] is not None:
            predicted = base_tok_per_s * trial["speedup"], float("nan")
        tok_per_s, stderr = predicted or (None, None)
        rows.append(
            {
                "plan_id": plan.plan_id,
                **{name: trial[name] for name in ("plan", "window", "origin", "remove_below", "keep_above", "status")},
                **{name: trial[name] for name in ("quality", "quality_stderr", "objective")},
                "predicted_throughput_tok_per_s": tok_per_s,
                "predicted_throughput_stderr": stderr,
                "output_throughput_tok_per_s": measured.get(plan),
                "on_front": on_front,
            }
        )
    return rows


def _baseline_trial(folder: RunFolder, entry: dict[str, Any], base: Scores | None) -> dict[str, Any]:
    """A baseline as if the search had met it: judged by the tasks that the search judges by, as `base` was."""
    scores = scores_of(folder, entry["key"])
    if scores is not None and base is not None:
        judged_by = {(metric.task, metric.metric) for metric in base.primary()}
        scores = Scores([metric for metric in scores.metrics if (metric.task, metric.metric) in judged_by])
    value, stderr = (None, None) if scores is None else quality(scores)
    judged = {"quality": value, "quality_stderr": stderr, "status": "failed" if scores is None else "ok"}
    return {**entry, **judged, "objective": None, "remove_below": None, "keep_above": None}


def pareto_rows(folder: RunFolder, state: RunState, predict: Predictor) -> list[dict[str, Any]]:
    """Rows of pareto.csv: each finalist under each condition; what failed stays, with its error."""
    base = scores_of(folder, state.base_key)
    timings = {(Finalist.from_dict(unit), unit["concurrency"]): unit["key"] for unit in state.throughput}
    concurrencies = list(dict.fromkeys(unit["concurrency"] for unit in state.throughput))
    rows = []
    for entry in state.finalists:
        finalist = Finalist.from_dict(entry)
        plan, healed = finalist.plan, finalist.healed_key is not None
        about: dict[str, Any] = {
            "plan_id": plan.plan_id,
            **plan.to_dict(),
            "origin": finalist.origin,
            "healed": healed,
            "heal_tokens": healing_record(folder, entry["healed_key"])["tokens"] if healed else 0,
            **quality_cells(base, scores_of(folder, entry["quality_key"])),
            "flags": _flags(base, scores_of(folder, entry["quality_key"])),
        }
        for concurrency in concurrencies:
            timing = find_record(folder, timings[finalist, concurrency], ("throughput",))
            tok_per_s, stderr = predict(plan, concurrency) or (None, None)
            missing = [
                what
                for what, there in (("quality", "quality" in about), ("throughput", timing is not None))
                if not there
            ]
            rows.append(
                {
                    **about,
                    "concurrency": concurrency,
                    **{name: value for name, value in (timing or {}).items() if name in _TIMING_COLUMNS},
                    "predicted_throughput_tok_per_s": tok_per_s,
                    "predicted_throughput_stderr": stderr,
                    "status": "failed" if missing else "ok",
                    "error": _error(state, finalist, missing) if missing else None,
                }
            )
    return rows + [_failed_healing(failure) for failure in state.failures if failure["stage"] == "heal"]


_TIMING_COLUMNS = (
    "engine",
    "hardware",
    "prompt_tokens",
    "new_tokens",
    "output_throughput_tok_per_s",
    "output_throughput_stderr",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "peak_memory_mib",
    "kv_bytes_per_token",
    "engine_version",
    "ttft_ms_p99",
    "tpot_ms_p99",
    "itl_ms_p50",
    "itl_ms_p99",
    "kv_cache_tokens",
)


def quality_cells(base: Scores | None, scores: Scores | None) -> dict[str, Any]:
    """Scores, quality and quality retained of a row, with their errors; nothing where they are not recorded."""
    if base is None or scores is None:
        return {}
    value, stderr = quality(scores)
    ratio, ratio_stderr = retained(base, scores)
    return {
        "scores": scores.to_dict()["metrics"],
        "quality": value,
        "quality_stderr": stderr,
        "quality_retained": ratio,
        "quality_retained_stderr": ratio_stderr,
    }


def _flags(base: Scores | None, scores: Scores | None) -> str | None:
    """What a model lost although its accuracy held; None where nothing is lost or known."""
    return None if base is None or scores is None else flag_text(flags(base, scores)) or None


def _failed_healing(failure: dict[str, Any]) -> dict[str, Any]:
    plan = Plan.parse(failure["name"]["plan"], failure["name"].get("window"))
    return {
        "plan_id": plan.plan_id,
        **plan.to_dict(),
        "origin": failure["name"]["origin"],
        "healed": True,
        "status": "failed",
        "error": failure["error"],
    }


def _error(state: RunState, finalist: Finalist, missing: list[str]) -> str:
    errors = [
        failure["error"]
        for failure in state.failures
        if failure["stage"] in ("measure", "speed", "throughput") and failure["name"].get("plan") == str(finalist.plan)
    ]
    return errors[0] if errors else f"no record of {' and '.join(missing)}"


def cost_table(folder: RunFolder, state: RunState) -> pd.DataFrame:
    """What each stage took: units, worker seconds, healing tokens."""
    keys = {
        "evaluate": [state.base_key],
        "sensitivity": [unit["key"] for unit in state.sensitivity],
        "halving": [unit["key"] for unit in state.halving],
        "heal": [unit["key"] for unit in state.healed],
        "curve": [unit["key"] for unit in state.baselines]
        + [unit["quality_key"] for unit in state.halving]
        + [point["key"] for unit in state.healed for point in unit["curve"]],
        "measure": [unit["quality_key"] for unit in state.finalists] + [unit["key"] for unit in state.branches],
        "throughput": [
            unit["key"] for unit in (*state.throughput, *state.lengths, *(state.speed or {"measured": []})["measured"])
        ],
    }
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"units": 0, "worker_s": 0.0, "tokens": 0})
    found = [
        (stage, record.result)
        for stage, of_stage in keys.items()
        for record in folder.records(stage)
        if record.key in of_stage
    ]
    found += [(stage, record.result) for stage in ("search", "refine", "sample") for record in folder.records(stage)]
    found += [("sensitivity", record.result) for record in folder.records(SWEEP)]
    for stage, result in found:
        totals[stage]["units"] += 1
        totals[stage]["worker_s"] += result["duration_s"]
        totals[stage]["tokens"] += result["tokens"] if stage in ("halving", "heal") else 0
    order = (
        "evaluate",
        "sensitivity",
        "search",
        "refine",
        "sample",
        "halving",
        "heal",
        "curve",
        "measure",
        "throughput",
    )
    return pd.DataFrame(
        [
            {
                "stage": stage,
                "units": int(totals[stage]["units"]),
                "worker seconds": round(totals[stage]["worker_s"], 1),
                "healing tokens": int(totals[stage]["tokens"]) or None,
            }
            for stage in order
            if stage in totals
        ]
    )


def scores_of(folder: RunFolder, key: str | None) -> Scores | None:
    """The scores of a record; None where there is none."""
    record = None if key is None else find_record(folder, key)
    return None if record is None else Scores.from_dict(record["scores"])


def healing_record(folder: RunFolder, key: str) -> dict[str, Any]:
    """What is recorded of a healing.

    Raises:
        QualityError: nothing is.
    """
    record = find_record(folder, key, ("heal",))
    if record is None:
        raise QualityError(f"healing {key}: is not recorded; run the recipe again")
    return record


def find_record(folder: RunFolder, key: str, stages: Sequence[str] = SCORE_STAGES) -> dict[str, Any] | None:
    """The result of a record, in whichever of the stages it stands."""
    return find_records(folder, [key], stages)[0]


def find_records(
    folder: RunFolder, keys: Sequence[str], stages: Sequence[str] = SCORE_STAGES
) -> list[dict[str, Any] | None]:
    """The results of several records, None for each that stands in none of the stages."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        missing = [key for key in keys if key not in found]
        records = folder.read_records(stage, missing)
        found |= {record.key: record.result for record in records if record is not None}
    return [found.get(key) for key in keys]
