"""Makes the rows of candidates.csv and pareto.csv from records that `run.json` lists, without running any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layerboost.evaluation.flags import flag_text, flags
from layerboost.evaluation.scores import Scores, quality, retained
from layerboost.plan import Plan, Treatment
from layerboost.search.baselines import CONTROL
from layerboost.search.pareto import front
from orchestrator.results.reading import RecordReader
from orchestrator.run.entries import BaselineEntry, Failure, Finalist, SpeedFit, Trial
from orchestrator.run.kinds import TIMINGS
from orchestrator.run.state import RunState

Predictor = Callable[[Plan, int], tuple[float, float] | None]
"""Predicts a plan's output throughput (tok/s) at a concurrency and its standard error; None without a prediction."""


def search_base_key(state: RunState) -> str | None:
    """Returns the key of the base's scores as the search measures them; None if the search lists no base."""
    return next((trial.key for trial in state.trials if trial.origin == "base"), None)


def candidate_rows(records: RecordReader, state: RunState, predict: Predictor) -> list[dict[str, Any]]:
    """Returns the rows of candidates.csv: the first trial of each plan, and the baselines that are no trials.

    Throughput is given at the highest concurrency. If no model predicts a plan's throughput, it is the base's measured
    throughput times the plan's predicted speedup. `on_front` refers to quality and predicted speed.
    """
    trials = list({trial.plan: trial for trial in reversed(state.trials)}.values())[::-1]
    searched = {trial.plan for trial in trials}
    base = records.scores(search_base_key(state))
    trials += [_baseline_trial(records, entry, base) for entry in state.baselines if entry.plan not in searched]
    timed = [(entry.finalist.plan, entry.concurrency, entry.key) for entry in state.throughput] or [
        (entry.plan, entry.concurrency, entry.key) for entry in (state.speed or SpeedFit()).measured
    ]
    concurrency = max((at for _, at, _ in timed), default=0)
    measured: dict[Plan, float] = {}
    for plan, at, key in timed:
        record = records.result(key, TIMINGS) if at == concurrency else None
        if record is not None:  # the base comes before its healed control, which is the same plan
            measured.setdefault(plan, record["output_throughput_tok_per_s"])
    base_tok_per_s = measured.get(Plan.uniform(Treatment.SOFTMAX, state.n_layers))
    nan = float("nan")
    points = [
        (nan, nan) if trial.quality is None or trial.speedup is None else (trial.quality, trial.speedup)
        for trial in trials
    ]
    rows = []
    for trial, on_front in zip(trials, front(points), strict=True):
        plan = trial.plan
        predicted = predict(plan, concurrency)
        if predicted is None and base_tok_per_s is not None and trial.speedup is not None:
            predicted = base_tok_per_s * trial.speedup, float("nan")
        tok_per_s, stderr = predicted or (None, None)
        rows.append(
            {
                "plan_id": plan.plan_id,
                **plan.to_dict(),
                **{name: getattr(trial, name) for name in _TRIAL_COLUMNS},
                "predicted_throughput_tok_per_s": tok_per_s,
                "predicted_throughput_stderr": stderr,
                "output_throughput_tok_per_s": measured.get(plan),
                "on_front": on_front,
            }
        )
    return rows


_TRIAL_COLUMNS = (
    "origin",
    "remove_below",
    "keep_above",
    "status",
    "quality",
    "quality_stderr",
    "objective",
    "share",
    "beaten_by",
)


def judged_like(base: Scores, scores: Scores) -> Scores:
    """Returns the metrics by which the search judged its base; it may have judged by fewer tasks, or by the text."""
    judged_by = {(metric.task, metric.metric) for metric in base.primary()}
    return Scores(
        [replace(metric, primary=True) for metric in scores.metrics if (metric.task, metric.metric) in judged_by]
    )


def _baseline_trial(records: RecordReader, entry: BaselineEntry, base: Scores | None) -> Trial:
    """Turns a baseline into a trial, with the scores restricted to the metrics by which `base` was judged."""
    scores = records.scores(entry.key)
    if scores is not None and base is not None:
        scores = judged_like(base, scores)
    value, stderr = (None, None) if scores is None else quality(scores)
    return Trial(
        entry.plan,
        entry.origin,
        status="failed" if scores is None else "ok",
        quality=value,
        quality_stderr=stderr,
        speedup=entry.speedup,
        key=entry.key,
    )


def pareto_rows(records: RecordReader, state: RunState, predict: Predictor) -> list[dict[str, Any]]:
    """Returns the rows of pareto.csv: each finalist under each condition; a failed one stays, with its error."""
    base, control = records.scores(state.base_key), records.scores(_control_key(state))
    timings = {(unit.finalist, unit.concurrency): unit.key for unit in state.throughput}
    concurrencies = list(dict.fromkeys(unit.concurrency for unit in state.throughput))
    rows = []
    for entry in state.finalists:
        finalist, plan = entry.finalist, entry.finalist.plan
        about: dict[str, Any] = {
            "plan_id": plan.plan_id,
            **plan.to_dict(),
            "origin": finalist.origin,
            "healed": finalist.healed_key is not None,
            "heal_tokens": 0 if finalist.healed_key is None else records.healing(finalist.healed_key)["tokens"],
            **quality_cells(base, records.scores(entry.quality_key)),
            **_control_cells(control, records.scores(entry.quality_key)),
            "flags": _flags(base, records.scores(entry.quality_key)),
        }
        for concurrency in concurrencies:
            timing = records.result(timings[finalist, concurrency], TIMINGS)
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
    return rows + [_failed_healing(failure) for failure in state.failures if failure.stage == "heal"]


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
    """Returns a row's scores, quality and quality retained, with standard errors; empty if they are not recorded."""
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


def _control_key(state: RunState) -> str | None:
    """Returns the key of the scores of the control, the parent that was healed like the candidates; None without it."""
    return next((entry.quality_key for entry in state.healed if entry.origin == CONTROL), None)


def _control_cells(control: Scores | None, scores: Scores | None) -> dict[str, Any]:
    """Returns a row's quality over that of the control; empty if either is not recorded."""
    if control is None or scores is None:
        return {}
    ratio, stderr = retained(control, scores)
    return {"control_retained": ratio, "control_retained_stderr": stderr}


def _flags(base: Scores | None, scores: Scores | None) -> str | None:
    """Names the losses that a model's accuracy does not show; None if there are none or nothing is recorded."""
    return None if base is None or scores is None else flag_text(flags(base, scores)) or None


def _failed_healing(failure: Failure) -> dict[str, Any]:
    plan = Plan.from_dict(failure.name)
    return {
        "plan_id": plan.plan_id,
        **plan.to_dict(),
        "origin": failure.name["origin"],
        "healed": True,
        "status": "failed",
        "error": failure.error,
    }


def _error(state: RunState, finalist: Finalist, missing: list[str]) -> str:
    errors = [
        failure.error
        for failure in state.failures
        if failure.stage in ("measure", "speed", "throughput")
        and failure.name.get("plan") == str(finalist.plan)
        and failure.name.get("healed", "no") == ("no" if finalist.healed_key is None else "yes")
    ]
    return errors[0] if errors else f"no record of {' and '.join(missing)}"
