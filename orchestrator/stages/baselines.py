"""Makes the plans that stage `heal` compares its candidates with.

They come from other rules, and are healed on the same tokens by the same spec.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from layerboost.plan import Plan, Treatment
from layerboost.search.baselines import CONTROL, baseline_plans, is_of_same_budget, n_baseline_plans
from orchestrator.run.context import RunContext
from tasks.evaluation import cosine_unit

COSINE = "cosine"


def baselines(run: RunContext, candidates: Sequence[Plan]) -> dict[Plan, str]:
    """Returns the recipe's baselines with their names; rules of the same attention budget give one for each candidate.

    A plan is left out if it is a candidate itself, or if an earlier baseline already gave it. No rule but that of the
    control gives the untouched parent.
    """
    healing, search = run.inputs.recipe.healing, run.inputs.recipe.search
    names = list(healing.baselines)
    cosine = _cosine(run) if COSINE in names and candidates else None
    if cosine is None:
        names = [name for name in names if name != COSINE]
    found: dict[Plan, str] = {}
    for name in names:
        for budget in candidates if is_of_same_budget(name) else (None,):
            plans = baseline_plans(
                name,
                run.inputs.n_layers,
                middle=Treatment(search.middle),
                window=search.window,
                sinks=search.sinks,
                budget=budget,
                cosine=cosine,
                seed=healing.seed,
            )
            for origin, plan in plans.items():
                if plan not in candidates and plan.is_untouched == (name == CONTROL):
                    found.setdefault(plan, origin)
    return found


def n_open_baselines(run: RunContext, candidates: Sequence[Plan] | None) -> int:
    """Counts the baselines that are not known yet, because the candidates or the cosine distances are not."""
    healing = run.inputs.recipe.healing
    names = [name for name in healing.baselines if is_of_same_budget(name)]
    if candidates is None:
        return healing.candidates * sum(map(n_baseline_plans, names))
    return len(candidates) if COSINE in names and candidates and _cosine(run) is None else 0


def _cosine(run: RunContext) -> list[float] | None:
    """Returns the cosine distance of each layer, and measures it if the sweep did not; None if that failed.

    Ahead of a run nothing is measured: the result is None unless the distances are recorded.
    """
    unit, spec = cosine_unit(), run.inputs.text_spec
    identity = run.inputs.scores(unit, spec)
    if run.recorded(identity) is None and not run.is_ahead:
        run.evaluate("sensitivity", spec, {unit: {"score": COSINE}}, adds=True)
    recorded = run.recorded(identity)
    return None if recorded is None else [statistics.fmean(of_layer) for of_layer in recorded["cosine"]]
