"""What a run will cost, before it: units of each stage, what is recorded, and seconds for the rest."""

from __future__ import annotations

import statistics

from layerboost.baselines import is_of_same_budget, n_baseline_plans
from layerboost.healing_spec import mark_steps
from orchestrator.context import RunContext
from orchestrator.results import SCORE_STAGES, SWEEP, find_record
from orchestrator.run_folder import unit_key
from orchestrator.stages.curve import CURVE
from orchestrator.stages.measure import THROUGHPUT
from orchestrator.stages.refine import REFINE
from orchestrator.stages.sampled import SAMPLE, n_sample_units
from orchestrator.stages.sensitivity import Sweep
from orchestrator.tables import format_table
from tasks.ablation import base_unit
from tasks.search import fixed_points


def estimate(run: RunContext) -> str:
    """A table of stages: units, recorded ones, and worker seconds and tokens for the rest.

    Units of the sensitivity are shares of the items; an adaptive sweep takes what its tables ask for, at most all.

    Seconds are those of the same kind of unit in this folder's records; where there are none yet, of the base's
    evaluation; where that is not recorded either, unknown. Searched plans and baselines are counted as if all were
    distinct, branches as if all healed plans had linear_window layers; sampled documents as if all were of full length.
    """
    inputs, folder = run.inputs, run.folder
    spec = inputs.full_spec
    base_identity = inputs.scores(base_unit(), spec)
    base = find_record(folder, unit_key(base_identity), SCORE_STAGES)
    adaptive = inputs.recipe.sensitivity.adaptive is not None
    sweep = Sweep(run, inputs.sweep_sources[:1] if adaptive else inputs.sweep_sources)
    n_fixed = len(fixed_points(inputs.search_spec, inputs.n_layers))
    throughput = inputs.recipe.throughput
    n_healed, n_curve, n_branches = _healing_units(run)
    n_samples = n_sample_units(run) if n_healed and inputs.sampling else 0
    n_finalists = n_fixed + n_healed
    n_refined = inputs.recipe.search.refine.plans if inputs.recipe.search.refine else 0
    rows = [
        ("evaluate", 1, int(base is not None), 0),
        ("sensitivity", sweep.n_units(), sweep.n_recorded(), 0),
        ("search", n_fixed + inputs.search_spec.trials, len(folder.records("search")), 0),
        (REFINE, n_refined, len(folder.records(REFINE)), 0),
        (SAMPLE, n_samples, len(folder.records(SAMPLE)), 0),
        ("heal", n_healed, len(folder.records("heal")), inputs.healing_spec.tokens if n_healed else 0),
        (CURVE, n_curve, len(folder.records(CURVE)), 0),
        ("measure", n_finalists - 1 + n_branches, len(folder.records("measure")), 0),
        (THROUGHPUT, n_finalists * len(throughput.concurrency), len(folder.records(THROUGHPUT)), 0),
    ]
    fallback_s = None if base is None else base["duration_s"]
    table: list[list] = []
    unlike_scores = (SAMPLE, "heal", THROUGHPUT)
    total_s = 0.0
    for stage, n_units, n_recorded, tokens_each in rows:
        n_left = max(0, n_units - n_recorded)
        durations = _durations_s(run, stage)
        each_s = statistics.fmean(durations) if durations else (None if stage in unlike_scores else fallback_s)
        left_s = 0.0 if not n_left else None if each_s is None else n_left * each_s
        total_s += left_s or 0.0
        left = "unknown" if left_s is None else round(left_s)
        table.append([stage, n_units, n_recorded, left, n_left * tokens_each or None])
    columns = ["stage", "units", "recorded", "worker seconds left", "healing tokens left"]
    lines = [format_table(columns, table), f"known so far: {total_s:.0f} worker seconds, shared by the workers"]
    if any("unknown" in row for row in table):
        lines.append("unknown: no unit of that stage is recorded yet; `--until evaluate` measures the first one")
    return "\n".join(lines)


def _healing_units(run: RunContext) -> tuple[int, int, int]:
    """Healed plans, points of their quality curves before the last, and checks of their branches."""
    inputs, healing = run.inputs, run.inputs.recipe.healing
    if not healing.tokens:
        return 0, 0, 0
    n_baselines = sum(
        n_baseline_plans(name) * (healing.candidates if is_of_same_budget(name) else 1) for name in healing.baselines
    )
    n_healed = healing.candidates + n_baselines
    n_curve = n_healed * (1 + len(mark_steps(inputs.healing_spec, healing.curve))) if healing.curve else n_baselines
    return n_healed, n_curve, 0 if inputs.full_spec.text is None else n_healed


def _durations_s(run: RunContext, stage: str) -> list[float]:
    """Worker seconds of the recorded units of a stage."""
    if stage != "sensitivity":
        return [record.result["duration_s"] for record in run.folder.records(stage)]
    # A share is recorded once for each treatment.
    recorded = [record.result["duration_s"] for record in run.folder.records(SWEEP) if "tasks" not in record.result]
    return [duration_s * len(run.inputs.sweep_plans) for duration_s in recorded]
