"""Makes the rows of sensitivity.csv, and from them the cost of each layer and treatment."""

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
    """Returns the drop of each layer for each measured treatment, first layer first; infinite if it is missing."""
    rows = [row for row in sensitivity_rows(folder, state, intervals=False) if row["task"] == MEAN_TASK]
    costs = {Treatment(row["treatment"]): [math.inf] * state.n_layers for row in rows}
    for row in rows:
        costs[Treatment(row["treatment"])][row["layer"]] = row["drop"]
    return costs


def sensitivity_rows(folder: RunFolder, state: RunState, *, intervals: bool = True) -> list[dict[str, Any]]:
    """Returns the rows of sensitivity.csv: the recorded ablations, compared with the base by every measured score.

    Args:
        folder: Folder of the run.
        state: State of the run, which lists the records of ablations.
        intervals: Whether rows have confidence intervals, whose bootstrap takes nearly all of the time.
    """
    found = each_ablation(RecordReader(folder), state)
    return [row for ablation in found for row in rows_of(ablation, state, intervals=intervals)]
