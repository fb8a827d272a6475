"""Runs the end of stage `search`: it improves the plans to heal at the same speed, since layers are not independent."""

from __future__ import annotations

from typing import Any

from layerboost.evaluation.scores import QualitySpec, Scores
from layerboost.plan import Plan, Treatment
from layerboost.search.refinement import Refiner, make_refiner
from layerboost.sensitivity.drops import mean_drop
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Trial
from orchestrator.run.kinds import REFINE, SCORES
from orchestrator.run.records import time_and_worker
from orchestrator.run.state import REFINED
from orchestrator.run.units import StageUnits, Unit
from orchestrator.stages.candidates import candidates
from tasks.pool.finished import Finished
from tasks.sweep import PLANS_OF_A_UNIT, PlansUnit, SweepWork, plans_units, sweep_units


def refine(run: RunContext) -> list[Trial]:
    """Improves the plans that would be healed, and returns the improved ones as points of the search.

    Plans are compared by the chosen score, over the items on which the single layers were scored.
    """
    if run.inputs.recipe.search.refine is None:
        return []
    rounds = _Rounds(run, candidates(run))
    todo = rounds.next_units()
    workers = run.workers() if todo else None
    run.begin(rounds.list_units(), workers=workers.n_workers if workers else 1)
    if workers:
        failures = sweep_units(
            todo,
            run.source,
            rounds.spec,
            workers,
            on_result=rounds.record,
            more_units=rounds.more_units,
            n_workers=run.n_workers,
            watch=run.watch(REFINE, _name, n_workers=workers.n_workers, of_each=PLANS_OF_A_UNIT),
        )
        for failure in failures:
            run.failed(REFINE, _name(failure.unit), failure.error)
    for refiner in rounds.refiners:
        plan, drop = refiner.best
        run.progress.note("refined", start=refiner.start, plan=plan, drop=f"{drop:.4f}")
    rounds.list_units()
    run.progress.end_stage()
    return rounds.improved()


def refine_units(run: RunContext, *, known: bool) -> list[Trial]:
    """Lists the plans that refinement has asked for by now; the rest of its budget is open.

    Args:
        run: The run.
        known: Whether the searched plans, with which refinement begins, are known.

    Returns:
        The points that `refine` returns, if all of its plans are recorded; else an empty list.
    """
    settings = run.inputs.recipe.search.refine
    if settings is None:
        return []
    if not known:
        run.list_units(REFINE, [], n_open=settings.plans)
        return []
    rounds = _Rounds(run, candidates(run))
    rounds.next_units()
    return rounds.improved() if rounds.list_units().is_complete else []


def _name(unit: SweepWork) -> dict[str, Any]:
    assert isinstance(unit, PlansUnit)
    return {"plans": " ".join(map(str, unit.plans))}


class _Rounds:
    """Holds the rounds of all refiners, which are replayed from the records."""

    def __init__(self, run: RunContext, starts: list[Plan]):
        self._run, settings = run, run.inputs.recipe.search.refine
        assert settings is not None
        self.spec = run.inputs.sweep_sources[0].spec
        self._score = run.inputs.recipe.sensitivity.score
        costs = cost_matrix(run.folder, run.state)
        each = max(1, settings.plans // max(1, len(starts)))
        pinned = run.inputs.plan_space.pinned
        self.refiners: list[Refiner] = [
            make_refiner(settings.method, start, costs, each, pinned=pinned) for start in starts
        ]
        self._base = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
        self._handed_out: set[Plan] = set()
        self._judged: set[Plan] = set()
        self._asked: dict[tuple[Plan, QualitySpec], None] = {}

    def list_units(self) -> StageUnits:
        """Lists the plans that the refiners have asked for so far."""
        identify = self._run.inputs.plan_scores
        units = [Unit(SCORES, (identify(plan, spec),), {"plan": str(plan)}, plan) for plan, spec in self._asked]
        n_open = 0
        for refiner in self.refiners:
            if pending := refiner.propose():
                n_open += refiner.max_plans - refiner.n_evaluated - len(pending)
        return self._run.list_units(REFINE, units, n_open=n_open)

    def improved(self) -> list[Trial]:
        """Returns the plans that are better than their starting plans, as points of the search."""
        found = dict.fromkeys(refiner.best[0] for refiner in self.refiners if refiner.best[0] != refiner.start)
        return [Trial(plan, REFINED) for plan in found]

    def more_units(self) -> list[PlansUnit]:
        """Returns the next units while the stage runs, and updates the expected total."""
        units = self.next_units()
        self._run.progress.set_total(self.list_units().n_expected)
        return units

    def next_units(self) -> list[PlansUnit]:
        """Replays the records until a refiner asks for plans that are not recorded, and returns those as units."""
        while True:
            proposed = {refiner: refiner.propose() for refiner in self.refiners}
            wanted = list(dict.fromkeys(plan for plans in proposed.values() for plan in plans))
            if not wanted:
                return self._finish()
            self._asked |= dict.fromkeys((plan, self.spec) for plan in wanted)
            # A plan that was handed out and is not recorded has failed, so it is not tried again.
            missing = [plan for plan in wanted if self._drop(plan) is None and plan not in self._handed_out]
            if missing:
                self._handed_out |= set(missing)
                return plans_units(self.spec, missing)
            for refiner, plans in proposed.items():
                if plans:
                    drops = {plan: drop for plan in plans if (drop := self._drop(plan)) is not None}
                    refiner.observe(drops)

    def _finish(self) -> list[PlansUnit]:
        """Returns the units that judge the best plans as the search judges plans."""
        spec, recorded = self._run.inputs.search_quality_spec, self._run.recorded
        found = dict.fromkeys(refiner.best[0] for refiner in self.refiners)
        identify = self._run.inputs.plan_scores
        self._asked |= dict.fromkeys((plan, spec) for plan in found)
        missing = [plan for plan in found if recorded(identify(plan, spec)) is None and plan not in self._judged]
        self._judged |= set(missing)
        return plans_units(spec, missing)

    def _drop(self, plan: Plan) -> float | None:
        """Returns a plan's loss by the chosen score; None if it is not recorded."""
        identify, recorded = self._run.inputs.plan_scores, self._run.recorded
        base, found = recorded(identify(self._base, self.spec)), recorded(identify(plan, self.spec))
        if base is None or found is None:
            return None
        return mean_drop(
            Scores.from_dict(base["scores"]), Scores.from_dict(found["scores"]), self._score, intervals=False
        ).drop

    def record(self, done: Finished[SweepWork, dict[str, Any]]) -> None:
        """Records the scores of each plan of a unit."""
        unit = done.unit
        assert isinstance(unit, PlansUnit)
        each_s = done.seconds / len(unit.plans)
        for plan, scores in zip(unit.plans, done.result["scores"], strict=True):
            result = {"scores": scores, **time_and_worker(done, each_s)}
            self._run.record(REFINE, self._run.inputs.plan_scores(plan, unit.spec), result)
            drop = self._drop(plan)
            shown = {} if drop is None or unit.spec != self.spec else {"drop": f"{drop:.4f}"}
            self._run.progress.finish_unit(each_s, plan=plan, **shown)
