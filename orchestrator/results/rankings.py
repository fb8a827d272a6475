"""Makes the tables that tell how certain the ranking of layers is, from a run's records and without running models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from layerboost.evaluation.scores import SCORES, Scores
from layerboost.evaluation.statistics import mean_of_differences, paired_difference
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import MEAN_TASK, mean_drop
from layerboost.sensitivity.ranking import (
    DropMatrix,
    Method,
    indistinct_neighbours,
    items_until_stable,
    rank_correlation,
    split_half,
    straddles,
)
from orchestrator.results.ablations import (
    Ablations,
    SingleLayer,
    Source,
    item_drops_if_any,
    measured_scores,
    source_of,
)
from orchestrator.results.plans import search_base_key
from orchestrator.results.reading import RecordReader
from orchestrator.run.inputs import TASKS_SOURCE, TEXT_SOURCE
from orchestrator.run.state import RunState

METHODS: tuple[Method, ...] = ("spearman", "kendall")


@dataclass(frozen=True)
class View:
    """Holds one ranking of layers, by one score over the items of one source."""

    treatment: str
    score: str
    source: str
    context_tokens: int | None
    is_chosen: bool
    matrix: DropMatrix

    @property
    def name(self) -> str:
        return " ".join([self.score, self.source, *([] if self.context_tokens is None else [str(self.context_tokens)])])


def views(ablations: Ablations, state: RunState) -> list[View]:
    """Returns every ranking in the records; the one by the chosen score comes first.

    A score over several tasks gives a ranking for each task and one over all of them. Further texts and lengths are
    ranked only by scores that rank texts. An adaptive sweep gives no rankings, because its layers have not seen the
    same items.
    """
    if not state.sensitivity or state.adaptive is not None:
        return []
    chosen_source = source_of(state.sensitivity[0])
    found: list[View] = []
    for (source, tokens), treatment in ablations.layers:
        drops = _drops(ablations, (source, tokens), treatment, state.n_layers)
        for score, by_task in drops.items():
            is_chosen = score == state.score and (source, tokens) == chosen_source
            is_extra = source != TASKS_SOURCE and (source, tokens) != _main_text(state)
            if not by_task or (is_extra and not SCORES[score].ranks_texts):
                continue
            if source != TASKS_SOURCE:
                found.append(View(treatment, score, source, tokens, is_chosen, DropMatrix(by_task)))
                continue
            for task, matrix in by_task.items() if len(by_task) > 1 else ():
                found.append(View(treatment, score, task, None, False, DropMatrix({task: matrix})))
            name = MEAN_TASK if len(by_task) > 1 else next(iter(by_task))
            found.append(View(treatment, score, name, None, is_chosen, DropMatrix(by_task)))
    return sorted(found, key=lambda view: not view.is_chosen)


def ranking_rows(found: list[View]) -> Iterator[dict[str, Any]]:
    """Yields the rows of rankings.csv."""
    for view in found:
        order = np.argsort(view.matrix.sensitivity(), kind="stable")
        row: dict[str, Any] = {
            "treatment": view.treatment,
            "score": view.score,
            "source": view.source,
            "context_tokens": view.context_tokens,
            "chosen": view.is_chosen,
            "n_items": view.matrix.n_items,
            "ranking": " ".join(map(str, order)),
        }
        if min(drops.shape[1] for drops in view.matrix.tasks.values()) >= 2 and view.matrix.n_layers >= 2:
            halves = split_half(view.matrix)
            pairs = indistinct_neighbours(view.matrix)
            row |= {
                "split_half_spearman": halves.spearman,
                "split_half_low": halves.ci_low,
                "split_half_high": halves.ci_high,
                "items_until_stable": items_until_stable(view.matrix),
                "indistinct_pairs": " ".join(f"{pair.lower}<{pair.upper}" for pair in pairs),
            }
        yield row


def correlation_rows(found: list[View]) -> Iterator[dict[str, Any]]:
    """Yields the rows of rank_correlations.csv: each pair of rankings of the same treatment."""
    for a, b in combinations(found, 2):
        if a.treatment != b.treatment or a.matrix.n_layers < 2:
            continue
        sizes = [{task: drops.shape for task, drops in view.matrix.tasks.items()} for view in (a, b)]
        same_items = sizes[0] == sizes[1] and a.context_tokens == b.context_tokens
        for method in METHODS:
            correlation = rank_correlation(a.matrix, b.matrix, method=method, same_items=same_items)
            yield {
                "treatment": a.treatment,
                "view_a": a.name,
                "view_b": b.name,
                "method": method,
                "correlation": correlation.value,
                "ci_low": correlation.ci_low,
                "ci_high": correlation.ci_high,
            }


def interaction_rows(records: RecordReader, state: RunState, ablations: Ablations) -> Iterator[dict[str, Any]]:
    """Yields the rows of interactions.csv: each tried plan whose treated layers were all measured one by one.

    Plans of the search are compared by the scores of the search, finalists without healing by all scores. Plan, base
    and single layers are compared over the same items, so that the interaction is paired too. The cost of a single
    layer is computed once, and the scores of the plans are read one after the other, because a search may try thousands
    of plans.

    Args:
        records: Reader of the plans' scores.
        state: State of the run.
        ablations: Single layers, compared with the base scores of `interaction_bases`.
    """
    seen: set[tuple[Plan, str]] = set()
    for base, tried in zip(interaction_bases(state), (_trials(state), _unhealed(state)), strict=True):
        base_scores = records.scores(base)
        if base is None or base_scores is None:
            continue
        layers = ablations.singles(base)
        each_scores = records.each_scores(key for _, key in tried)
        for ((plan, _), origin), scores in zip(tried.items(), each_scores, strict=True):
            if scores is None:
                continue
            treated = [(t, layer) for layer, t in enumerate(plan.treatments) if t is not Treatment.SOFTMAX]
            for score in measured_scores(scores):
                singles = [layers.get((*place, score)) for place in treated]
                if (plan, score) in seen or None in singles:
                    continue
                seen.add((plan, score))
                yield {
                    "plan_id": plan.plan_id,
                    **plan.to_dict(),
                    "origin": origin,
                    "score": score,
                    **_interaction(base_scores, scores, [single for single in singles if single is not None], score),
                }


def interaction_bases(state: RunState) -> tuple[str | None, str | None]:
    """Returns the keys of the base's scores with which the plans of the search and the finalists are compared."""
    return search_base_key(state), state.base_key


Tried = dict[tuple[Plan, str], str]
"""Origin of each plan that treats a layer, by the plan and the key of its scores."""


def _trials(state: RunState) -> Tried:
    return _treated((trial.plan, trial.key, trial.origin) for trial in state.trials)


def _unhealed(state: RunState) -> Tried:
    unhealed = [entry for entry in state.finalists if entry.finalist.healed_key is None]
    return _treated((entry.finalist.plan, entry.quality_key, entry.finalist.origin) for entry in unhealed)


def _treated(tried: Iterable[tuple[Plan, str | None, str]]) -> Tried:
    """Returns the first origin of each plan that treats a layer and whose scores have a key."""
    found: Tried = {}
    for plan, key, origin in tried:
        if key is not None and not plan.is_untouched:
            found.setdefault((plan, key), origin)
    return found


def tier_rows(
    sensitivity: list[dict[str, Any]], state: RunState, removed: str = Treatment.NONE.value
) -> Iterator[dict[str, Any]]:
    """Yields the rows of tiers.csv: the layers of the healed plans that came from thresholds.

    Args:
        sensitivity: Rows of sensitivity.csv.
        state: State of the run.
        removed: Treatment of the layers below the lower threshold, whose drops the thresholds lie on.
    """
    drops = {row["layer"]: row for row in sensitivity if row["task"] == MEAN_TASK and row["treatment"] == removed}
    trials = {trial.plan: trial for trial in reversed(state.trials)}
    for entry in state.healed:
        plan = entry.plan
        trial = trials.get(plan)
        if trial is None or trial.remove_below is None or trial.keep_above is None or len(drops) < len(plan):
            continue
        thresholds = {"remove_below": trial.remove_below, "keep_above": trial.keep_above}
        for layer, treatment in enumerate(plan.treatments):
            row = drops[layer]
            holds = straddles(row["drop_ci_low"], row["drop_ci_high"], **thresholds)
            yield {
                "plan_id": plan.plan_id,
                "plan": str(plan),
                "layer": layer,
                "treatment": treatment.value,
                **{name: row[name] for name in ("drop", "drop_ci_low", "drop_ci_high")},
                **thresholds,
                "straddles": " ".join(name for name, held in zip(thresholds, holds, strict=True) if held),
            }


def _main_text(state: RunState) -> Source | None:
    return next((source_of(unit) for unit in state.sensitivity if unit.source == TEXT_SOURCE), None)


def _drops(ablations: Ablations, source: Source, treatment: str, n_layers: int) -> dict[str, dict[str, np.ndarray]]:
    """Maps score to task to an array (n_layers, n_items), for each score that every layer has."""
    found = {
        score: {task: np.stack([of_layer[task] for of_layer in layers]) for task in layers[0]}
        for score, layers in ablations.layers[source, treatment].items()
        if len(layers) == n_layers
    }
    cosine = ablations.cosine.get((source, treatment))
    return found if cosine is None else found | {"cosine": {TEXT_SOURCE: cosine}}


def _interaction(base: Scores, plan: Scores, singles: list[SingleLayer], score: str) -> dict[str, Any]:
    measured = mean_drop(base, plan, score, intervals=False)
    row = {
        "predicted_drop": float(sum(single.drop for single in singles)),
        "measured_drop": measured.drop,
        "measured_drop_stderr": measured.drop_stderr,
    }
    by_task = item_drops_if_any(base, plan, score)
    of_singles = [single.items for single in singles if single.items is not None]
    if by_task is None or len(of_singles) < len(singles):
        return {**row, "interaction_stderr": None}
    differences = [
        paired_difference(
            drops.tolist(), np.sum([single[task] for single in of_singles], axis=0).tolist(), confidence=None
        )
        for task, drops in by_task.items()
    ]
    return {**row, "interaction_stderr": mean_of_differences(differences, confidence=None).stderr}
