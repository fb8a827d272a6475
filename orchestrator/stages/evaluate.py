"""Runs stage `evaluate`: it judges the untouched parent by everything that finalists are judged by."""

from __future__ import annotations

from layerboost.evaluation.scores import QualityError, quality
from orchestrator.recipe.errors import InputError
from orchestrator.run.context import RunContext
from orchestrator.run.records import scores_of
from tasks.evaluation import base_unit

_UNITS = {base_unit(): {"model": "base"}}


def units(run: RunContext) -> None:
    """Lists the unit of the base, and puts its key into the run's state."""
    (base,) = run.list_scores("evaluate", run.inputs.full_spec, _UNITS).units
    run.state.base_key = base.key


def evaluate(run: RunContext) -> bool:
    """Judges the base; returns whether the next stage can follow.

    Raises:
        InputError: The tasks give no quality to compare plans by.
    """
    units(run)
    done = run.evaluate("evaluate", run.inputs.full_spec, _UNITS)
    if (base := scores_of(run.folder, run.state.base_key)) is not None:
        try:
            quality(base)
        except QualityError as error:  # fail now, before hours of work whose results the search could not rank
            raise InputError("quality.tasks", ", ".join(run.inputs.recipe.quality.tasks), str(error)) from None
    return done
