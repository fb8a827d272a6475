"""Runs the start of stage `heal`: it heals many plans on few tokens, and the most promising of them on more.

The healings of a rung write the parameters that they trained to `snapshots/<key>/`; they are deleted once judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerboost.evaluation.scores import Scores
from layerboost.healing.rungs import Rung, rungs, total_tokens
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan, Treatment
from orchestrator.run.context import RunContext
from orchestrator.run.entries import HalvingEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import HALVING, HALVING_SCORES, RUNGS, SCORES
from orchestrator.run.records import find_record
from orchestrator.run.units import StageUnits, Unit, recorded_seconds
from orchestrator.stages.candidates import most_promising
from orchestrator.stages.curve import snapshot_folder, snapshot_name, snapshot_unit, state_key
from orchestrator.stages.healing_jobs import CHECKPOINTS, healing_result, rung_job
from orchestrator.stages.objective import objective
from orchestrator.stages.sampled import sample_text
from tasks.healing.job import HealingJob
from tasks.healing.run import HealingResult
from tasks.pool.finished import Finished
from tasks.pool.watch import Watch


def halve(run: RunContext, plans: Sequence[Plan]) -> list[Plan]:
    """Heals plans rung by rung, and lists the outcome of each in the run's state.

    Args:
        run: The run.
        plans: Plans of the first rung; fewer than the recipe asks for if the search found no more.

    Returns:
        The plans to heal on the whole budget.
    """
    run.state.halving = []
    ladder, candidates = ladder_for(run, len(plans)), run.inputs.recipe.healing.candidates
    if not ladder:
        return list(plans)
    n_tokens = total_tokens(ladder, candidates, lambda share: _tokens_at(run, share))
    part = n_tokens / (len(plans) * _tokens_at(run, 1.0))
    run.progress.note(
        f"halving: {len(plans)} plans, {n_tokens:,} tokens in all, {part:.0%} of healing all fully",
        rungs=" ".join(f"{rung.n_plans}x{rung.share:.3g}" for rung in ladder) + f" {candidates}x1",
    )
    left, units = list(plans), _RungUnits(run, ladder)
    for number, rung in enumerate(ladder, start=1):
        spec = run.inputs.healing_spec_at(rung.share)
        _heal_rung(run, number, units.add(number, left), spec)
        _judge_rung(run, number, left, spec)
        units.add(number, left)  # lists the scores too, whose keys depend on the healings that are recorded now
        left = _survivors(run, ladder, number, left)
        run.save()
    return left


def halving_units(run: RunContext, plans: Sequence[Plan] | None) -> list[Plan] | None:
    """Lists the healings of the rungs whose plans are known by now; the healings of later rungs are open.

    Args:
        run: The run.
        plans: Plans of the first rung; None if they are not known yet.

    Returns:
        The plans to heal on the whole budget; None if the records do not determine them yet.
    """
    settings = run.inputs.recipe.healing.halving
    assert settings is not None
    run.state.halving = []
    ladder = ladder_for(run, settings.plans if plans is None else len(plans))
    units = _RungUnits(run, ladder)
    if plans is None:
        units.tell()
        return None
    left = list(plans)
    for number, rung in enumerate(ladder, start=1):
        units.add(number, left)
        spec = run.inputs.healing_spec_at(rung.share)
        if not all(_is_judged(run, plan, spec) for plan in left):
            return None
        left = _survivors(run, ladder, number, left)
    return left


def ladder_for(run: RunContext, n_plans: int) -> list[Rung]:
    """Returns the rungs for a number of plans; there are none if all plans can be healed on the whole budget."""
    healing, settings = run.inputs.recipe.healing, run.inputs.recipe.healing.halving
    assert settings is not None
    if n_plans <= healing.candidates:
        return []
    return rungs(n_plans, healing.candidates, settings.first, settings.rungs)


class _RungUnits:
    """Holds the healings of the rungs so far, and lists them as one stage."""

    def __init__(self, run: RunContext, ladder: Sequence[Rung]):
        self._run, self._ladder = run, ladder
        self._of_rung: dict[int, list[Unit]] = {}

    def add(self, number: int, plans: Sequence[Plan]) -> dict[Plan, bool]:
        """Lists the healings of a rung; returns which of its plans are to be healed."""
        spec = self._run.inputs.healing_spec_at(self._ladder[number - 1].share)
        self._of_rung[number] = [
            Unit(RUNGS, (self._run.inputs.healing(plan, spec),), {"plan": str(plan), "rung": number}, (plan, spec))
            for plan in plans
        ]
        todo = {unit.work[0] for unit in self.tell().todo if unit.name["rung"] == number}
        return {plan: plan in todo for plan in plans}

    def tell(self) -> StageUnits:
        """Lists all known healings; the scores of healed plans are additional work that is no unit."""
        run = self._run
        units = [unit for of_rung in self._of_rung.values() for unit in of_rung]
        beside = [
            Unit(SCORES, (_scores_identity(run, *unit.work),), unit.name)
            for unit in units
            if _is_healed(run, *unit.work)
        ]
        n_open = sum(rung.n_plans for number, rung in enumerate(self._ladder, 1) if number not in self._of_rung)
        return run.list_units(HALVING, units, n_open=n_open, beside=beside, look=self._took)

    def _took(self, units: Sequence[Unit]) -> list[float | None]:
        """Returns the seconds of healings whose plan is judged or waits for it; None means that a healing must run."""
        run = self._run
        is_done = [_is_judged(run, *unit.work) or _waits(run, *unit.work) for unit in units]
        seconds = recorded_seconds(run.folder, units)
        return [took if done else None for took, done in zip(seconds, is_done, strict=True)]


def _survivors(run: RunContext, ladder: Sequence[Rung], number: int, plans: Sequence[Plan]) -> list[Plan]:
    """Returns the plans that survive a rung by the records, and lists the outcome of each plan in the run's state."""
    rung, spec = ladder[number - 1], run.inputs.healing_spec_at(ladder[number - 1].share)
    n_left = ladder[number].n_plans if number < len(ladder) else run.inputs.recipe.healing.candidates
    trials = {trial.plan: trial for trial in reversed(run.state.trials)}
    entries = [
        HalvingEntry(plan, trials[plan].origin, number, rung.share, trials[plan].speedup, **_outcome(run, plan, spec))
        for plan in plans
    ]
    chosen = most_promising(run, entries, n_left)
    run.state.halving += [replace(entry, survived=index in chosen) for index, entry in enumerate(entries)]
    return [plans[index] for index in chosen]


def _tokens_at(run: RunContext, share: float) -> int:
    spec = run.inputs.healing_spec_at(share)
    return spec.steps * spec.tokens_per_step


def _heal_rung(run: RunContext, number: int, is_to_do: Mapping[Plan, bool], spec: HealingSpec) -> None:
    """Heals the plans that are neither judged nor wait for it; a failure is reported and the other plans continue."""
    from tasks.cluster import connection
    from tasks.cluster.resources import jobs_at_once
    from tasks.healing.rungs import heal_all

    origins = {trial.plan: trial.origin for trial in reversed(run.state.trials)}
    todo = [plan for plan, is_missing in is_to_do.items() if is_missing]
    identities = {plan: run.inputs.healing(plan, spec) for plan in todo}
    if todo and not sample_text(run):
        return
    jobs: dict[str, HealingJob] = {}
    if todo:
        workers = run.healing_workers(len(todo))
        keys = {plan: unit_key(identities[plan]) for plan in todo}
        jobs = {key: rung_job(run, plan, key, spec, workers) for plan, key in keys.items()}
    run.progress.start_stage(
        f"{HALVING} rung {number}",
        len(is_to_do),
        recorded=len(is_to_do) - len(todo),
        workers=min(len(jobs), jobs_at_once(next(iter(jobs.values())).workers, connection.resources())) if jobs else 1,
    )

    def on_result(done: Finished[HealingJob, HealingResult]) -> None:
        job = done.unit
        run.record(HALVING, identities[job.plan], healing_result(job, done.result, done.seconds))
        run.folder.remove(f"{CHECKPOINTS}/{job.name}")
        run.progress.finish_unit(done.seconds, plan=job.plan, loss=f"{done.result.final_loss:.4f}")

    watch: Watch[HealingJob] = run.watch(HALVING, lambda job: {"plan": str(job.plan), "rung": number})
    for failure in heal_all(list(jobs.values()), on_result=on_result, watch=watch):
        plan = failure.unit.plan
        run.failed(HALVING, {**plan.to_dict(), "origin": origins[plan], "rung": number}, failure.error)
    run.progress.end_stage()


def _judge_rung(run: RunContext, number: int, plans: Sequence[Plan], spec: HealingSpec) -> None:
    """Judges healed plans as the search judges plans, then deletes their snapshots."""
    healed = [plan for plan in plans if _is_judged(run, plan, spec) or _waits(run, plan, spec)]
    states = {plan: _state(run, plan, spec) for plan in healed}
    units = {plan: snapshot_unit(run, plan, *states[plan], spec) for plan in healed}
    names = {unit: {"plan": str(plan), "rung": number} for plan, unit in units.items()}
    keys = {units[plan]: state_key(*states[plan]) for plan in healed}
    if healed:
        run.evaluate(HALVING_SCORES, run.inputs.search_quality_spec, names, keys)
    for plan in healed:
        if _is_judged(run, plan, spec):
            run.folder.remove(snapshot_folder(states[plan][0]))


def _state(run: RunContext, plan: Plan, spec: HealingSpec) -> tuple[str, int]:
    """Returns the key of a recorded healing and its last step."""
    key = unit_key(run.inputs.healing(plan, spec))
    recorded = find_record(run.folder, key, RUNGS)
    assert recorded is not None
    return key, recorded["tokens"] // spec.tokens_per_step


def _is_healed(run: RunContext, plan: Plan, spec: HealingSpec) -> bool:
    return run.recorded(run.inputs.healing(plan, spec), RUNGS) is not None


def _waits(run: RunContext, plan: Plan, spec: HealingSpec) -> bool:
    """Returns whether a plan is healed and its snapshot exists, so that it can be judged."""
    return _is_healed(run, plan, spec) and run.folder.exists(snapshot_name(*_state(run, plan, spec)))


def _is_judged(run: RunContext, plan: Plan, spec: HealingSpec) -> bool:
    return _is_healed(run, plan, spec) and run.recorded(_scores_identity(run, plan, spec)) is not None


def _scores_identity(run: RunContext, plan: Plan, spec: HealingSpec) -> dict[str, Any]:
    key, step = _state(run, plan, spec)
    unit = snapshot_unit(run, plan, key, step, spec)
    return run.inputs.scores(unit, run.inputs.search_quality_spec, state_key(key, step))


def _outcome(run: RunContext, plan: Plan, spec: HealingSpec) -> dict[str, Any]:
    """Returns `key`, `tokens`, `quality_key` and `objective` of a plan in a rung; a failed step leaves None."""
    found: dict[str, Any] = {"key": unit_key(run.inputs.healing(plan, spec))}
    found |= dict.fromkeys(("tokens", "quality_key", "objective"))
    if _is_healed(run, plan, spec):
        found["tokens"] = _state(run, plan, spec)[1] * spec.tokens_per_step
    if _is_judged(run, plan, spec):
        identity = _scores_identity(run, plan, spec)
        recorded = run.recorded(identity)
        assert recorded is not None
        found |= {"quality_key": unit_key(identity), "objective": _objective(run, Scores.from_dict(recorded["scores"]))}
    return found


def _objective(run: RunContext, scores: Scores) -> float:
    """Computes the search's objective from the scores after a healing."""
    untouched = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
    base = run.recorded(run.inputs.plan_scores(untouched, run.inputs.search_quality_spec))
    assert base is not None
    return objective(run, Scores.from_dict(base["scores"]), scores)
