"""Compares what each stage was expected to take with what it took."""

from __future__ import annotations

from typing import Any

from orchestrator.run.folder import RunFolder
from orchestrator.run.kinds import HALVING, kind_made_by
from orchestrator.run.records import find_records
from orchestrator.run.state import RunState
from orchestrator.run.units import listed_keys


def estimate_rows(folder: RunFolder, state: RunState) -> list[dict[str, Any]]:
    """Returns the rows of estimates.csv: what each stage was expected to take and what it took; None if unknown.

    `ratio` is actual over expected seconds. A stage without an estimate has no ratio.
    """
    healed = {stage: _tokens(folder, state, stage) for stage in ("heal", HALVING)}
    expected = {entry.stage: entry.to_dict() for entry in state.estimates}
    spent: dict[str, float] = {}
    for name, seconds in state.stage_s.items():
        stage = HALVING if name.startswith(HALVING) else name  # progress counts each rung as a separate stage
        spent[stage] = spent.get(stage, 0.0) + seconds
    rows = []
    for stage in [*expected, *(stage for stage in spent if stage not in expected)]:
        entry, actual_s = expected.get(stage, {}), spent.get(stage)
        estimated_s, gpus = entry.get("seconds"), entry.get("gpus", 0.0)
        rows.append(
            {
                "stage": stage,
                "units": entry.get("units"),
                "estimated_s": estimated_s,
                "actual_s": actual_s,
                "ratio": actual_s / estimated_s if estimated_s and actual_s is not None else None,
                "estimated_tokens": entry.get("tokens") or None,
                "actual_tokens": healed.get(stage) or None,
                "estimated_gpu_hours": None if estimated_s is None else estimated_s * gpus / 3600,
                "actual_gpu_hours": None if actual_s is None else actual_s * gpus / 3600,
                "memory_mib": entry.get("memory_mib"),
            }
        )
    return rows


def _tokens(folder: RunFolder, state: RunState, stage: str) -> int:
    """Returns the tokens of the recorded healings that the run lists for a stage."""
    keys = [key for unit in listed_keys(state, stage) if not unit.is_beside for key in unit.keys]
    return sum(found["tokens"] for found in find_records(folder, keys, kind_made_by(stage)) if found is not None)
