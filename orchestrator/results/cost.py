"""What each stage took: units, worker seconds, healing tokens."""

from __future__ import annotations

from collections import defaultdict

import pandas as pd

from orchestrator.run.folder import RunFolder
from orchestrator.run.kinds import SWEEP
from orchestrator.run.state import RunState


def cost_table(folder: RunFolder, state: RunState) -> pd.DataFrame:
    """What each stage took: units, worker seconds, healing tokens."""
    keys = {
        "evaluate": [state.base_key],
        "sensitivity": [unit["key"] for unit in state.sensitivity],
        "halving": [unit["key"] for unit in state.halving],
        "heal": [unit["key"] for unit in state.healed],
        "curve": [unit["key"] for unit in state.baselines]
        + [unit["quality_key"] for unit in state.halving]
        + [point["key"] for unit in state.healed for point in unit["curve"]],
        "measure": [unit["quality_key"] for unit in state.finalists] + [unit["key"] for unit in state.branches],
        "throughput": [
            unit["key"] for unit in (*state.throughput, *state.lengths, *(state.speed or {"measured": []})["measured"])
        ],
    }
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"units": 0, "worker_s": 0.0, "tokens": 0})
    found = [
        (stage, record.result)
        for stage, of_stage in keys.items()
        for record in folder.records(stage)
        if record.key in of_stage
    ]
    found += [(stage, record.result) for stage in ("search", "refine", "sample") for record in folder.records(stage)]
    found += [("sensitivity", record.result) for record in folder.records(SWEEP)]
    for stage, result in found:
        totals[stage]["units"] += 1
        totals[stage]["worker_s"] += result["duration_s"]
        totals[stage]["tokens"] += result["tokens"] if stage in ("halving", "heal") else 0
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
