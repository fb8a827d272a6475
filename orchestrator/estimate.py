"""What a run will cost, before it: units of each stage, what is recorded, and seconds for the rest."""

from __future__ import annotations

import statistics

from orchestrator.context import RunContext
from orchestrator.results import SCORE_STAGES, SWEEP, find_record
from orchestrator.run_folder import unit_key
from orchestrator.stages.measure import THROUGHPUT
from orchestrator.stages.refine import REFINE
from orchestrator.stages.sensitivity import Sweep
from orchestrator.tables import format_table
from tasks.ablation import base_unit
from tasks.search import fixed_points


def estimate(run: RunContext) -> str:
    """A table of stages: units, recorded ones, and worker seconds and tokens for the rest.

    Units of the sensitivity are shares of the items; an adaptive sweep takes what its tables ask for, at most all.

    Seconds are those of the same kind of unit in this folder's records; where there are none yet, of the base's
    evaluation; where that is not recorded either, unknown. Searched plans are counted as if all were distinct.
    """
    inputs, folder = run.inputs, run.folder
    spec = inputs.full_spec
    base_identity = inputs.scores(base_unit(), spec)
    base = find_record(folder, unit_key(base_identity), SCORE_STAGES)
    adaptive = inputs.recipe.sensitivity.adaptive is not None
    sweep = Sweep(run, inputs.sweep_sources[:1] if adaptive else inputs.sweep_sources)
    n_fixed = len(fixed_points(inputs.search_spec, inputs.n_layers))
    healing, throughput = inputs.recipe.healing, inputs.recipe.throughput
    n_healed = healing.candidates if healing.tokens else 0
    n_finalists = n_fixed + n_healed
    n_refined = inputs.recipe.search.refine.plans if inputs.recipe.search.refine else 0
    rows = [
        ("evaluate", 1, int(base is not None), 0),
        ("sensitivity", sweep.n_units(), sweep.n_recorded(), 0),
        ("search", n_fixed + inputs.search_spec.trials, len(folder.records("search")), 0),
        (REFINE, n_refined, len(folder.records(REFINE)), 0),
        ("heal", n_healed, len(folder.records("heal")), inputs.healing_spec.tokens if n_healed else 0),
        ("measure", n_finalists - 1, len(folder.records("measure")), 0),
        (THROUGHPUT, n_finalists * len(throughput.concurrency), len(folder.records(THROUGHPUT)), 0),
    ]
    fallback_s = None if base is None else base["duration_s"]
    table: list[list] = []
    total_s = 0.0
    for stage, n_units, n_recorded, tokens_each in rows:
        n_left = max(0, n_units - n_recorded)
        durations = _durations_s(run, stage)
        each_s = statistics.fmean(durations) if durations else (None if stage in ("heal", THROUGHPUT) else fallback_s)
        left_s = 0.0 if not n_left else None if each_s is None else n_left * each_s
        total_s += left_s or 0.0
        left = "unknown" if left_s is None else round(left_s)
        table.append([stage, n_units, n_recorded, left, n_left * tokens_each or None])
    columns = ["stage", "units", "recorded", "worker seconds left", "healing tokens left"]
    lines = [format_table(columns, table), f"known so far: {total_s:.0f} worker seconds, shared by the workers"]
    if any("unknown" in row for row in table):
        lines.append("unknown: no unit of that stage is recorded yet; `--until evaluate` measures the first one")
    return "\n".join(lines)


def _durations_s(run: RunContext, stage: str) -> list[float]:
    """Worker seconds of the recorded units of a stage."""
    if stage != "sensitivity":
        return [record.result["duration_s"] for record in run.folder.records(stage)]
    # A share is recorded once for each treatment.
    recorded = [record.result["duration_s"] for record in run.folder.records(SWEEP) if "tasks" not in record.result]
    return [duration_s * len(run.inputs.sweep_plans) for duration_s in recorded]
