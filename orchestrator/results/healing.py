"""Makes the rows of healing tables: losses, quality curves, baselines compared with candidates, branches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from layerboost.evaluation.scores import Scores, retained
from layerboost.plan import Plan
from layerboost.sensitivity.drops import mean_drop
from orchestrator.results.ablations import measured_scores
from orchestrator.results.plans import quality_cells
from orchestrator.results.reading import RecordReader
from orchestrator.run.entries import CurvePoint
from orchestrator.run.state import CANDIDATE_ORIGINS, RunState


def healing_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of healing_curves.csv: every step of every healed plan, with the held-out divergence after it.

    A divergence that was measured before the first step becomes step 0, which has no loss.
    """
    for entry in state.healed:
        plan_id, record = entry.plan.plan_id, records.healing(entry.key)
        held_out = {at["step"]: at["divergence"] for at in record["held_out"]}
        if 0 in held_out:
            first = record["curve"][0]
            yield {
                "plan_id": plan_id,
                **first,
                "step": 0,
                "tokens": 0,
                "loss": None,
                "held_out_divergence": held_out[0],
            }
        for row in record["curve"]:
            yield {"plan_id": plan_id, **row, "held_out_divergence": held_out.get(row["step"])}


def early_stops(records: RecordReader, state: RunState) -> list[dict[str, Any]]:
    """Returns the healed plans that stopped early, with the tokens that they used and the budget."""
    found = []
    for entry in state.healed:
        record = records.healing(entry.key)
        if record["stopped_early"]:
            about = {"plan_id": entry.plan.plan_id, "origin": entry.origin}
            found.append({**about, "tokens": record["tokens"], "budget": record["budget"]})
    return found


def healing_paces(records: RecordReader, state: RunState) -> list[float]:
    """Returns the tokens per second of each healing's steps; records of earlier versions have none."""
    found = (records.healing(entry.key).get("tok_per_s") for entry in state.healed)
    return [tok_per_s for tok_per_s in found if tok_per_s]


def quality_curve_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of healing_quality.csv: each healed plan before healing, at shares of its budget and as saved."""
    base = records.scores(state.base_key)
    for entry in state.healed:
        if not entry.curve:
            continue
        record = records.healing(entry.key)
        last = CurvePoint(record["tokens"] / record["budget"], record["tokens"], entry.quality_key)
        for point in (*entry.curve, last):
            if cells := quality_cells(base, records.scores(point.key)):
                yield {
                    "plan_id": entry.plan.plan_id,
                    "origin": entry.origin,
                    "share": point.share,
                    "tokens": point.tokens,
                    **cells,
                }


def baseline_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of baselines.csv: each healed baseline with each healed candidate of the same attention budget.

    The errors of ratio and gain are paired over the items.
    """
    guided = [entry for entry in state.healed if entry.origin in CANDIDATE_ORIGINS]
    others = [entry for entry in state.healed if entry.origin not in CANDIDATE_ORIGINS]
    for other, candidate in product(others, guided):
        if _budget(other.plan) != _budget(candidate.plan):
            continue
        of_other, of_candidate = (records.scores(entry.quality_key) for entry in (other, candidate))
        if of_other is None or of_candidate is None:
            continue
        ratio, ratio_stderr = retained(of_candidate, of_other)
        yield {
            "plan_id": other.plan.plan_id,
            **other.plan.to_dict(),
            "origin": other.origin,
            "candidate_id": candidate.plan.plan_id,
            "candidate": str(candidate.plan),
            "quality_ratio": ratio,
            "quality_ratio_stderr": ratio_stderr,
            **_nll_gain(of_candidate, of_other),
        }


def branch_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of branches.csv: the text's loss with both branches of linear_window layers, and with one."""
    for entry in state.branches:
        record, plan = records.result(entry.key), entry.finalist.plan
        for row in [] if record is None else record["branches"]:
            about = {"plan_id": plan.plan_id, "origin": entry.finalist.origin, "window": plan.window}
            yield {**about, "branch_zeroed": row["zeroed"], **{name: row[name] for name in _BRANCH_VALUES}}


_BRANCH_VALUES = ("nll", "nll_loss", "nll_loss_stderr", "n_items")


def _budget(plan: Plan) -> tuple[str, int | None, int]:
    """Returns what makes two plans of equal budget: the layers of each treatment, the window, and its sinks."""
    return "".join(sorted(str(plan))), plan.window, plan.sinks


def _nll_gain(candidate: Scores, other: Scores) -> dict[str, float | None]:
    """Returns by how much the candidate's NLL on the text lies below the other's; empty if no text was measured."""
    if "nll" not in measured_scores(other):
        return {}
    drop = mean_drop(candidate, other, "nll", intervals=False)
    return {"nll_gain": -drop.drop, "nll_gain_stderr": drop.drop_stderr}
