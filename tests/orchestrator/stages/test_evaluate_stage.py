"""Tests that the stage that judges the parent refuses tasks by which plans cannot be compared."""

from __future__ import annotations

import pytest

from layerboost.evaluation.scores import MetricScore, Scores
from orchestrator.recipe.errors import InputError
from orchestrator.stages.evaluate import evaluate
from tasks.evaluation import base_unit
from tests.orchestrator.stages.test_healing_stage import context


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_tasks_that_are_better_when_lower_end_the_run_before_its_sweep(inputs, higher_is_better):
    run = context(inputs)
    scores = Scores([MetricScore("stereotypes", "likelihood_diff", 0.4, None, higher_is_better, primary=True)])
    run.record("evaluate", run.inputs.scores(base_unit(), run.inputs.full_spec), {"scores": scores.to_dict()})
    if higher_is_better:
        assert evaluate(run)
    else:
        with pytest.raises(InputError, match=r"quality.tasks: .*better when lower"):
            evaluate(run)
