"""Compares two runs of one recipe, which must agree wherever they ran."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

# These columns are timed or computed from timings, so they differ between runs.
TIMING_COLUMNS = [
    "output_throughput_tok_per_s",
    "output_throughput_stderr",
    "predicted_throughput_tok_per_s",
    "predicted_throughput_stderr",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "peak_memory_mib",
    "speedup",
    "on_front",
]
TABLES = (
    "sensitivity.csv",
    "candidates.csv",
    "pareto.csv",
    "healing_curves.csv",
    "healing_quality.csv",
    "branches.csv",
)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / name, dtype={"plan_id": str})


def assert_equal_results(out: Path, expected: Path, **tolerance: float) -> None:
    """All tables are there in both folders or in neither, and equal but for timings; exactly, without a tolerance."""
    for name in TABLES:
        assert (out / name).exists() == (expected / name).exists(), name
        if (out / name).exists():
            actual, wanted = (
                table(folder, name).drop(columns=TIMING_COLUMNS, errors="ignore") for folder in (out, expected)
            )
            pd.testing.assert_frame_equal(actual, wanted, **(tolerance or {"check_exact": True}))
