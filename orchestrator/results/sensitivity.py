"""Rows of sensitivity.csv, and the same as costs of each layer and treatment."""

from __future__ import annotations

import math
from typing import Any

from layerboost.evaluation.scores import SCORES, Scores
from layerboost.plan import Treatment
from layerboost.sensitivity.drops import MEAN_TASK, cosine_drops, drops
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import TASKS_SOURCE
from orchestrator.run.records import find_record, scores_of
from orchestrator.run.state import RunState


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
    return [score.name for score in SCORES if score.is_measured(scores)]
