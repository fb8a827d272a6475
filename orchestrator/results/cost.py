"""Sums up what each stage took: units, worker seconds, healing tokens."""

from __future__ import annotations

from typing import Any

import pandas as pd

from orchestrator.results.reading import RecordReader
from orchestrator.run.kinds import LENGTHS, PARTS_OF_STAGES, SPEED, THROUGHPUT
from orchestrator.run.state import RunState
from orchestrator.run.units import listed_keys

_COUNTED_WITH = {SPEED: THROUGHPUT, LENGTHS: THROUGHPUT}
"""Stages without a separate row: all timings share one row."""


def cost_table(records: RecordReader, state: RunState) -> pd.DataFrame:
    """Returns for each stage the number of its listed and recorded units, their worker seconds and healing tokens.

    Additional work that is no unit, such as making scores from shares, adds only its seconds.
    """
    rows: dict[str, dict[str, Any]] = {}
    counted: set[tuple[str, str]] = set()
    for stage in PARTS_OF_STAGES:
        name = _COUNTED_WITH.get(stage, stage)
        row = rows.setdefault(name, {"stage": name, "units": 0, "worker seconds": 0.0, "healing tokens": 0})
        for unit, spent in records.spent(listed_keys(state, stage)):
            known_as = unit.kind, unit.keys[0]
            if len(spent) < len(unit.keys) or known_as in counted:
                continue
            counted.add(known_as)
            row["units"] += not unit.is_beside
            row["worker seconds"] += sum(each.duration_s for each in spent)
            row["healing tokens"] += sum(each.tokens for each in spent)
    return pd.DataFrame(
        [
            {**row, "worker seconds": round(row["worker seconds"], 1), "healing tokens": row["healing tokens"] or None}
            for row in sorted(rows.values(), key=lambda row: PARTS_OF_STAGES.index(row["stage"]))
            if row["units"]
        ]
    )
