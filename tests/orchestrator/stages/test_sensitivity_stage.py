"""A sweep ends when its rankings are stable: what it reads and records, whatever the workers and after kills."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from layerboost.evaluation.scores import Scores
from layerboost.plan import Plan
from layerboost.sensitivity.drops import mean_drop
from layerboost.sensitivity.ranking import DropMatrix, reliability
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.run.context import RunContext
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.records import find_record
from orchestrator.run.state import RunState
from orchestrator.stages.sensitivity import sensitivity, units
from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import Finished, WorkerInfo
from tasks.sweep import CountUnit, SweepUnit

SEQUENCES, LAYERS = 24, 3
HERE = WorkerInfo("here", "node", 1)
SETTINGS = (
    *("quality.tasks=[]", "sensitivity.compare=false", "search.refine=null"),
    *(f"sensitivity.shares={SEQUENCES}", "sensitivity.treatments=[none, window]", "sensitivity.stable_at=0.95"),
)


class Sweeper:
    """Answers the units of a sweep; drops are `effect` times the layer's number, and noise that differs by sequence."""

    def __init__(self, monkeypatch, *, effect: float, n_workers: int = 1, stop_after: int | None = None):
        self.effect, self.stop_after, self.swept = effect, stop_after, []
        self.rounds: list[int] = []
        monkeypatch.setattr(RunContext, "connect", lambda run: None)
        monkeypatch.setattr(RunContext, "workers", lambda run: WorkerResources(n_workers, 1.0, 0.0))
        monkeypatch.setattr(sys.modules["orchestrator.stages.sensitivity"], "sweep_units", self.sweep_units)

    def sweep_units(self, todo, source, spec, workers, *, on_result, more_units, on_results_end, **_):
        while todo:
            self.rounds.append(sum(isinstance(unit, SweepUnit) for unit in todo))
            for unit in todo:
                if isinstance(unit, CountUnit):
                    result = {"costs": [32] * SEQUENCES, "tasks": {"text": SEQUENCES}, "generating": []}
                else:
                    if len(self.swept) == self.stop_after:
                        raise KeyboardInterrupt
                    self.swept.append(unit.share.start)
                    result = self._swept(unit)
                on_result(Finished(unit, result, 3.0, HERE))
                on_results_end()
            todo = more_units()
        return []

    def _swept(self, unit: SweepUnit) -> dict:
        nll = [[self.nll(plan, item) for item in range(unit.share.start, unit.share.stop)] for plan in unit.plans]
        return {"nll": nll, "kl": [[0.1] * len(items) for items in nll]}

    def nll(self, plan: Plan, item: int) -> float:
        rng = np.random.default_rng([item, *map(ord, str(plan))])
        treated = [layer for layer, letter in enumerate(str(plan)) if letter != "S"]
        return (
            1.0 + sum(self.effect * (1 + layer) for layer in treated) + (0.1 * rng.standard_normal() if treated else 0)
        )


def context(inputs, name: str, *overrides: str) -> RunContext:
    recipe = load_recipe(inputs.recipe, [*SETTINGS, *overrides])
    folder = RunFolder(inputs.folder.parent / name)
    state = RunState("m", LAYERS, "nll", {})
    return RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, state, Progress(io.StringIO()))


def entries_of(run: RunContext) -> list[tuple]:
    return [(entry.treatment, entry.layer, entry.key, entry.base_key) for entry in run.state.sensitivity]


def scores_of(run: RunContext, key: str) -> Scores:
    record = find_record(run.folder, key)
    assert record is not None
    return Scores.from_dict(record["scores"])


def first_stable(sweeper: Sweeper, run: RunContext) -> int:
    """Returns the number of sequences after which both rankings are reliable, worked out from the drops themselves."""
    plans = run.inputs.sweep_plans
    drops = {
        name: np.array([[sweeper.nll(plan, item) - 1.0 for item in range(SEQUENCES)] for plan in plans[name]])
        for name in ("none", "window")
    }
    for n in range(4, SEQUENCES + 1):
        if all(reliability(DropMatrix({"text": of_layers[:, :n]})) >= 0.95 for of_layers in drops.values()):
            return n
    return SEQUENCES


@pytest.mark.parametrize("n_workers", [1, 3, 7])
def test_it_reads_until_every_ranking_is_stable_whatever_the_workers(inputs, monkeypatch, n_workers):
    run = context(inputs, f"out-{n_workers}")
    sweeper = Sweeper(monkeypatch, effect=0.06, n_workers=n_workers)
    assert sensitivity(run)
    n_used = first_stable(sweeper, run)
    assert 4 < n_used < SEQUENCES, "the example reads more than the first round and less than all"
    assert sweeper.swept == list(range(len(sweeper.swept)))
    assert n_used <= len(sweeper.swept) < n_used + n_workers
    assert run.state.stable is not None
    assert (run.state.stable["sequences"], run.state.stable["of"]) == (n_used, SEQUENCES)
    assert min(run.state.stable["reliability"].values()) >= 0.95
    assert len(run.state.sensitivity) == 2 * LAYERS
    plans = run.inputs.sweep_plans
    for treatment, layer, key, base_key in entries_of(run):
        plan, base = plans[treatment][layer], plans["softmax"][0]
        found = mean_drop(scores_of(run, base_key), scores_of(run, key), "nll")
        expected = [sweeper.nll(plan, item) - sweeper.nll(base, item) for item in range(n_used)]
        assert found.drop == pytest.approx(np.mean(expected)) and found.n_items == n_used
    listing = run.listings["sensitivity"]
    assert (listing.n_expected, listing.n_recorded, listing.n_open) == (n_used, n_used, 0)
    assert "rankings from" in run.progress._stream.getvalue()
    # The same command again finds everything, and asks for no cluster.
    monkeypatch.setattr(RunContext, "workers", lambda run: pytest.fail("nothing is left to do"))
    again = context(inputs, f"out-{n_workers}")
    units(again)
    assert entries_of(again) == entries_of(run)
    assert sensitivity(again)
    assert entries_of(again) == entries_of(run) and again.state.stable == run.state.stable


def test_workers_change_neither_keys_nor_scores(inputs, monkeypatch):
    runs = []
    for n_workers in (1, 5):
        run = context(inputs, f"out-{n_workers}")
        Sweeper(monkeypatch, effect=0.06, n_workers=n_workers)
        sensitivity(run)
        runs.append(run)
    assert entries_of(runs[0]) == entries_of(runs[1])
    for _, _, key, base_key in entries_of(runs[0]):
        assert scores_of(runs[0], key) == scores_of(runs[1], key)
        assert scores_of(runs[0], base_key) == scores_of(runs[1], base_key)


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5])
def test_an_interrupted_sweep_goes_on_and_asks_nothing_twice(inputs, monkeypatch, stop_after):
    whole, run = context(inputs, "whole"), context(inputs, "out")
    Sweeper(monkeypatch, effect=0.06, n_workers=2)
    sensitivity(whole)
    before = Sweeper(monkeypatch, effect=0.06, n_workers=2, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(run)
    ahead = context(inputs, "out")
    ahead.is_ahead = True
    units(ahead)
    listing = ahead.listings["sensitivity"]
    assert ahead.state.sensitivity == []
    assert (listing.n_recorded, listing.n_expected) == (stop_after, SEQUENCES), "all of them may still be needed"
    after = Sweeper(monkeypatch, effect=0.06, n_workers=2)
    again = context(inputs, "out")
    assert sensitivity(again)
    assert not set(before.swept) & set(after.swept)
    assert entries_of(again) == entries_of(whole)


def test_rankings_that_never_get_stable_read_all_and_share_the_records_of_a_full_sweep(inputs, monkeypatch):
    run = context(inputs, "out")
    sweeper = Sweeper(monkeypatch, effect=0.0, n_workers=3)
    assert sensitivity(run)
    assert sorted(sweeper.swept) == list(range(SEQUENCES))
    assert run.state.stable is not None and run.state.stable["sequences"] == SEQUENCES
    full = context(inputs, "out", "sensitivity.stable_at=null")
    again = Sweeper(monkeypatch, effect=0.0)
    assert sensitivity(full)
    assert again.swept == [] and entries_of(full) == entries_of(run)
    assert full.state.stable is None
    plan = full.inputs.sweep_plans["none"][0]
    assert entries_of(full)[0][2] == unit_key(full.inputs.plan_scores(plan, full.inputs.sweep_sources[0].spec))
