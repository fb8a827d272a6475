"""Makes the rows of halving tables: plans' quality after each rung, and how well early ranks predict later ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from layerboost.evaluation.scores import quality
from layerboost.healing.rungs import agreement
from layerboost.plan import Plan
from orchestrator.results.plans import judged_like, quality_cells, search_base_key
from orchestrator.results.reading import RecordReader
from orchestrator.run.state import RunState

_VALUES = ("quality", "quality_stderr", "quality_retained", "quality_retained_stderr")


def halving_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of halving.csv: each plan in each rung; a failed plan has no quality.

    Qualities are measured as the search measures them; `final_quality` is that of pareto.csv, for fully healed plans.
    """
    base = records.scores(next((trial.key for trial in state.trials if trial.origin == "base"), None))
    final = _final_qualities(records, state)
    for entry in state.halving:
        plan = entry.plan
        cells = quality_cells(base, records.scores(entry.quality_key))
        yield {
            "plan_id": plan.plan_id,
            **plan.to_dict(),
            **{name: getattr(entry, name) for name in ("origin", "rung", "share", "tokens")},
            **{name: cells.get(name) for name in _VALUES},
            **{name: getattr(entry, name) for name in ("objective", "speedup", "survived")},
            "final_quality": final.get(plan),
        }


def fidelity_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of fidelity.csv: how well the order of plans at one share of the budget predicts the next order.

    Rung 0 is before healing. Only plans measured at both shares are compared. From the second rung on these are the
    survivors, which lie closer together than all plans do, so their correlations are lower. The whole budget follows
    the last rung, and is compared by quality only.
    """
    if not state.halving:
        return
    n_rungs = max(entry.rung for entry in state.halving)
    shares = {0: 0.0} | {entry.rung: entry.share for entry in state.halving} | {n_rungs + 1: 1.0}
    values: dict[str, dict[int, dict[Plan, float]]] = {
        name: {rung: {} for rung in shares} for name in ("objective", "quality")
    }
    for trial in reversed(state.trials):
        _note(values, 0, trial.plan, trial.to_dict())
    for row in halving_rows(records, state):
        _note(values, row["rung"], Plan.from_dict(row), row)
    values["quality"][n_rungs + 1] = _final_qualities(records, state)
    for rung in range(n_rungs + 1):
        for name, by_rung in values.items():
            early, late = by_rung[rung], by_rung[rung + 1]
            plans = [plan for plan in early if plan in late]
            if not plans:
                continue
            found = agreement([early[plan] for plan in plans], [late[plan] for plan in plans])
            yield {
                "of": name,
                "rung_a": rung,
                "rung_b": rung + 1,
                "share_a": shares[rung],
                "share_b": shares[rung + 1],
                "n_plans": found.n_plans,
                "spearman": found.spearman,
                "spearman_low": found.ci_low,
                "spearman_high": found.ci_high,
            }


def _note(values: dict[str, dict[int, dict[Plan, float]]], rung: int, plan: Plan, measured: dict[str, Any]) -> None:
    for name, by_rung in values.items():
        if measured.get(name) is not None:
            by_rung[rung][plan] = measured[name]


def _final_qualities(records: RecordReader, state: RunState) -> dict[Plan, float]:
    """Returns the quality after the whole budget, as the rungs measure it, for those of their plans healed on it."""
    halved, base = {entry.plan for entry in state.halving}, records.scores(search_base_key(state))
    healed = {entry.plan: records.scores(entry.quality_key) for entry in state.healed}
    return {
        plan: quality(scores if base is None else judged_like(base, scores))[0]
        for plan, scores in healed.items()
        if plan in halved and scores is not None
    }
