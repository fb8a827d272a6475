"""Defines the tables of text on the page and formats their cells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.report.front import shown


@dataclass(frozen=True)
class Table:
    """Holds a table of text for the template; the first cell of each row is the row's heading."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    text_columns: frozenset[int] = frozenset({0})
    """Indices of the columns that are aligned as text; the others hold numbers."""
    code_columns: frozenset[int] = frozenset()
    strip_columns: frozenset[int] = frozenset()
    """Indices of the columns that hold plans, drawn as strips of coloured letters."""


def with_stderr(value: float, stderr: float, sign: str = "") -> str:
    """Formats a value with its standard error, both rounded to two significant digits of the error."""
    if pd.isna(stderr) or not stderr > 0:
        return shown(value, f"{sign},.5g")
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return shown(value, f"{sign},.{decimals}f", f" ± {stderr:,.{decimals}f}")


def window_text(row: pd.Series) -> str:
    """Returns the window of a row's plan, with the sinks in it, such as `64 (4 sinks)`."""
    sinks = "" if pd.isna(row["sinks"]) else f" ({row['sinks']} sink{'s' if row['sinks'] > 1 else ''})"
    return shown(row["window"], "d", sinks)


def text_of(value: Any) -> str:
    """Formats any value for a reader: lists are joined by commas, floats get five digits, missing is a dash."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if value is None or pd.isna(value):
        return "-"
    return f"{value:,.5g}" if isinstance(value, float) else str(value)
