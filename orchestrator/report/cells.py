"""Tables of text for the page, and how its cells read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.report.front import shown


@dataclass(frozen=True)
class Table:
    """A table of text for the template; the first cell of a row is its heading."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    text_columns: frozenset[int] = frozenset({0})
    """Columns aligned as text; the others are numbers."""
    code_columns: frozenset[int] = frozenset()
    strip_columns: frozenset[int] = frozenset()
    """Columns of plans that are drawn as strips of coloured letters."""


def with_stderr(value: float, stderr: float, sign: str = "") -> str:
    """A value and its standard error to two digits of the latter."""
    if pd.isna(stderr) or not stderr > 0:
        return shown(value, f"{sign},.5g")
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return shown(value, f"{sign},.{decimals}f", f" ± {stderr:,.{decimals}f}")


def text_of(value: Any) -> str:
    """Any value for a reader: lists with commas, five digits of a float, a dash for missing."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if value is None or pd.isna(value):
        return "-"
    return f"{value:,.5g}" if isinstance(value, float) else str(value)
