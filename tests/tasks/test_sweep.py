"""Tests the sweep on workers: shares add up to the whole even if workers die or join or shares are cut differently."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import pytest
import yaml
from ray import cloudpickle

from layerboost.checkpoint import ModelSource
from layerboost.evaluation.lm_eval_requests import Item
from layerboost.evaluation.scores import QualitySpec, Scores
from layerboost.evaluation.shares import Share, auto_shares, mixed, mixed_tasks, shares
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import single_layer_plan
from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import worker_info
from tasks.pool.pool import run_units
from tasks.sweep import CountUnit, PlansUnit, ScoreUnit, SweepUnit, SweepWorker, sweep_units

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PLANS = (Plan.parse("SSSS"), *(single_layer_plan(4, layer, Treatment.WINDOW, 5) for layer in range(4)))


@pytest.fixture(scope="module")
def source(tiny_checkpoint) -> ModelSource:
    return ModelSource(str(tiny_checkpoint / "model"), device="cpu")


@pytest.fixture(scope="module")
def text_spec(tiny_checkpoint) -> QualitySpec:
    return QualitySpec(text=str(tiny_checkpoint / "text.txt"), n_sequences=11, sequence_tokens=24, batch_size=4)


@pytest.fixture(scope="module")
def task_spec(tiny_checkpoint) -> QualitySpec:
    files = []
    draw = random.Random(3)
    for name, n_items in (("first", 14), ("second", 7)):
        documents = [
            {
                "context": " ".join(f"w{draw.randrange(94)}" for _ in range(draw.randint(3, 20))),
                "choices": [f"w{draw.randrange(94)} w{draw.randrange(94)}" for _ in range(3)],
                "gold": draw.randrange(3),
            }
            for _ in range(n_items)
        ]
        data, file = tiny_checkpoint / f"{name}.jsonl", tiny_checkpoint / f"{name}.yaml"
        data.write_text("\n".join(map(json.dumps, documents)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": data.name}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
        file.write_text(yaml.safe_dump(task))
        files.append(str(file))
    return QualitySpec(tasks=tuple(files))


@pytest.fixture(scope="module")
def worker(source, text_spec) -> SweepWorker:
    return SweepWorker(source, text_spec)


def _items(scores: dict) -> list[list[float] | None]:
    return [metric.items for metric in Scores.from_dict(scores).metrics]


def test_items_are_counted_by_task(worker, text_spec, task_spec):
    assert worker.run(CountUnit(text_spec))["tasks"] == {"text": 11}
    assert worker.run(CountUnit(task_spec))["tasks"] == {"first": 14, "second": 7}


@pytest.mark.parametrize(("n_shares", "seed"), [(1, None), (4, None), (50, None), (3, 7)])
def test_scores_do_not_depend_on_how_the_items_are_shared_out(worker, task_spec, text_spec, n_shares, seed):
    cut = shares([1] * 21, n_shares, seed=seed)
    swept = [worker.run(SweepUnit(task_spec, share, PLANS)) for share in cut]
    whole = worker.run(PlansUnit(task_spec, PLANS))["scores"]
    for index, plan in enumerate(PLANS):
        answers = tuple((tuple(r["log_p"][index]), tuple(r["greedy"][index])) for r in swept)
        found = worker.run(ScoreUnit(task_spec, plan, tuple(cut), answers))["scores"]
        for mine, theirs in zip(_items(found), _items(whole[index]), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    texts = [worker.run(SweepUnit(text_spec, share, PLANS)) for share in shares([1] * 11, n_shares)]
    nll = [value for part in texts for value in part["nll"][2]]
    assert nll == pytest.approx(_items(worker.run(PlansUnit(text_spec, PLANS))["scores"][2])[0], rel=1e-5)


def test_some_shares_score_some_items(worker, task_spec):
    share = Share(0, 6, seed=1)
    swept = worker.run(SweepUnit(task_spec, share, PLANS[:1]))
    answers = ((tuple(swept["log_p"][0]), tuple(swept["greedy"][0])),)
    found = Scores.from_dict(worker.run(ScoreUnit(task_spec, PLANS[0], (share,), answers))["scores"])
    assert {score.task: score.n_items for score in found.metrics} == {"first": 4, "second": 2}


def test_a_random_order_holds_the_same_fraction_of_each_task_everywhere():
    items = [Item(task, number, (0,)) for task, n in (("a", 30), ("b", 10), ("c", 20)) for number in range(n)]
    order = mixed(items, seed=5)
    assert sorted(order, key=str) == sorted(items, key=str) and order != mixed(items, seed=6)
    assert [item.task for item in order] == mixed_tasks({"c": 20, "a": 30, "b": 10})
    for end in (6, 12, 30):
        counts = [sum(item.task == task for item in order[:end]) for task in "abc"]
        assert counts == pytest.approx([end / 2, end / 6, end / 3], abs=1)


@pytest.mark.parametrize(("costs", "n"), [([], 16), ([50] * 100, 16), ([100] * 1_000, 97), ([500] * 10_000, 1024)])
def test_the_items_alone_decide_into_how_many_shares_they_are_cut(costs, n):
    assert auto_shares(costs) == n


def test_shares_cover_all_items_once_at_nearly_the_same_cost():
    for n_items, n_shares in ((10, 3), (3, 10), (1, 1), (100, 16)):
        cut = shares([1] * n_items, n_shares, first=5, seed=2)
        assert [i for share in cut for i in range(share.start, share.stop)] == list(range(5, 5 + n_items))
        assert len(cut) == min(n_items, n_shares) and {share.seed for share in cut} == {2}
        costs = [random.randint(1, 9) for _ in range(n_items)]
        cut = shares(costs, n_shares)
        assert [i for share in cut for i in range(share.start, share.stop)] == list(range(n_items))
        of_shares = [sum(costs[share.start : share.stop]) for share in cut]
        assert max(of_shares) <= sum(costs) / n_shares + 9
    assert shares([], 4) == []


def test_an_items_cost_is_what_it_adds_to_the_one_before(worker, task_spec, text_spec):
    counted = worker.run(CountUnit(task_spec))
    evaluation = worker.evaluation(task_spec)
    assert len(counted["costs"]) == 21 == len(evaluation.items)
    first = [evaluation.benchmarks.requests[index].tokens for index in evaluation.items[0].requests]
    n_context = len(first[0]) - 2
    assert counted["costs"][0] == n_context + 3 * 2
    assert worker.run(CountUnit(text_spec))["costs"] == [24] * 11


@pytest.mark.cluster
def test_workers_killed_at_random_change_nothing(ray_local, worker, source, text_spec):
    units = [SweepUnit(text_spec, share, PLANS) for share in shares([1] * 11, 11)]
    expected = {unit: worker.run(unit)["nll"] for unit in units}
    found: dict[SweepUnit, list] = {}
    pids: set[int] = set()
    kills = 0

    def take(finished):
        nonlocal kills
        assert finished.unit not in found, "a result came twice"
        found[finished.unit] = finished.result["nll"]
        pids.add(finished.worker.pid)
        if kills < 5:
            kills += 1
            os.kill(random.choice(sorted(pids)), signal.SIGKILL)
            pids.clear()

    failures = sweep_units(units, source, text_spec, WorkerResources(2, 1, 0), on_result=take, max_attempts=20)
    assert failures == [] and kills == 5
    assert set(found) == set(units)
    for unit in units:
        for mine, theirs in zip(found[unit], expected[unit], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


class Sleeper:
    """Works slowly."""

    def info(self):
        return worker_info()

    def run(self, unit):
        time.sleep(0.3)
        return unit


@pytest.mark.cluster
def test_workers_join_a_run_that_is_under_way(ray_local, monkeypatch):
    monkeypatch.setattr("tasks.pool.pool._GROWTH_POLL_S", 0.2)
    actor = ray_local.remote(Sleeper).options(num_cpus=1)
    allowed, pids, done = 1, [], []

    def take(finished):
        nonlocal allowed
        done.append(finished.unit)
        pids.append(finished.worker.pid)
        allowed = 2 if len(done) > 2 else 1

    assert run_units(range(40), actor.remote, n_workers=lambda: allowed, on_result=take) == []
    assert sorted(done) == list(range(40))
    assert len(set(pids[:3])) == 1 and len(set(pids)) == 2


@pytest.mark.cluster
def test_units_that_follow_from_results_run_on_the_same_workers(ray_local):
    actor = ray_local.remote(Sleeper).options(num_cpus=1)
    found, pids = [], set()

    def take(finished):
        found.append(finished.unit)
        pids.add(finished.worker.pid)

    def more():
        return [max(found) + 1, max(found) + 2] if len(found) < 6 else []

    assert run_units([0], actor.remote, n_workers=2, on_result=take, more_units=more) == []
    assert sorted(found) == list(range(7)) and len(pids) <= 2
