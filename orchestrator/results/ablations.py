"""Reads the costs of single layers from the records of the sensitivity stage, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerboost.evaluation.scores import SCORES, QualityError, Scores
from layerboost.plan import Treatment
from layerboost.sensitivity.drops import (
    MEAN_TASK,
    DropRow,
    cosine_drops,
    drops,
    item_drops,
    mean_drop,
)
from orchestrator.results.reading import RecordReader
from orchestrator.run.entries import AblationEntry
from orchestrator.run.inputs import TASKS_SOURCE
from orchestrator.run.state import RunState

Source = tuple[str, int | None]
"""Name of a source of items, and the tokens of its sequences if it is a text."""

Place = tuple[Treatment, int | None, str]
"""Treatment and layer of an ablation, and the score that it is judged by."""


@dataclass(frozen=True)
class Ablation:
    """Holds a treated layer and the base that it is compared with, or the cosine distances of all layers.

    Attributes:
        entry: Entry of `run.json`.
        variant: Scores of the treated model; None for cosine distances.
        base: Scores of the base over the same items; None for cosine distances.
        cosine: Distances of each layer, one for each sequence; None for scores.
    """

    entry: AblationEntry
    variant: Scores | None = None
    base: Scores | None = None
    cosine: list[list[float]] | None = None


@dataclass(frozen=True)
class SingleLayer:
    """Holds the cost of one treated layer by one score: its drop, and the items' drops by task if there are any."""

    drop: float
    items: dict[str, np.ndarray] | None


class Ablations:
    """Holds what the tables need from all single layers; the records themselves are not kept.

    Args:
        records: Reader of the records, each of which is read once.
        state: State of the run.
        bases: Keys of the base scores that single layers are compared with for the interactions of plans.

    Attributes:
        rows: Rows of sensitivity.csv.
        layers: By source and treatment, then by score: a list over layers of the items' drops by task.
        cosine: By source and treatment: distances of each layer, (n_layers, n_sequences).
    """

    def __init__(self, records: RecordReader, state: RunState, bases: tuple[str | None, ...] = ()):
        self.rows: list[dict[str, Any]] = []
        self.layers: dict[tuple[Source, str], dict[str, list[dict[str, np.ndarray]]]] = {}
        self.cosine: dict[tuple[Source, str], np.ndarray] = {}
        self._singles: dict[str, dict[Place, SingleLayer]] = {}
        compared = {key: scores for key in bases if key is not None and (scores := records.scores(key)) is not None}
        for entry in state.sensitivity:
            self.layers.setdefault((source_of(entry), entry.treatment), {})
        for ablation in each_ablation(records, state):
            self.rows += rows_of(ablation, state)
            self._take(ablation)
            for key, base in compared.items():
                _add_singles(self._singles.setdefault(key, {}), ablation, base)

    def singles(self, base_key: str) -> dict[Place, SingleLayer]:
        """Returns the single layers by treatment, layer and score, compared with a base over the same items."""
        return self._singles.get(base_key, {})

    def _take(self, ablation: Ablation) -> None:
        place = source_of(ablation.entry), ablation.entry.treatment
        if ablation.cosine is not None:
            self.cosine[place] = np.asarray(ablation.cosine)
        elif ablation.variant is not None and ablation.base is not None:
            for score in measured_scores(ablation.variant):
                if (of_layer := item_drops_if_any(ablation.base, ablation.variant, score)) is not None:
                    self.layers[place].setdefault(score, []).append(of_layer)


def each_ablation(records: RecordReader, state: RunState) -> Iterator[Ablation]:
    """Reads the records of the sensitivity stage one by one, in the order of `run.json`."""
    keys = (entry.key for entry in state.sensitivity)
    for entry, record in zip(state.sensitivity, records.each_result(keys), strict=True):
        if record is None:
            continue
        if "cosine" in record:
            yield Ablation(entry, cosine=record["cosine"])
        else:
            yield Ablation(entry, Scores.from_dict(record["scores"]), records.scores(entry.base_key))


def rows_of(ablation: Ablation, state: RunState, *, intervals: bool = True) -> Iterator[dict[str, Any]]:
    """Yields the rows of sensitivity.csv of one ablation: one for each score and task.

    Only the chosen score has rows with the task `mean`. Further texts and lengths count as separate tasks.
    """
    entry, is_chosen = ablation.entry, source_of(ablation.entry) == source_of(state.sensitivity[0])
    found: list[tuple[int | None, DropRow]] = []
    if ablation.cosine is not None:
        found = [
            (layer, row)
            for layer, distances in enumerate(ablation.cosine)
            for row in cosine_drops(distances, intervals=intervals)
            if row.task != MEAN_TASK or state.score == "cosine"
        ]
    elif ablation.variant is not None and ablation.base is not None:
        found = [
            (entry.layer, row)
            for score in measured_scores(ablation.variant)
            for row in drops(ablation.base, ablation.variant, score, intervals=intervals)
            if row.task != MEAN_TASK or (is_chosen and score == state.score)
        ]
    is_other_text = not is_chosen and entry.source != TASKS_SOURCE and ablation.cosine is None
    for layer, row in found:
        values = row.to_dict()
        if row.task != MEAN_TASK and is_other_text:
            values["task"] = source_label(entry)
        yield {"layer": layer, "treatment": entry.treatment, **values}


def source_of(entry: AblationEntry) -> Source:
    return entry.source, entry.context_tokens


def source_label(entry: AblationEntry) -> str:
    """Returns the name of a source of items: for a text, its name and the tokens of its sequences."""
    tokens = entry.context_tokens
    return entry.source if tokens is None else f"{entry.source} {tokens}"


def measured_scores(scores: Scores) -> list[str]:
    """Returns the names of the scores that were measured for a variant."""
    return [score.name for score in SCORES if score.is_measured(scores)]


def item_drops_if_any(base: Scores, variant: Scores, score: str) -> dict[str, np.ndarray] | None:
    """Returns the result of `item_drops`; None for a score that is no mean over items, such as a word perplexity."""
    try:
        return item_drops(base, variant, score)
    except QualityError:
        return None


def _add_singles(found: dict[Place, SingleLayer], ablation: Ablation, base: Scores) -> None:
    """Adds a layer's costs for each score, if the base has that score over the same items."""
    variant = ablation.variant
    of_base = {(score.task, score.metric): score.n_items for score in base.metrics}
    # The base's divergence from itself ("kl") may not have been measured, so it is not compared.
    if variant is None or any(
        of_base.get((s.task, s.metric)) != s.n_items for s in variant.metrics if s.metric != "kl"
    ):
        return
    for score in measured_scores(variant):
        place = Treatment(ablation.entry.treatment), ablation.entry.layer, score
        if place not in found:
            drop = mean_drop(base, variant, score, intervals=False).drop
            found[place] = SingleLayer(drop, item_drops_if_any(base, variant, score))
