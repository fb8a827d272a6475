"""The kinds of records, each a folder under `records/`."""

from __future__ import annotations

STAGE_NAMES = ("evaluate", "sensitivity", "search", "heal", "report")
"""The stages that `--until` takes, in order."""

SCORE_STAGES = ("evaluate", "sensitivity", "search", "refine", "curve", "measure")
"""Stages whose records are scores: one that is there serves whichever stage asks."""

SWEEP = "sweep"
"""Stage of the records that hold what plans say to shares of the items, from which their scores are made."""

LENGTHS, HALVING = "lengths", "halving"

CALIBRATION = "calibration"
"""Stage of the record that holds `Costs.to_dict()`."""

TRIALS = "search-trials"
"""Stage of the record that holds which plans were proposed, and by which thresholds where there were some."""

REFINE = "refine"

CURVE = "curve"
"""Stage of the records that hold scores at shares of the budget."""

SAMPLE = "sample"
"""Stage of the records that say which documents are there, and of how many tokens."""

SPEED = "speed"
"""What progress and failures call the timings that models are fitted to."""

THROUGHPUT = "throughput"
"""Stage of the records that hold timings."""

SENSITIVITY = "sensitivity"
