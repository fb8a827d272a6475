"""Stage `evaluate`: the untouched parent, judged by everything that finalists are judged by."""

from __future__ import annotations

from orchestrator.context import RunContext
from orchestrator.run_folder import unit_key
from tasks.ablation import base_unit


def evaluate(run: RunContext) -> bool:
    """Judges the base. Returns whether the next stage can follow."""
    unit, spec = base_unit(), run.inputs.full_spec
    run.state.base_key = unit_key(run.inputs.scores(unit, spec))
    return run.evaluate("evaluate", spec, {unit: {"model": "base"}})
