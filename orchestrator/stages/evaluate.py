"""Runs stage `evaluate`: it judges the untouched parent by everything that finalists are judged by.

If the recipe names affine layers, it also fits the map of each layer, which all later stages load.
"""

from __future__ import annotations

from typing import Any

from layerboost.evaluation.scores import QualityError, quality
from orchestrator.recipe.errors import InputError
from orchestrator.run.context import RunContext
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import SCORES
from orchestrator.run.records import scores_of
from tasks.evaluation import EvaluationUnit, base_unit, maps_unit


def units(run: RunContext) -> None:
    """Lists the unit of the base and that of the maps, and puts the base's key into the run's state."""
    base, *_ = run.list_scores("evaluate", run.inputs.full_spec, _units(run)).units
    run.state.base_key = base.key


def _units(run: RunContext) -> dict[EvaluationUnit, dict[str, Any]]:
    """Returns the units with their names, the base's first."""
    found = {base_unit(): {"model": "base"}}
    if run.inputs.maps_spec is not None:
        found[maps_unit(run.inputs.maps_spec, run.maps_file)] = {"maps": "layers"}
    return found


def _forget_lost_maps(run: RunContext) -> None:
    """Removes the record of maps whose file is gone, so that they are fitted again."""
    if run.inputs.maps_spec is not None and not run.folder.exists(run.maps_name):
        run.folder.remove(f"records/{SCORES.folder}/{unit_key(run.inputs.maps())}.json")


def evaluate(run: RunContext) -> bool:
    """Judges the base; returns whether the next stage can follow.

    Raises:
        InputError: The tasks give no quality to compare plans by.
    """
    _forget_lost_maps(run)
    units(run)
    done = run.evaluate("evaluate", run.inputs.full_spec, _units(run))
    if (base := scores_of(run.folder, run.state.base_key)) is not None:
        try:
            quality(base)
        except QualityError as error:  # fail now, before hours of work whose results the search could not rank
            raise InputError("quality.tasks", ", ".join(run.inputs.recipe.quality.tasks), str(error)) from None
    return done
