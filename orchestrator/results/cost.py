"""What each stage took: units, worker seconds, healing tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd

from orchestrator.results.reading import RecordReader
from orchestrator.run.kinds import SWEEP
from orchestrator.run.state import RunState


def cost_table(records: RecordReader, state: RunState) -> pd.DataFrame:
    """What each stage took: units, worker seconds, healing tokens."""
    keys: dict[str, Sequence[str | None]] = {
        "evaluate": [state.base_key],
        "sensitivity": [unit.key for unit in state.sensitivity],
        "halving": [unit.key for unit in state.halving],
        "heal": [unit.key for unit in state.healed],
        "curve": [unit.key for unit in state.baselines]
        + [unit.quality_key for unit in state.halving]
        + [point.key for unit in state.healed for point in unit.curve],
        "measure": [unit.quality_key for unit in state.finalists] + [unit.key for unit in state.branches],
        "throughput": [unit.key for unit in (*state.throughput, *state.lengths)]
        + [unit["key"] for unit in (state.speed or {"measured": []})["measured"]],
    }
    found = [(stage, records.spent(stage, [key for key in of_stage if key])) for stage, of_stage in keys.items()]
    found += [(stage, records.spent(stage)) for stage in ("search", "refine", "sample")]
    found.append(("sensitivity", records.spent(SWEEP)))
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"units": 0, "worker_s": 0.0, "tokens": 0})
    for stage, units in found:
        for spent in units:
            totals[stage]["units"] += 1
            totals[stage]["worker_s"] += spent.duration_s
            totals[stage]["tokens"] += spent.tokens
    order = (
        "evaluate",
        "sensitivity",
        "search",
        "refine",
        "sample",
        "halving",
        "heal",
        "curve",
        "measure",
        "throughput",
    )
    return pd.DataFrame(
        [
            {
                "stage": stage,
                "units": int(totals[stage]["units"]),
                "worker seconds": round(totals[stage]["worker_s"], 1),
                "healing tokens": int(totals[stage]["tokens"]) or None,
            }
            for stage in order
            if stage in totals
        ]
    )
