"""Runs the sensitivity stage adaptively: a layer whose tier is certain gets no further items.

Each round follows only from the records of earlier rounds (`AdaptiveTiers`), so that an interrupted command resumes in
the middle of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from layerboost.evaluation.scores import Scores
from layerboost.evaluation.shares import Share, mixed_tasks, shares
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.adaptive_tiers import AdaptiveTiers, TierRule
from layerboost.sensitivity.drops import item_drops
from orchestrator.recipe.errors import InputError
from orchestrator.run.context import RunContext
from orchestrator.run.entries import AblationEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.inputs import TASKS_SOURCE
from orchestrator.run.kinds import SCORES, SENSITIVITY, SHARES, SWEEP
from orchestrator.run.records import time_and_worker
from orchestrator.run.units import Identity, StageUnits, Unit
from tasks.pool.finished import Finished
from tasks.sweep import CountUnit, ScoreUnit, SweepUnit, SweepWork, joined_text_scores, sweep_units

_ITEMS_OF_A_SHARE = 8
"""A round is cut into shares of about this many items, unless the recipe asks for fewer shares."""


def adaptive_units(run: RunContext) -> None:
    """Lists the shares of the rounds so far; the shares of later rounds are open, counted as if no layer stopped early.

    Puts the scores into the run's state once the tiers are certain.
    """
    rounds = Rounds(run)
    is_finished = not rounds.next_units()
    rounds.list_units()
    run.state.sensitivity = rounds.entries if is_finished else []


def adaptive_sensitivity(run: RunContext) -> bool:
    """Scores layers until their tiers are certain; returns whether the next stage can follow."""
    rounds = Rounds(run)
    todo = rounds.next_units()
    workers = run.workers() if todo else None
    run.begin(rounds.list_units(), workers=workers.n_workers if workers else 1)
    failures = []
    if workers:
        failures = sweep_units(
            todo,
            run.source,
            rounds.source.spec,
            workers,
            on_result=rounds.record,
            more_units=rounds.more_units,
            n_workers=run.n_workers,
            watch=run.watch(SENSITIVITY, rounds.name, n_workers=workers.n_workers),
        )
    for failure in failures:
        run.failed(SENSITIVITY, rounds.name(failure.unit), failure.error)
    rounds.list_units()
    run.progress.end_stage()
    run.state.sensitivity = rounds.entries
    if rounds.tiers is not None and rounds.tiers.finished:
        tiers = rounds.tiers.tiers()
        assert tiers is not None
        run.state.adaptive = {"spent": rounds.tiers.spent, "tiers": tiers, "error": rounds.tiers.error}
        run.progress.note(
            f"tiers are certain ({1 - rounds.tiers.error:.0%}) with {rounds.tiers.spent:.0%} of the items",
            tiers="".join({"remove": "N", "middle": "M", "keep": "S"}[tier] for tier in tiers),
        )
    return not failures


class Rounds:
    """Holds the rounds of an adaptive sweep, which are replayed from the records to find the next units."""

    def __init__(self, run: RunContext):
        self._run, self.source = run, run.inputs.sweep_sources[0]
        settings = run.inputs.recipe.sensitivity.adaptive
        assert settings is not None
        self._settings = settings
        self._rule = TierRule(settings.removed, settings.middle, settings.remove_below, settings.keep_above)
        plans = run.inputs.sweep_plans
        self._base, self._layers = plans[Treatment.SOFTMAX.value][0], plans[Treatment.NONE.value]
        self._handed_out: set[SweepWork] = set()
        self._rounds: list[tuple[tuple[int, ...], int, int]] = []
        self.tiers: AdaptiveTiers | None = None
        self.entries: list[AblationEntry] = []
        self._units: dict[str, Unit] = {}
        self._seconds: dict[str, float] = {}
        self._scored: dict[str, Unit] = {}

    def next_units(self) -> list[SweepWork]:
        """Returns the units that the records so far ask for, without those that were already handed out."""
        fresh = [unit for unit in self._replay() if unit not in self._handed_out]
        self._handed_out |= set(fresh)
        return fresh

    def more_units(self) -> list[SweepWork]:
        """Returns the next units while the stage runs, because earlier rounds decide on the later ones."""
        units = self.next_units()
        self._run.progress.set_total(self.list_units().n_expected)
        return units

    def list_units(self) -> StageUnits:
        """Lists the units of the last replay; scores and the item count are additional work that is no unit."""
        counted = Unit(SHARES, (self._run.inputs.count(self.source.spec),), {"source": self.source.name})
        beside = [counted, *self._scored.values()]
        return self._run.list_units(
            SENSITIVITY, list(self._units.values()), n_open=self._n_open(), beside=beside, look=self._took
        )

    def _took(self, units: Sequence[Unit]) -> list[float | None]:
        return [self._seconds.get(unit.key) for unit in units]

    def _n_open(self) -> int:
        """Counts the shares of rounds that the last replay did not reach, as if no layer stopped early."""
        if self.tiers is None:
            n_shares = self._run.inputs.recipe.sensitivity.shares
            n_items = 0 if self.source.spec.tasks else self.source.spec.n_sequences or 0
            return max(1, -(-n_items // _ITEMS_OF_A_SHARE)) if isinstance(n_shares, str) else n_shares
        if self.tiers.finished:
            return 0
        met = self._rounds[-1][2] if self._rounds else 0
        return len(self._cut(met, self.tiers.looks[-1]))

    def _replay(self) -> list[SweepWork]:
        spec, run = self.source.spec, self._run
        counted = run.recorded(run.inputs.count(spec), SHARES)
        if counted is None:
            return [CountUnit(spec)]
        if counted["generating"]:
            raise InputError(
                "sensitivity.adaptive",
                ", ".join(counted["generating"]),
                "has the model generate text, which gives no likelihood per item to rank by; "
                "remove sensitivity.adaptive or the task",
            )
        tasks = mixed_tasks(counted["tasks"])
        weights = [len(tasks) / (len(counted["tasks"]) * counted["tasks"][task]) for task in tasks]
        settings = self._settings
        self.tiers = AdaptiveTiers(
            len(self._layers),
            len(tasks),
            self._rule,
            error=settings.error,
            first_items=settings.first_items,
            weights=weights,
        )
        self._units.clear()
        self._seconds.clear()
        self._scored.clear()
        self._rounds.clear()
        while (request := self.tiers.next_request()) is not None:
            self._rounds.append(request)
            layers, start, stop = request
            plans = self._plans(layers)
            cut = self._cut(start, stop)
            said = self._said([(share, plans) for share in cut])
            missing: list[SweepWork] = []
            for share, found in zip(cut, said, strict=True):
                work = SweepUnit(spec, share, plans)
                unit = Unit(SHARES, (run.inputs.sweep(spec, share, plans),), self.name(work), work)
                self._units[unit.key] = unit
                if found is None:
                    missing.append(work)
                else:
                    self._seconds[unit.key] = found["duration_s"]
            units = missing or self._unscored(plans, cut)
            if units:
                return units
            base = self._scores(self._base, cut)
            self.tiers.observe(
                {layer: self._drops(base, self._layers[layer], cut, tasks[start:stop]) for layer in layers}
            )
        return self._finish()

    def _finish(self) -> list[SweepWork]:
        """Returns the missing scores of each layer over all items it was given, and of the base over the same items."""
        assert self.tiers is not None
        units: list[SweepWork] = []
        self.entries = []
        for layer, plan in enumerate(self._layers):
            cut = self._cut(0, self.tiers.n_items_used(layer))
            units += self._unscored((self._base, plan), cut)
            key, base_key = (unit_key(self._identity(of, cut)) for of in (plan, self._base))
            source = self.source
            self.entries.append(
                AblationEntry(source.name, source.context_tokens, layer, Treatment.NONE.value, key, base_key)
            )
        return list(dict.fromkeys(units))

    def _plans(self, layers: Sequence[int]) -> tuple[Plan, ...]:
        """Returns the plans that a round sweeps: the base and the plans of its layers."""
        return (self._base, *(self._layers[layer] for layer in layers))

    def _cut(self, start: int, stop: int) -> list[Share]:
        """Returns items `start` to `stop` as the shares into which the rounds cut them."""
        assert self.tiers is not None
        ends = [0, *self.tiers.looks]
        found: list[Share] = []
        n_shares = self._run.inputs.recipe.sensitivity.shares
        for first, last in pairwise(ends):
            if start <= first and last <= stop:
                n_here = -(-(last - first) // _ITEMS_OF_A_SHARE)
                if not isinstance(n_shares, str):
                    n_here = min(n_here, n_shares)
                found += shares([1] * (last - first), n_here, first=first, seed=self._settings.seed)
        return found

    # Records

    def _identity(self, plan: Plan, cut: Sequence[Share]) -> Identity:
        """Returns the identity of a plan's scores over some shares."""
        return self._run.inputs.plan_scores(plan, self.source.spec, cut)

    def _said(self, swept: Sequence[tuple[Share, Sequence[Plan]]]) -> list[dict[str, Any] | None]:
        """Reads the plans' recorded answers for each share; None for a share that is not recorded yet."""
        identities = [self._run.inputs.sweep(self.source.spec, share, plans) for share, plans in swept]
        return self._run.all_recorded(identities, SHARES)

    def _answers(self, plan: Plan, cut: Sequence[Share], *names: str) -> tuple:
        """Returns a plan's answers for each share, looked up in the round that swept the share."""
        swept = []
        for share in cut:
            layers = next(layers for layers, start, stop in self._rounds if start <= share.start < stop)
            swept.append((share, self._plans(layers)))
        found = []
        for (_, plans), said in zip(swept, self._said(swept), strict=True):
            assert said is not None
            found.append(tuple(tuple(said[name][plans.index(plan)]) for name in names))
        return tuple(found)

    def _unscored(self, plans: Sequence[Plan], cut: Sequence[Share]) -> list[SweepWork]:
        scores = [Unit(SCORES, (self._identity(plan, cut),), {"plan": str(plan)}) for plan in plans]
        self._scored |= {unit.key: unit for unit in scores}
        recorded = self._run.all_recorded([unit.identity for unit in scores])
        missing = [plan for plan, found in zip(plans, recorded, strict=True) if found is None]
        if self._run.is_ahead:
            # Nothing may be written ahead of a run, so these units end the replay.
            return [ScoreUnit(self.source.spec, plan, tuple(cut), ()) for plan in missing]
        if self.source.name == TASKS_SOURCE:
            spec = self.source.spec
            return [ScoreUnit(spec, plan, tuple(cut), self._answers(plan, cut, "log_p", "greedy")) for plan in missing]
        for plan in missing:
            result = {"scores": joined_text_scores(self._answers(plan, cut, "nll", "kl")).to_dict(), "duration_s": 0.0}
            self._run.record(SENSITIVITY, self._identity(plan, cut), result)
        return []

    def _scores(self, plan: Plan, cut: Sequence[Share]) -> Scores:
        recorded = self._run.recorded(self._identity(plan, cut))
        assert recorded is not None
        return Scores.from_dict(recorded["scores"])

    def _drops(self, base: Scores, plan: Plan, cut: Sequence[Share], tasks: Sequence[str]) -> np.ndarray:
        """Returns (n_items,) drops with the tasks in the order of the rounds.

        Within a task any order works, as long as it is the same for all plans.
        """
        by_task = item_drops(base, self._scores(plan, cut), self._run.inputs.recipe.sensitivity.score)
        iterators = {task: iter(values) for task, values in by_task.items()}
        return np.array([next(iterators[task]) for task in tasks])

    def record(self, done: Finished[SweepWork, dict[str, Any]]) -> None:
        """Records the result of a worker."""
        run, unit, result = self._run, done.unit, {**done.result, **time_and_worker(done)}
        if isinstance(unit, CountUnit):
            run.record(SWEEP, run.inputs.count(unit.spec), result)
        elif isinstance(unit, ScoreUnit):
            run.record(SENSITIVITY, self._identity(unit.plan, unit.shares), result)
        elif isinstance(unit, SweepUnit):
            run.record(SWEEP, run.inputs.sweep(unit.spec, unit.share, unit.plans), result)
            run.progress.finish_unit(done.seconds, **self.name(unit))

    def name(self, unit: SweepWork) -> dict[str, Any]:
        """Returns the name of a unit for progress and failures."""
        name: dict[str, Any] = {"source": self.source.name}
        if isinstance(unit, SweepUnit):
            name |= {"items": f"{unit.share.start}-{unit.share.stop}", "plans": len(unit.plans)}
        if isinstance(unit, ScoreUnit):
            name["plan"] = str(unit.plan)
        return name
