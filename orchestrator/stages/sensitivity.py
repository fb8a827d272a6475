"""Stage `sensitivity`: every layer ablated alone, one unit for each layer and treatment."""

from __future__ import annotations

from typing import Any

from layerboost.plan import Treatment
from orchestrator.context import RunContext
from orchestrator.identity import RunInputs
from orchestrator.run_folder import unit_key
from tasks.ablation import EvaluationUnit, ablation_unit, cosine_unit


def sensitivity(run: RunContext) -> bool:
    """Judges every variant. Returns whether the next stage can follow: the search needs every layer's drop."""
    units, spec = sensitivity_units(run.inputs), run.inputs.ablation_spec
    run.state.sensitivity = [{**name, "key": unit_key(run.inputs.scores(unit, spec))} for unit, name in units.items()]
    return run.evaluate("sensitivity", spec, units)


def sensitivity_units(inputs: RunInputs) -> dict[EvaluationUnit, dict[str, Any]]:
    """The units and what they are called; the cosine score takes one pass of the parent for all layers."""
    recipe = inputs.recipe
    if recipe.sensitivity.score == "cosine":
        return {cosine_unit(): {"layer": None, "treatment": Treatment.NONE.value}}
    return {
        ablation_unit(inputs.n_layers, layer, Treatment(treatment), recipe.search.window): {
            "layer": layer,
            "treatment": treatment,
        }
        for treatment in recipe.sensitivity.treatments
        for layer in range(inputs.n_layers)
    }
