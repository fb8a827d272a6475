"""The stages of a run, and the kinds of records that they make: each kind is filed in one folder under `records/`."""

from __future__ import annotations

from dataclasses import dataclass

STAGE_NAMES = ("evaluate", "sensitivity", "search", "heal", "report")
"""The stages that `--until` takes, in order."""

SENSITIVITY = "sensitivity"

SPEED = "speed"
"""What progress and failures call the timings that models are fitted to."""

REFINE = "refine"

SAMPLE = "sample"
"""The stage that has the parent write documents; its records say which are there, and of how many tokens."""

HALVING = "halving"

HALVING_SCORES = "halving scores"
"""What progress and failures call the judging of what a rung of halving has healed."""

CURVE = "curve"
"""The stage that judges plans at shares of their healing budget."""

THROUGHPUT, LENGTHS = "throughput", "lengths"

SWEEP = "sweep"
"""What progress calls the records that hold what plans say to shares of the items."""

TRIALS = "search-trials"
"""What progress calls the record of which plans were proposed, and by which thresholds where there were some."""

CALIBRATION = "calibration"

PARTS_OF_STAGES = (
    *("evaluate", SENSITIVITY, SPEED, "search", REFINE, SAMPLE, HALVING, "heal", CURVE),
    *("measure", THROUGHPUT, LENGTHS),
)
"""The stages as progress, the estimate and the cost table count their units, in the order of a run.

The `search`, `heal` and `report` of STAGE_NAMES have several of them: `report` has the last three.
"""


@dataclass(frozen=True)
class Kind:
    """A kind of records.

    Attributes:
        folder: the folder under `records/` that they are filed in, whichever stage makes them.
        made_by: the stages that make them, as progress calls these; the folder's own name if empty.
        earlier: the folders that earlier versions filed them in. Nothing is written there any more.
    """

    folder: str
    made_by: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


_JUDGING = ("evaluate", SENSITIVITY, "search", REFINE, CURVE, "measure")

SCORES = Kind("scores", (*_JUDGING, HALVING_SCORES), earlier=_JUDGING)
"""Scores of one model by one quality; those that are there serve whichever stage asks."""

SHARES = Kind(SWEEP)
"""What the plans of one treatment say to a share of the items, from which their scores are made; and item counts."""

TIMINGS = Kind(THROUGHPUT, (SPEED, THROUGHPUT, LENGTHS))

HEALINGS = Kind("heal")

RUNGS = Kind(HALVING)
"""Healings of one plan in one rung; they leave no checkpoint, so that they are no HEALINGS."""

DOCUMENTS = Kind(SAMPLE)

FOUND_TRIALS = Kind(TRIALS)

COSTS = Kind(CALIBRATION)
"""The record that holds `Costs.to_dict()`."""

KINDS = {kind.folder: kind for kind in (SCORES, SHARES, TIMINGS, HEALINGS, RUNGS, DOCUMENTS, FOUND_TRIALS, COSTS)}
"""Every kind by its folder."""

_MADE_BY = {stage: kind for kind in KINDS.values() for stage in (kind.made_by or (kind.folder,))}


def kind_made_by(stage: str) -> Kind:
    """The kind of records that a stage makes.

    Raises:
        ValueError: no stage is called so.
    """
    if stage not in _MADE_BY:
        raise ValueError(f"stage: {stage!r} makes no kind of records; name one of {', '.join(sorted(_MADE_BY))}")
    return _MADE_BY[stage]
