"""Defines what a check finds: a row of the table that `layerboost doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.text_tables import format_table

OK, WARN, MISSING = "ok", "warn", "missing"


@dataclass(frozen=True)
class Finding:
    """Holds one row of the table. `remedy` is empty where nothing is wrong."""

    what: str
    found: str
    state: str = OK
    remedy: str = ""


def findings_table(findings: Sequence[Finding]) -> str:
    """Formats the rows as a table."""
    rows = [[f.what, f.found, f.state, f.remedy or None] for f in findings]
    return format_table(["what", "found", "state", "remedy"], rows)
