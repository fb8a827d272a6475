"""Runs stage `sensitivity`: it treats one layer at a time, and sweeps all these plans together over shares of items.

For each source of items (the tasks, the text, further texts and lengths) the shares are swept first. When all shares of
a source are recorded, they are joined to the scores of each plan, which later stages read. With
`sensitivity.stable_at` the shares of a text are swept in rounds, until the first ones of them give stable rankings. The
order of work depends only on the records, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from layerboost.evaluation.shares import Share, auto_shares, shares
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.ranking import score_reliability
from orchestrator.run.context import RunContext
from orchestrator.run.entries import AblationEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.inputs import TASKS_SOURCE, TEXT_SOURCE, SweepSource
from orchestrator.run.kinds import SCORES, SENSITIVITY, SHARES, SWEEP
from orchestrator.run.records import time_and_worker
from orchestrator.run.units import Identity, StageUnits, Unit
from orchestrator.stages.adaptive import adaptive_sensitivity, adaptive_units
from tasks.evaluation import EvaluationUnit, cosine_unit
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure
from tasks.sweep import CountUnit, ScoreUnit, SweepUnit, SweepWork, joined_text_scores, sweep_units

FIRST_SEQUENCES = 4
"""Sequences that are read before rankings may count as stable; two halves of fewer say little."""


def units(run: RunContext) -> None:
    """Lists the shares of every source, open if its items are not counted; puts the ablations into the state."""
    if run.inputs.recipe.sensitivity.adaptive is not None:
        adaptive_units(run)
        return
    sweep = Sweep(run, run.inputs.sweep_sources)
    run.state.sensitivity = list(sweep.entries())
    sweep.list_units()


def sensitivity(run: RunContext) -> bool:
    """Judges every variant; returns whether the next stage can follow, because the search needs every layer's drop."""
    if run.inputs.recipe.sensitivity.adaptive is not None:
        return adaptive_sensitivity(run)
    sweep = Sweep(run, run.inputs.sweep_sources)
    is_complete = sweep.run()
    run.state.sensitivity = list(sweep.entries())
    return is_complete


class Sweep:
    """Sweeps some sources of items: it finds the units that are not recorded, runs them and records their results."""

    def __init__(self, run: RunContext, sources: Sequence[SweepSource]):
        self._run, self._sources = run, sources
        self._plans, self._stable_at = run.inputs.sweep_plans, run.inputs.recipe.sensitivity.stable_at
        self._reliability: dict[int, dict[str, float]] = {}
        self._handed_out: set[SweepWork] = set()
        self._units: dict[tuple[SweepSource, Share], Unit] = {}
        self._answers_read: dict[tuple[SweepSource, Share, str], dict[str, Any]] = {}
        self._unrecorded: list[tuple[SweepUnit, float, list[tuple[Identity, dict[str, Any]]]]] = []
        self._has_cosine = (
            any(source.name == TEXT_SOURCE for source in sources)
            and Treatment.NONE.value in self._plans
            and self._wants_cosine()
        )

    def _wants_cosine(self) -> bool:
        recipe = self._run.inputs.recipe.sensitivity
        return recipe.compare or recipe.score == "cosine"

    def entries(self) -> Iterator[AblationEntry]:
        """Yields the entries of `run.json`: each plan's record under each source, with the record of its base.

        There are none of a source before it is certain which of its shares are used.
        """
        for source in self._sources:
            identities = self._scores_identities(source)
            if identities is None:
                continue
            base_key = unit_key(identities[self._base])
            for treatment, plans in self._plans.items():
                if treatment == Treatment.SOFTMAX.value:
                    continue
                for layer, plan in enumerate(plans):
                    key = unit_key(identities[plan])
                    yield AblationEntry(source.name, source.context_tokens, layer, treatment, key, base_key)
        if self._has_cosine:
            tokens = self._text_source.context_tokens
            key = unit_key(self._run.inputs.scores(cosine_unit(), self._text_source.spec))
            yield AblationEntry(TEXT_SOURCE, tokens, None, Treatment.NONE.value, key, None)

    def run(self) -> bool:
        """Runs the units that are not recorded; returns whether all of them are recorded now."""
        run, listing = self._run, self.list_units()
        todo = self._next_units()
        workers = run.workers() if todo else None
        run.begin(listing, workers=workers.n_workers if workers else 1)
        failures: list[UnitFailure[SweepWork]] = []
        if workers:
            spec = (self._text_source if self._has_cosine else self._sources[0]).spec
            failures = sweep_units(
                todo,
                run.source,
                spec,
                workers,
                on_result=self._take,
                on_results_end=self._record_shares,
                more_units=self._more_units,
                n_workers=run.n_workers,
                watch=run.watch(SENSITIVITY, self._name, n_workers=workers.n_workers),
            )
        for failure in failures:
            run.failed(SENSITIVITY, self._name(failure.unit), failure.error)
        if todo:
            self.list_units()
        run.progress.end_stage()
        self._tell_what_was_saved()
        return not failures

    def _tell_what_was_saved(self) -> None:
        """Notes in the state and in progress how much of the text was read, if reading could end early."""
        if self._stable_at is None:
            return
        (source,) = self._sources
        cut = self._shares(source)
        used = None if cut is None else self._used(source, cut)
        if cut is None or used is None:
            return  # units failed
        reliability = self._reliability_of(source, used)
        self._run.state.stable = {"sequences": used[-1].stop, "of": cut[-1].stop, "reliability": reliability}
        self._run.progress.note(
            f"rankings from {used[-1].stop} of {cut[-1].stop} sequences",
            **{f"reliability_{treatment}": f"{value:.3f}" for treatment, value in reliability.items()},
        )

    @property
    def _base(self) -> Plan:
        return self._plans[Treatment.SOFTMAX.value][0]

    @property
    def _text_source(self) -> SweepSource:
        return next(source for source in self._sources if source.name == TEXT_SOURCE)

    # Recorded units

    def list_units(self) -> StageUnits:
        """Lists the shares of all sources, and the cosine distances.

        Shares of a source whose items are not counted are open, unless all of its plans are scored. The counts, and the
        scores into which shares are joined, are additional work that is no unit.
        """
        inputs, units, beside, n_open = self._run.inputs, [], [], 0
        for source in self._sources:
            beside.append(Unit(SHARES, (inputs.count(source.spec),), {"source": source.name}))
            identities = self._scores_identities(source) or {}
            beside += [Unit(SCORES, (identity,), {"plan": str(plan)}) for plan, identity in identities.items()]
            cut = self._shares(source)
            if cut is None:
                n_open += 0 if self._is_scored(source) else self._expected_shares(source)
                continue
            used = self._used(source, cut)
            if used is None:  # every share may still be needed; those that are not begun have no name yet
                missing, begun = self._missing(source, cut), self._begun(source)
                used = [share for share in cut if not missing[share] or share in begun]
                n_open += len(cut) - len(used)
            else:  # shares behind those that are used may have been swept before that was certain
                behind = cut[len(used) :]
                missing = self._missing(source, behind)
                beside += [self._unit(source, share) for share in behind if not missing[share]]
            units += [self._unit(source, share) for share in used]
        if self._has_cosine:
            identity = inputs.scores(cosine_unit(), self._text_source.spec)
            units.append(Unit(SCORES, (identity,), self._name(cosine_unit()), cosine_unit()))
        return self._run.list_units(SENSITIVITY, units, n_open=n_open, beside=beside, look=self._took)

    def _unit(self, source: SweepSource, share: Share) -> Unit:
        """Returns the unit of a share under all plans; it has one record for each treatment."""
        if (source, share) not in self._units:
            identities = tuple(self._run.inputs.sweep(source.spec, share, plans) for plans in self._plans.values())
            every = tuple(plan for plans in self._plans.values() for plan in plans)
            name = self._name(SweepUnit(source.spec, share, every))
            self._units[source, share] = Unit(SHARES, identities, name, (source, share))
        return self._units[source, share]

    def _took(self, units: Sequence[Unit]) -> list[float | None]:
        """Returns the seconds of each share that is complete, and of the cosine distances; None for the others."""
        missing: dict[tuple[SweepSource, Share], list[str]] = {}
        for source in self._sources:
            cut = [unit.work[1] for unit in units if unit.kind == SHARES and unit.work[0] == source]
            if cut and not self._is_scored(source):
                missing |= {(source, share): names for share, names in self._missing(source, cut).items()}
        seconds: list[float | None] = []
        for unit in units:
            if isinstance(unit.work, EvaluationUnit):
                recorded = self._recorded_cosine()
                seconds.append(None if recorded is None else recorded["duration_s"])
                continue
            answers = [self._answers_read.get((*unit.work, name)) for name in self._plans]
            took = sum(answer["duration_s"] for answer in answers if answer is not None)
            seconds.append(None if missing.get(unit.work) else took)
        return seconds

    def _shares(self, source: SweepSource) -> list[Share] | None:
        """Returns the shares into which the items are cut; None if the items are not counted yet."""
        n_shares = self._run.inputs.recipe.sensitivity.shares
        counted = self._run.recorded(self._run.inputs.count(source.spec), SHARES)
        if counted is None:
            return None
        costs = counted["costs"]
        return shares(costs, auto_shares(costs) if isinstance(n_shares, str) else n_shares)

    def _expected_shares(self, source: SweepSource) -> int:
        """Returns the number of shares that the recipe suggests, before the items are counted."""
        n_shares, spec = self._run.inputs.recipe.sensitivity.shares, source.spec
        # The number of task items is unknown here; a text has at most `n_sequences` sequences, all of one length.
        sequences = [] if spec.tasks else [spec.sequence_tokens] * (spec.n_sequences or 0)
        n_expected = auto_shares(sequences) if isinstance(n_shares, str) else n_shares
        return min(n_expected, len(sequences) or n_expected)

    def _used(self, source: SweepSource, cut: list[Share]) -> list[Share] | None:
        """Returns the shares of all that the scores are made of; None while further shares decide it.

        These are all shares, or with `stable_at` the first ones that give stable rankings. Recorded shares behind them
        are not used, so that the result does not depend on how many were swept at once.
        """
        if self._stable_at is None:
            return cut
        missing = self._missing(source, cut)
        for n, share in enumerate(cut, start=1):
            if missing[share]:
                return None
            if n == len(cut):
                return cut
            if share.stop >= FIRST_SEQUENCES:
                of_each = self._reliability_of(source, cut[:n])
                if of_each and min(of_each.values()) >= self._stable_at:
                    return cut[:n]
        return None

    def _reliability_of(self, source: SweepSource, used: Sequence[Share]) -> dict[str, float]:
        """Returns the reliability of each treatment's ranking by some shares; a single layer or sequence has none."""
        if used[-1].stop < 2 or len(self._plans[Treatment.NONE.value]) < 2:
            return {}
        if len(used) not in self._reliability:
            scores = {
                name: [joined_text_scores(self._answers(source, used, plan, "nll", "kl")) for plan in plans]
                for name, plans in self._plans.items()
            }
            (base,) = scores.pop(Treatment.SOFTMAX.value)
            score = self._run.inputs.recipe.sensitivity.score
            self._reliability[len(used)] = score_reliability(base, scores, score)
        return self._reliability[len(used)]

    def _scores_identities(self, source: SweepSource) -> dict[Plan, Identity] | None:
        """Returns the identity of each plan's scores, which names the sequences if they are not all.

        It is None while it is not certain which shares are used.
        """
        sample = None
        if self._stable_at is not None:
            cut = self._shares(source)
            used = None if cut is None else self._used(source, cut)
            if used is None:
                return None
            sample = None if used == cut else used
        every = (plan for plans in self._plans.values() for plan in plans)
        return {plan: self._run.inputs.plan_scores(plan, source.spec, sample) for plan in every}

    def _begun(self, source: SweepSource) -> set[Share]:
        """Returns the shares of a source that were handed out."""
        return {unit.share for unit in self._handed_out if isinstance(unit, SweepUnit) and unit.spec == source.spec}

    def _is_scored(self, source: SweepSource) -> bool:
        return not self._unscored(source)

    def _unscored(self, source: SweepSource) -> list[Plan]:
        identities = self._scores_identities(source)
        if identities is None:
            return [plan for of_treatment in self._plans.values() for plan in of_treatment]
        recorded = self._run.all_recorded(list(identities.values()))
        return [plan for plan, scores in zip(identities, recorded, strict=True) if scores is None]

    def _missing(self, source: SweepSource, cut: Sequence[Share]) -> dict[Share, list[str]]:
        """Returns for each share the treatments whose answers are not recorded yet."""
        wanted = [(share, treatment) for share in cut for treatment in self._plans]
        unread = [each for each in wanted if (source, *each) not in self._answers_read]
        identities = [self._run.inputs.sweep(source.spec, share, self._plans[name]) for share, name in unread]
        for each, recorded in zip(unread, self._run.all_recorded(identities, SHARES), strict=True):
            if recorded is not None:
                self._answers_read[source, *each] = recorded
        missing: dict[Share, list[str]] = {share: [] for share in cut}
        for share, treatment in wanted:
            if (source, share, treatment) not in self._answers_read:
                missing[share].append(treatment)
        return missing

    def _recorded_cosine(self) -> dict[str, Any] | None:
        return self._run.recorded(self._run.inputs.scores(cosine_unit(), self._text_source.spec))

    # Next units

    def _more_units(self) -> list[SweepWork]:
        """Returns the next units while the stage runs; the number of shares is known once the items are counted."""
        units = self._next_units()
        # The items of a source are counted by now, or its rankings are stable and it needs no more shares.
        if any(isinstance(unit, SweepUnit) for unit in units) or self._stable_at is not None:
            self._run.progress.set_total(self.list_units().n_expected)
        return units

    def _next_units(self) -> list[SweepWork]:
        """Returns all units that can run now and were not handed out before."""
        units = [unit for source in self._sources for unit in self._units_of(source)]
        if self._has_cosine and self._recorded_cosine() is None:
            units.append(cosine_unit())
        fresh = [unit for unit in units if unit not in self._handed_out]
        self._handed_out |= set(fresh)
        return fresh

    def _units_of(self, source: SweepSource) -> list[SweepWork]:
        unscored = self._unscored(source)
        if not unscored:
            return []
        cut = self._shares(source)
        if cut is None:
            return [CountUnit(source.spec)]
        used = self._used(source, cut)
        if used is None:
            n_first = sum(share.start < FIRST_SEQUENCES for share in cut)
            left = [share for share, names in self._missing(source, cut).items() if names]
            n_recorded = len(cut) - len(left)
            used = left[: max(n_first - n_recorded, self._run.n_workers())]
        missing = self._missing(source, used)
        if any(missing.values()):
            return [
                SweepUnit(source.spec, share, tuple(plan for name in names for plan in self._plans[name]))
                for share, names in missing.items()
                if names
            ]
        if source.name == TASKS_SOURCE:
            return [
                ScoreUnit(source.spec, plan, tuple(used), self._answers(source, used, plan, "log_p", "greedy"))
                for plan in unscored
            ]
        identities = self._scores_identities(source)
        assert identities is not None  # no share is missing
        for plan in unscored:
            scores = joined_text_scores(self._answers(source, used, plan, "nll", "kl"))
            self._run.record(SENSITIVITY, identities[plan], {"scores": scores.to_dict(), "duration_s": 0.0})
        return []

    def _answers(self, source: SweepSource, cut: Sequence[Share], plan: Plan, *names: str) -> tuple:
        """Returns a plan's answers for each share: one tuple for each name."""
        treatment = next(name for name, plans in self._plans.items() if plan in plans)
        index = self._plans[treatment].index(plan)
        said = [self._answers_read[source, share, treatment] for share in cut]
        return tuple(tuple(tuple(of_share[name][index]) for name in names) for of_share in said)

    # Results

    def _take(self, done: Finished[SweepWork, dict[str, Any]]) -> None:
        """Records the result of a worker; shares are kept back for `_record_shares`."""
        run, inputs, unit = self._run, self._run.inputs, done.unit
        result = {**done.result, **time_and_worker(done)}
        if isinstance(unit, CountUnit):
            run.record(SWEEP, inputs.count(unit.spec), result)
        elif isinstance(unit, ScoreUnit):
            run.record(SENSITIVITY, inputs.plan_scores(unit.plan, unit.spec), result)
        elif isinstance(unit, EvaluationUnit):
            run.record(SENSITIVITY, inputs.scores(unit, self._text_source.spec), result)
            run.progress.finish_unit(done.seconds, **self._name(unit))
        elif isinstance(unit, SweepUnit):
            self._unrecorded.append((unit, done.seconds, self._by_treatment(unit, done)))

    def _record_shares(self) -> None:
        """Records the shares kept back since the last call in parallel: with many workers several arrive at once."""
        taken, self._unrecorded = self._unrecorded, []
        self._run.record_all(SWEEP, [result for _, _, results in taken for result in results])
        for unit, duration_s, _ in taken:
            self._run.progress.finish_unit(duration_s, **self._name(unit))

    def _by_treatment(
        self, unit: SweepUnit, done: Finished[SweepWork, dict[str, Any]]
    ) -> list[tuple[Identity, dict[str, Any]]]:
        """Splits a share into one record for each treatment, so that a treatment added later needs no other again."""
        each_s, results = done.seconds / len(unit.plans), []
        for plans in self._plans.values():
            if plans[0] not in unit.plans:
                continue
            first = unit.plans.index(plans[0])
            said = {
                name: values[first : first + len(plans)]
                for name, values in done.result.items()
                if isinstance(values, list)
            }
            identity = self._run.inputs.sweep(unit.spec, unit.share, plans)
            results.append((identity, {**said, **time_and_worker(done, each_s * len(plans))}))
        return results

    def _name(self, unit: SweepWork) -> dict[str, Any]:
        if isinstance(unit, EvaluationUnit):
            return {"score": "cosine"}
        source = next(source for source in self._sources if source.spec == unit.spec)
        name: dict[str, Any] = {"source": source.name}
        if source.context_tokens is not None:
            name["context_tokens"] = source.context_tokens
        if isinstance(unit, SweepUnit):
            name |= {"items": f"{unit.share.start}-{unit.share.stop}", "plans": len(unit.plans)}
        if isinstance(unit, ScoreUnit):
            name["plan"] = str(unit.plan)
        return name
