"""Tests measurements: the right model under the right condition, one at a time, alone on the machine."""

import pytest

from layerboost.checkpoint import ModelSource, load_model, load_tokenizer, save_checkpoint
from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.speed.vllm_bench import ServingMeasurement
from layerboost.speed.vllm_environment import ServingEnvironment, ServingError
from tasks.cluster.resources import NodeResources, WorkerResources, exclusive_worker
from tasks.timing import (
    ERROR,
    MeasurementWorker,
    ServingWorker,
    ThroughputUnit,
    measure_groups,
    measuring_threads,
)

TOKEN_BYTES = 2 * 2 * 8 * 4  # bytes of the keys and values of one layer of the tiny model, in fp32


@pytest.fixture(scope="module")
def source(tiny_checkpoint) -> ModelSource:
    return ModelSource(str(tiny_checkpoint / "model"), device="cpu")


def _unit(concurrency=2, **which) -> ThroughputUnit:
    return ThroughputUnit(concurrency, prompt_tokens=12, new_tokens=4, **which)


def test_plans_and_checkpoints_are_measured_as_what_they_are(source, tmp_path):
    save_checkpoint(
        convert(load_model(source.path), Plan.parse("NNSN")), load_tokenizer(source.path), tmp_path / "healed"
    )
    worker = MeasurementWorker(source)
    measured = worker.measure((_unit(), _unit(plan=Plan.parse("SNSW", 3))))
    measured += worker.measure((_unit(3), _unit(3, checkpoint=str(tmp_path / "healed"))))
    assert [m.kv_bytes_per_token / TOKEN_BYTES for m in measured] == [4, 2, 4, 1]
    assert [m.concurrency for m in measured] == [2, 2, 3, 3]
    assert all(len(m.repeats_tok_per_s) == 3 and m.prompt_tokens == 12 and m.new_tokens == 4 for m in measured)


def test_plans_share_the_parents_weights_and_a_checkpoint_is_let_go_after_its_group(source, tmp_path, monkeypatch):
    healed = str(tmp_path / "healed")
    save_checkpoint(convert(load_model(source.path), Plan.parse("NNSN")), load_tokenizer(source.path), healed)
    loads = []
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda self, path=None: loads.append(path) or load(self, path))
    monkeypatch.setattr("tasks.timing.measure_together", lambda models, **condition: models)
    worker = MeasurementWorker(source)
    plan = Plan.parse("SNSW", 3)
    for group in (
        (_unit(1), _unit(1, plan=plan)),
        (_unit(2), _unit(2, plan=plan)),
        (_unit(1), _unit(1, checkpoint=healed)),
    ):
        worker.measure(group)
    assert loads == [None, healed]
    worker.measure((_unit(1), _unit(1, plan=plan)))
    assert loads == [None, healed] and list(worker._loaded) == [None]


def test_a_server_is_given_the_parent_a_plan_as_a_checkpoint_or_a_healed_one(source, tmp_path, monkeypatch):
    environment = ServingEnvironment("/venv", "0.9", "0.2", "2.0", "5.0", "a machine (2 cores)")
    served = []

    def measure(environment, model, conditions, *, dtype, on_result):
        folder = tmp_path / "written" if callable(model) else model
        if callable(model):
            model(folder)
        served.append((load_model(str(folder)).config, load_tokenizer(str(folder))))
        for condition in conditions:
            about = (condition.concurrency, condition.prompt_tokens, condition.new_tokens)
            told = ServingMeasurement(
                "vllm", "0.9", "a machine", dtype, *about, *[1.0] * 8, None, 8.0, 4, 16, 64, 16, []
            )
            on_result(condition, ServingError("lost\nlog") if condition.concurrency == 3 else told)

    monkeypatch.setattr("tasks.timing.measure_served", measure)
    save_checkpoint(
        convert(load_model(source.path), Plan.parse("NNSN")), load_tokenizer(source.path), tmp_path / "healed"
    )
    worker = ServingWorker(source)
    results = []
    for which in ({}, {"plan": Plan.parse("SNSW", 3)}, {"checkpoint": f"file://{tmp_path}/healed"}):
        results += worker.run(tuple(_unit(n, environment=environment, **which) for n in (2, 3)))
    plans = [getattr(config, "layerboost", {}).get("plan") for config, _ in served]
    assert plans == [None, "SNSW", "NNSN"] and len({len(tokenizer) for _, tokenizer in served}) == 1
    assert [result.get("concurrency") for result in results] == [2, None] * 3
    assert results[1] == {ERROR: "lost\nlog"} and results[0]["dtype"] == "auto"


def test_a_group_has_one_condition(source):
    with pytest.raises(ValueError, match="one condition"):
        MeasurementWorker(source).measure((_unit(1), _unit(2)))


def test_a_unit_is_either_a_plan_or_a_checkpoint():
    with pytest.raises(ValueError, match="either a plan or a checkpoint"):
        _unit(plan=Plan.parse("S"), checkpoint="x")


def test_the_worker_has_the_largest_node_for_itself():
    nodes = [NodeResources("a", "", 64, 0), NodeResources("b", "", 16, 4), NodeResources("c", "", 32, 0)]
    alone = exclusive_worker(nodes, {})
    assert (alone.n_workers, alone.cpus, alone.gpus) == (1, 16, 1)
    alone = exclusive_worker([nodes[2], nodes[0]], {})
    assert (alone.cpus, alone.gpus, alone.threads) == (64, 0, 64)
    assert [measuring_threads(WorkerResources(1, cpus, 0)) for cpus in (1, 2, 64)] == [1, 1, 63]


@pytest.mark.cluster
def test_on_a_cluster_measurements_never_overlap(ray_local, source):
    units = [(_unit(n), _unit(n, plan=Plan.parse("NNNN"))) for n in (1, 3)]
    units.append((ThroughputUnit(1, prompt_tokens=400, new_tokens=4),))
    results, failures, pids = {}, [], set()

    def take(done):
        results[done.unit] = done.result
        pids.add(done.worker.pid)

    returned = measure_groups(units, source, on_result=take, on_failure=failures.append, max_attempts=1)
    assert returned == failures and [failure.unit for failure in failures] == [units[-1]]
    assert "prompt_tokens: 400" in failures[0].error.splitlines()[0]
    assert set(results) == set(units[:-1]) and len(pids) == 1
    for group in units[:-1]:
        assert [result["kv_bytes_per_token"] for result in results[group]] == [4 * TOKEN_BYTES, 0]
    assert results[units[0]][0]["threads"] == 1
