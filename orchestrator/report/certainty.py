"""Says how sure a run is of its ranking of layers, in four tables and in sentences that sum them up.

The cells follow `orchestrator.report.tables`: a missing value is an empty cell, floats are unrounded, and the order of
rows does not depend on the order in which they came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from layerboost.evaluation.scores import SCORES
from layerboost.plan import TREATMENTS, Plan, Treatment
from orchestrator.report.tables import Row, candidate_order, checked_rows, frame, treatment_rank

RANKING_COLUMNS = {
    "treatment": "str",  # none | window | linear_window
    "score": "str",  # benchmark | margin | nll | kl | cosine
    "source": "str",  # a task, a text, or `mean`
    "context_tokens": "Int64",  # empty where each item has its own length
    "chosen": "boolean",  # the score that the plans are made from
    "n_items": "Int64",
    "split_half_spearman": "float64",  # correlation between the rankings from two halves of the items
    "split_half_low": "float64",
    "split_half_high": "float64",
    "items_until_stable": "Int64",  # empty where the ranking did not become stable
    "indistinct_pairs": "str",  # `3<5 7<2`: neighbours that cannot be told apart, the less sensitive layer first
    "ranking": "str",  # layers from least to most sensitive, separated by spaces
}
"""Columns of rankings.csv, in order. The table has one row for each ranking of the layers.

Rows are sorted by treatment, score (in the order of `SCORES`), source (`mean` first) and context_tokens.
"""

CORRELATION_COLUMNS = {
    "treatment": "str",
    "view_a": "str",  # the name of a ranking, such as `nll wiki.txt 128`
    "view_b": "str",
    "method": "str",  # spearman | kendall
    "correlation": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
}
"""Columns of rank_correlations.csv, in order. The table has one row for each unordered pair of views and method.

Rows are sorted by treatment, method (spearman first), view_a and view_b. Inside a pair view_a comes first; views are
compared by `view_order`.
"""

INTERACTION_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",  # tokens; empty where no layer needs one
    "origin": "str",  # base | search | the baseline's name
    "score": "str",
    "predicted_drop": "float64",  # the sum of the drops of its single layers
    "measured_drop": "float64",
    "measured_drop_stderr": "float64",
    "interaction": "float64",  # measured - predicted; positive where the layers need each other
    "interaction_stderr": "float64",
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of interactions.csv, in order. The table has one row for each plan and score.

Rows are sorted by base, baselines, search, then by plan_id, then by score.
"""

TIER_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "layer": "Int64",
    "treatment": "str",  # the treatment that the plan gives the layer
    "drop": "float64",  # the sensitivity that was compared with the thresholds
    "drop_ci_low": "float64",
    "drop_ci_high": "float64",
    "remove_below": "float64",
    "keep_above": "float64",
    "straddles": "str",  # the thresholds inside the layer's interval: empty, `remove_below`, `keep_above`, or both
}
"""Columns of tiers.csv, in order. The table has one row for each layer of each chosen candidate.

Rows are sorted by plan_id and layer.
"""

MIN_PLANS = 3
"""With fewer plans than this no correlation between predicted and measured drops is stated."""

_RANKING = re.compile(r"\d+( \d+)*")
_PAIRS = re.compile(r"\d+<\d+( \d+<\d+)*")
_STRADDLES = ("remove_below", "keep_above")


def rankings_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds rankings.csv from rows keyed by `RANKING_COLUMNS`; absent keys become empty cells.

    Raises:
        ValueError: a row has a key that is no column, lacks treatment, score or source, or has a `ranking` or
            `indistinct_pairs` that is not in the column's form.
    """
    checked = checked_rows(rows, RANKING_COLUMNS, required=("treatment", "score", "source"))
    for row in checked:
        for name, form, example in (("ranking", _RANKING, "3 5 0"), ("indistinct_pairs", _PAIRS, "3<5 7<2")):
            row[name] = row.get(name) or None
            if row[name] is not None and not form.fullmatch(str(row[name])):
                raise ValueError(f"row {row}: {name} '{row[name]}' cannot be read; write it like '{example}'")
    checked.sort(
        key=lambda row: (
            treatment_rank(row["treatment"]),
            _score_rank(row["score"]),
            row["source"] != "mean",
            row["source"],
            -1 if _is_empty(row.get("context_tokens")) else row["context_tokens"],
        )
    )
    return frame(checked, RANKING_COLUMNS)


def correlations_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds rank_correlations.csv from rows keyed by `CORRELATION_COLUMNS`; a pair's views may come in either order.

    Raises:
        ValueError: a row has a key that is no column, lacks treatment, a view or method, compares a view with
            itself, or repeats a pair.
    """
    checked = checked_rows(rows, CORRELATION_COLUMNS, required=("treatment", "view_a", "view_b", "method"))
    seen = set()
    for row in checked:
        if row["view_a"] == row["view_b"]:
            raise ValueError(f"row {row}: a view is compared with itself; give two views")
        row["view_a"], row["view_b"] = sorted((row["view_a"], row["view_b"]), key=view_order)
        pair = tuple(row[name] for name in ("treatment", "method", "view_a", "view_b"))
        if pair in seen:
            raise ValueError(f"row {row}: this pair of views is there already; give each pair once for each method")
        seen.add(pair)
    checked.sort(
        key=lambda row: (
            treatment_rank(row["treatment"]),
            row["treatment"],
            row["method"] != "spearman",
            row["method"],
            view_order(row["view_a"]),
            view_order(row["view_b"]),
        )
    )
    return frame(checked, CORRELATION_COLUMNS)


def interactions_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds interactions.csv from rows keyed by `INTERACTION_COLUMNS`; an absent `interaction` is computed.

    Raises:
        ValueError: a row has a key that is no column, or lacks plan_id, plan, origin or score.
    """
    checked = checked_rows(rows, INTERACTION_COLUMNS, required=("plan_id", "plan", "origin", "score"))
    checked.sort(key=lambda row: (*candidate_order(row), _score_rank(row["score"])))
    table = frame(checked, INTERACTION_COLUMNS)
    table["interaction"] = table["interaction"].fillna(table["measured_drop"] - table["predicted_drop"])
    return table


def tiers_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds tiers.csv from rows keyed by `TIER_COLUMNS`; `straddles` is `""` where no threshold is in the interval.

    Raises:
        ValueError: a row has a key that is no column, lacks plan_id, plan, layer, treatment or straddles, names
            another treatment than its plan gives the layer, or names an unknown threshold in `straddles`.
    """
    checked = checked_rows(rows, TIER_COLUMNS, required=("plan_id", "plan", "layer", "treatment", "straddles"))
    for row in checked:
        given = Plan.parse(row["plan"], window=1).treatments
        if not 0 <= row["layer"] < len(given) or given[row["layer"]].value != row["treatment"]:
            raise ValueError(f"row {row}: plan {row['plan']} does not give layer {row['layer']} '{row['treatment']}'")
        words = row["straddles"].split()
        if unknown := sorted(set(words) - set(_STRADDLES)):
            raise ValueError(f"row {row}: straddles '{unknown[0]}' is no threshold; use {', '.join(_STRADDLES)}")
        row["straddles"] = " ".join(name for name in _STRADDLES if name in words) or None
    return frame(sorted(checked, key=lambda row: (row["plan_id"], row["layer"])), TIER_COLUMNS)


def view_order(name: str) -> tuple[Any, ...]:
    """Returns a sort key for views: by score, then by name.

    Numbers in a name are compared by value, so that `nll a 128` comes before `nll a 2048`.
    """
    parts = re.split(r"(\d+)", name)
    return _score_rank(name.split(" ")[0]), [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def by_score(interactions: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Groups the rows by score, in the order of `SCORES`."""
    groups: list[Any] = list(interactions.groupby("score"))
    return sorted(groups, key=lambda group: _score_rank(group[0]))


def reading_sentences(stable: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields a sentence on how much of the text the sweep read, if it could end early."""
    if stable is None:
        return
    certain = ", ".join(f"{value:.2f} for {treatment}" for treatment, value in stable["reliability"].items())
    yield (
        f"The sweep read {stable['sequences']} of {stable['of']} sequences; "
        f"rankings by as many others would correlate with its own at about {certain}."
    )


def stability_sentences(rankings: pd.DataFrame) -> list[str]:
    """Returns one sentence for each ranking that the plans are made from.

    Where a treatment has a mean over its sources, only the mean gets a sentence.
    """
    chosen = rankings[rankings["chosen"].fillna(False).astype(bool)]
    sentences = []
    for treatment, rows in chosen.groupby("treatment", sort=False):
        mean = rows[rows["source"] == "mean"]
        for _, row in (mean if len(mean) else rows).iterrows():
            parts = [f"The plans take the order of layers for {treatment} from {row['score']} ({row['source']})"]
            if pd.notna(row["split_half_spearman"]):
                interval = ""
                if pd.notna(row["split_half_low"]) and pd.notna(row["split_half_high"]):
                    interval = f" ({row['split_half_low']:.2f} to {row['split_half_high']:.2f})"
                agreement = f"{row['split_half_spearman']:.2f}{interval}"
                parts.append(f"the orders by two halves of its items correlate at {agreement}")
            stable = row["items_until_stable"]
            parts.append("it is not yet stable" if pd.isna(stable) else f"it is stable from {int(stable)} items on")
            pairs = [] if pd.isna(row["indistinct_pairs"]) else row["indistinct_pairs"].split()
            told = f"{_counted(len(pairs), 'pair')} of neighbours cannot be told apart"
            parts.append(told if pairs else "all neighbours in it can be told apart")
            sentences.append("; ".join(parts) + ".")
    return sentences


def interaction_sentences(interactions: pd.DataFrame) -> list[str]:
    """Returns one sentence for each score, on how well the sum of the single layers' drops orders the plans.

    The base is left out, because both its drops are zero by definition.
    """
    known = interactions.dropna(subset=["predicted_drop", "measured_drop"])
    sentences = []
    for score, rows in by_score(known[known["origin"] != "base"]):
        if len(rows) < MIN_PLANS:
            sentences.append(f"{score}: {_counted(len(rows), 'plan')}, too few for a correlation.")
            continue
        spearman = rows["predicted_drop"].rank().corr(rows["measured_drop"].rank())
        agreement = "undefined, as all are equal" if pd.isna(spearman) else f"{spearman:.2f}"
        above = int((rows["interaction"] > 0).sum())
        sentences.append(
            f"{score}: the Spearman correlation between predicted and measured drop over {len(rows)} plans is "
            f"{agreement}; {above} of them {'loses' if above == 1 else 'lose'} more than predicted."
        )
    return sentences


def tier_sentences(tiers: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Returns, for each plan, its plan_id, the plan and a sentence on the layers whose tier is uncertain."""
    lines = []
    groups: list[Any] = list(tiers.groupby(["plan_id", "plan"], sort=False))
    for (plan_id, plan), rows in groups:
        layers: dict[str, list[int]] = {}
        for _, row in rows[rows["straddles"].notna()].iterrows():
            if others := _other_tiers(row):
                layers.setdefault(" or ".join(others), []).append(int(row["layer"]))
        parts = [f"{_listed(found)} could as well be {others}" for others, found in layers.items()]
        lines.append((plan_id, plan, "; ".join(parts) + "." if parts else "no layer's interval holds a threshold."))
    return lines


def _other_tiers(row: pd.Series) -> list[str]:
    """Returns the treatments that the layer would get elsewhere in its interval.

    Where both thresholds are equal there is no middle treatment.
    """
    present = [entry.name for entry in TREATMENTS if entry.is_middle and entry.letter in row["plan"]]
    middle = " or ".join(present) or "the middle treatment"
    removed = Treatment.AFFINE if Treatment.AFFINE.letter in row["plan"] else Treatment.NONE
    if row["remove_below"] == row["keep_above"]:
        tiers = [removed.value, Treatment.SOFTMAX.value]
    else:
        below, above = (name in row["straddles"].split() for name in _STRADDLES)
        tiers = [removed.value] * below + [middle] + [Treatment.SOFTMAX.value] * above
    own = middle if row["treatment"] in present else row["treatment"]
    return [tier for tier in tiers if tier != own]


def _listed(layers: list[int]) -> str:
    names = [str(layer) for layer in layers]
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(names[:-1])} and {names[-1]}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _score_rank(score: str) -> tuple[int, str]:
    names = SCORES.names()
    return (names.index(score) if score in names else len(names)), score


def _is_empty(value: Any) -> bool:
    return value is None or bool(pd.isna(value))
