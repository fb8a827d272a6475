"""Prints rows for people and for programs, as a plain table, JSON or CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO


def print_rows(rows: Sequence[Mapping[str, Any]], form: str | None = None, stream: TextIO | None = None) -> None:
    """Prints rows of equal keys.

    Args:
        rows: the rows, which all have the columns of the first.
        form: `json`, `csv` (both unrounded, missing values null or empty), or None for a table.
        stream: the stream to print to; None is stdout.
    """
    stream = stream if stream is not None else sys.stdout
    if form == "json":
        json.dump(list(rows), stream, indent=1)
        stream.write("\n")
        return
    if not rows:
        return
    columns = list(rows[0])
    if form == "csv":
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    stream.write(format_table(columns, [[row[column] for column in columns] for row in rows]))


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a fixed-width table: numbers have four digits and align right, columns without any value are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    cells = [[columns[i] for i in kept], *([_cell(row[i]) for i in kept] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(kept))]
    right = [all(row[i] is None or isinstance(row[i], int | float) for row in rows) for i in kept]
    lines = []
    for line in cells:
        padded = [cell.rjust(w) if is_right else cell.ljust(w) for cell, w, is_right in zip(line, widths, right)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """Formats a duration as `45 s`, `5 min 10 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
