"""Says which measured plan to serve under the recipe's constraints, or which constraint to loosen."""

from __future__ import annotations

import pandas as pd

from layerboost.search.baselines import CONTROL
from orchestrator.recipe.constraints import Bound, ConstraintsSection
from orchestrator.report.front import Condition, conditions, headline, under

_QUALITIES = ("quality", "quality_retained")


def verdict(pareto: pd.DataFrame, constraints: ConstraintsSection) -> list[str]:
    """Writes one sentence per serving condition: the best plan under the constraints, or which of them to loosen.

    Args:
        pareto: Table of pareto.csv with its column `feasible`.
        constraints: Constraints of the recipe; without any, the result is empty.
    """
    if not constraints.bounds():
        return []
    return [_sentence(_plans(pareto, condition), constraints, str(condition)) for condition in conditions(pareto)]


def best_rows(pareto: pd.DataFrame, constraints: ConstraintsSection) -> list[int]:
    """Returns the index labels of the best rows under the constraints, at most one for each serving condition."""
    if not constraints.bounds():
        return []
    found = [best_row(_plans(pareto, condition), constraints) for condition in conditions(pareto)]
    return [row.name for row in found if row is not None]  # type: ignore[misc]


def _plans(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """Returns the rows of a serving condition, without the control, which is no plan to serve."""
    rows = under(pareto, condition)
    return rows[rows["origin"] != CONTROL]


def _sentence(rows: pd.DataFrame, constraints: ConstraintsSection, condition: str) -> str:
    held = ", ".join(map(str, constraints.bounds()))
    if constraints.confidence > 0.5:
        held += f" with {constraints.confidence:.3g} confidence"
    if (best := best_row(rows, constraints)) is not None:
        state = "the untouched base" if best["origin"] == "base" else f"{best['plan']} ({best['plan_id']})"
        if best["flags"] is not None and pd.notna(best["flags"]):
            state += f", which is flagged ({best['flags']})"
        return f"Best under {held}: {state}, {headline(best)}.{_how_sure(best, constraints)}"
    said = f"No plan holds {held} ({condition})."
    if options := loosenings(rows, constraints):
        bound, row = options[0]
        return f"{said} Loosen {bound.name} {_to(bound, row)}: {row['plan']} ({row['plan_id']}) holds all else."
    if (nearest := nearest_row(rows, constraints)) is None:
        return f"{said} Nothing was measured successfully."
    row, missed = nearest
    wanted = " and ".join(f"{bound.name} {_to(bound, row)}" for bound in missed)
    return f"{said} No single one stands in the way; {row['plan']} ({row['plan_id']}) needs {wanted}."


def _how_sure(row: pd.Series, constraints: ConstraintsSection) -> str:
    """Says with what probability a row's true values hold the bounds; empty where no value has an error."""
    known = [(bound, p) for bound in constraints.bounds() if (p := bound.probability(row)) is not None]
    if not known:
        return ""
    return f" It holds {' and '.join(f'{bound.name} with a probability of {_percent(p)}' for bound, p in known)}."


def _percent(probability: float) -> str:
    if probability > 0.99:
        return "more than 99 %"
    return "less than 1 %" if probability < 0.01 else f"{100 * probability:.0f} %"


def _to(bound: Bound, row: pd.Series) -> str:
    return "(unpin it)" if bound.sign == 0 else f"to {bound.reached(row):.4g}"


def feasible(pareto: pd.DataFrame, constraints: ConstraintsSection) -> pd.Series:
    """Returns whether each row of pareto.csv holds all constraints; missing for failed rows or without constraints."""
    bounds = constraints.bounds()
    held = [
        all(bound.holds(row) for bound in bounds) if bounds and row["status"] == "ok" else None
        for _, row in pareto.iterrows()
    ]
    return pd.Series(held, index=pareto.index, dtype="boolean")


def best_row(rows: pd.DataFrame, constraints: ConstraintsSection) -> pd.Series | None:
    """Chooses the row of one serving condition to serve, among those that hold all constraints.

    It is the fastest row if a constraint bounds quality, else the row with the best quality; None if no successful row
    holds all constraints.
    """
    allowed = rows[rows["feasible"].fillna(False).astype(bool)]
    if allowed.empty:
        return None
    speed = "output_throughput_tok_per_s"
    order = [speed, "quality"] if any(name in constraints.at_least for name in _QUALITIES) else ["quality", speed]
    return allowed.sort_values([*order, "plan_id"], ascending=[False, False, True], kind="stable").iloc[0]


def loosenings(rows: pd.DataFrame, constraints: ConstraintsSection) -> list[tuple[Bound, pd.Series]]:
    """Returns the constraints that are each the only obstacle to some row, with the row that would become feasible.

    The row is the one that misses the bound by least. The bound with the smallest relative shortfall comes first.
    """
    bounds, found = constraints.bounds(), []
    ok = rows[rows["status"] == "ok"]
    for bound in bounds:
        others = [row for _, row in ok.iterrows() if all(other.holds(row) for other in bounds if other is not bound)]
        if others:
            found.append((bound, min(others, key=lambda row: (bound.shortfall(row), row["plan_id"]))))
    return sorted(found, key=lambda item: item[0].shortfall(item[1]))


def nearest_row(rows: pd.DataFrame, constraints: ConstraintsSection) -> tuple[pd.Series, list[Bound]] | None:
    """Returns the row with the smallest total shortfall and the bounds it misses; None without a successful row."""
    bounds = constraints.bounds()
    ok = [row for _, row in rows[rows["status"] == "ok"].iterrows()]
    if not ok:
        return None
    row = min(ok, key=lambda row: (sum(bound.shortfall(row) for bound in bounds), row["plan_id"]))
    return row, [bound for bound in bounds if not bound.holds(row)]
