"""Defines the stages of a run and the kinds of records that they make; each kind has one folder under `records/`."""

from __future__ import annotations

from dataclasses import dataclass

STAGE_NAMES = ("evaluate", "sensitivity", "search", "heal", "report")
"""The stages that `--until` takes, in order."""

SENSITIVITY = "sensitivity"

SPEED = "speed"
"""Name in progress and failures of the timings to which speed models are fitted."""

RACE = "race"
"""Name in progress and failures of judging the plans on all items that lead on the first ones."""

REFINE = "refine"

SAMPLE = "sample"
"""Name of the stage in which the parent writes documents; its records list them with their numbers of tokens."""

HALVING = "halving"

HALVING_SCORES = "halving scores"
"""Name in progress and failures of judging the plans that a rung of halving has healed."""

CURVE = "curve"
"""Name of the stage that judges plans at shares of their healing budget."""

THROUGHPUT, LENGTHS = "throughput", "lengths"

SWEEP = "sweep"
"""Name in progress of the records that hold plans' answers for shares of the items."""

TRIALS = "search-trials"
"""Name in progress of the record that lists the proposed plans, with their thresholds if there were any."""

CALIBRATION = "calibration"

PARTS_OF_STAGES = (
    *("evaluate", SENSITIVITY, SPEED, "search", RACE, REFINE, SAMPLE, HALVING, "heal", CURVE),
    *("measure", THROUGHPUT, LENGTHS),
)
"""The stages for which progress, the estimate and the cost table count units, in the order of a run.

The `search`, `heal` and `report` of STAGE_NAMES consist of several of these; `report` consists of the last three.
"""


@dataclass(frozen=True)
class Kind:
    """Describes a kind of records.

    Attributes:
        folder: Folder under `records/` that holds them, whichever stage makes them.
        made_by: Names in progress of the stages that make them; if empty, the folder's own name.
        earlier: Folders in which earlier versions put them. Nothing is written there any more.
    """

    folder: str
    made_by: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


_JUDGING = ("evaluate", SENSITIVITY, "search", RACE, REFINE, CURVE, "measure")

SCORES = Kind("scores", (*_JUDGING, HALVING_SCORES), earlier=_JUDGING)
"""Scores of one model by one quality; every stage uses the recorded ones, whichever stage made them."""

SHARES = Kind(SWEEP)
"""Answers of one treatment's plans for a share of the items, which are joined to scores; and counts of items."""

TIMINGS = Kind(THROUGHPUT, (SPEED, THROUGHPUT, LENGTHS))

HEALINGS = Kind("heal")

RUNGS = Kind(HALVING)
"""Healings of one plan in one rung; they are separate from HEALINGS because they leave no checkpoint."""

DOCUMENTS = Kind(SAMPLE)

FOUND_TRIALS = Kind(TRIALS)

COSTS = Kind(CALIBRATION)
"""The record that holds `Costs.to_dict()`."""

KINDS = {kind.folder: kind for kind in (SCORES, SHARES, TIMINGS, HEALINGS, RUNGS, DOCUMENTS, FOUND_TRIALS, COSTS)}
"""All kinds by their folders."""

_MADE_BY = {stage: kind for kind in KINDS.values() for stage in (kind.made_by or (kind.folder,))}


def kind_made_by(stage: str) -> Kind:
    """Returns the kind of records that a stage makes.

    Raises:
        ValueError: No stage has this name.
    """
    if stage not in _MADE_BY:
        raise ValueError(f"stage: {stage!r} makes no kind of records; name one of {', '.join(sorted(_MADE_BY))}")
    return _MADE_BY[stage]
