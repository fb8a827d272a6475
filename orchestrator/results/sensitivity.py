"""Rows of sensitivity.csv, and the same as costs of each layer and treatment."""

from __future__ import annotations

import math
from typing import Any

from layerboost.plan import Treatment
from layerboost.sensitivity.drops import MEAN_TASK
from orchestrator.results.ablations import each_ablation, rows_of
from orchestrator.results.reading import RecordReader
from orchestrator.run.folder import RunFolder
from orchestrator.run.state import RunState


def cost_matrix(folder: RunFolder, state: RunState) -> dict[Treatment, list[float]]:
    """The drop of each layer by each treatment that was measured, first layer first; infinite where none is there."""
    rows = [row for row in sensitivity_rows(folder, state, intervals=False) if row["task"] == MEAN_TASK]
    costs = {Treatment(row["treatment"]): [math.inf] * state.n_layers for row in rows}
    for row in rows:
        costs[Treatment(row["treatment"])][row["layer"]] = row["drop"]
    return costs


def sensitivity_rows(folder: RunFolder, state: RunState, *, intervals: bool = True) -> list[dict[str, Any]]:
    """Rows of sensitivity.csv: the recorded ablations against the base over the same items, by every score measured.

    Args:
        folder: of the run.
        state: says which records are ablations.
        intervals: whether rows have the ends of their intervals, whose bootstrap takes nearly all of the time.
    """
    found = each_ablation(RecordReader(folder), state)
    return [row for ablation in found for row in rows_of(ablation, state, intervals=intervals)]
