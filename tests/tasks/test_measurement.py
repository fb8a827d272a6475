"""Measurements: the right model under the right condition, one at a time, with the machine for itself."""

import pytest

from layerboost.checkpoint import load_model, load_tokenizer, save_checkpoint
from layerboost.convert import convert
from layerboost.plan import Plan
from tasks.ablation import ModelSource
from tasks.cluster import NodeResources, WorkerResources
from tasks.measurement import MeasurementWorker, ThroughputUnit, exclusive_worker, measure_units, measuring_threads

TOKEN_BYTES = 2 * 2 * 8 * 4  # keys and values of one layer of the tiny model in fp32


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
    measured = {
        name: worker.measure(unit)
        for name, unit in {
            "base": _unit(),
            "plan": _unit(plan=Plan.parse("SNSW", 3)),
            "healed": _unit(3, checkpoint=str(tmp_path / "healed")),
        }.items()
    }
    assert [m.kv_bytes_per_token for m in measured.values()] == [4 * TOKEN_BYTES, 2 * TOKEN_BYTES, TOKEN_BYTES]
    assert [m.concurrency for m in measured.values()] == [2, 2, 3]
    assert all(len(m.repeats_tok_per_s) == 3 and m.prompt_tokens == 12 and m.new_tokens == 4 for m in measured.values())


def test_a_model_is_loaded_once_for_all_its_conditions_and_then_let_go(source, monkeypatch):
    loads = []
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda self, path=None: loads.append(path) or load(self, path))
    worker = MeasurementWorker(source)
    plan = Plan.parse("SNSW", 3)
    for unit in (_unit(1), _unit(2), _unit(1, plan=plan), _unit(2, plan=plan)):
        worker.measure(unit)
    assert len(loads) == 2


def test_a_unit_is_either_a_plan_or_a_checkpoint():
    with pytest.raises(ValueError, match="either a plan or a checkpoint"):
        _unit(plan=Plan.parse("S"), checkpoint="x")


def test_the_worker_has_the_largest_node_for_itself():
    nodes = [NodeResources("a", "", 64, 0), NodeResources("b", "", 16, 4), NodeResources("c", "", 32, 0)]
    alone = exclusive_worker(nodes)
    assert (alone.n_workers, alone.cpus, alone.gpus) == (1, 16, 1)
    alone = exclusive_worker([nodes[2], nodes[0]])
    assert (alone.cpus, alone.gpus, alone.threads) == (64, 0, 64)
    assert [measuring_threads(WorkerResources(1, cpus, 0)) for cpus in (1, 2, 64)] == [1, 1, 63]


@pytest.mark.cluster
def test_on_a_cluster_measurements_never_overlap(ray_local, source):
    units = [_unit(n, plan=plan) for plan in (None, Plan.parse("NNNN")) for n in (1, 3)]
    units.append(ThroughputUnit(1, prompt_tokens=400, new_tokens=4))
    results, failures, pids = {}, [], set()

    def take(unit, result, duration_s, info):
        results[unit] = result
        pids.add(info["pid"])

    returned = measure_units(units, source, on_result=take, on_failure=failures.append, max_attempts=1)
    assert returned == failures and [failure.unit for failure in failures] == [units[-1]]
    assert "prompt_tokens: 400" in failures[0].error.splitlines()[0]
    assert set(results) == set(units[:-1]) and len(pids) == 1
    assert [results[unit]["kv_bytes_per_token"] for unit in units[:-1]] == [4 * TOKEN_BYTES] * 2 + [0] * 2
    assert results[units[0]]["threads"] == 1
