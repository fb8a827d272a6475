"""Tests the timings of a run without a cluster: what is measured, scaled, fitted and read back as tables."""

from __future__ import annotations

import pytest

from layerboost.plan import Plan, Treatment
from layerboost.speed.decoding import DecodeMeasurement
from layerboost.speed.vllm_bench import ServingMeasurement
from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.results.reading import RecordReader
from orchestrator.results.speed import length_rows, predictions, speed_rows
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Finalist, TimingEntry
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.stages import timing
from orchestrator.stages.speed import designed_plans, layer_times, measure_speed, speedup
from orchestrator.stages.timing import groups, server_groups, throughput_unit, time_models
from tasks.pool.finished import Finished, WorkerInfo
from tasks.pool.pool import UnitFailure
from tasks.timing import ERROR

COST = {Treatment.SOFTMAX: 3.0, Treatment.LINEAR_WINDOW: 2.0, Treatment.WINDOW: 1.0, Treatment.NONE: 0.0}
BASE = Plan.parse("SSS")
HERE = WorkerInfo("here", "node", 1)


def step_s(plan: Plan | None) -> float:
    return 1.0 + sum(COST[treatment] for treatment in (plan or BASE).treatments)


class FakeMachine:
    """Times groups by `step_s` on a machine that gets slower with each group; plans named in `broken` fail."""

    def __init__(self, monkeypatch):
        self.groups: list = []
        self.broken: set[str] = set()
        monkeypatch.setattr(timing, "measure_groups", self.measure)
        monkeypatch.setattr(timing, "_device_name", lambda: "a CPU (2 cores)")

    def measure(self, todo, source, *, on_result, **_):
        failures = []
        for group in todo:
            self.groups.append(group)
            if any(str(unit.plan) in self.broken for unit in group):
                failures.append(UnitFailure(group, "RuntimeError: out of memory", 3))
            else:
                on_result(Finished(group, [self._result(unit) for unit in group], 2.0, HERE))
        return failures

    def serve(self, todo, source, *, on_result, **_):
        """Does what `measure` does, with vLLM; requests are lost at the concurrencies in `broken`."""
        for group in todo:
            self.groups.append(group)
            on_result(Finished(group, [self._served(unit) for unit in group], 4.0, HERE))
        return []

    def _served(self, unit):
        if unit.concurrency in self.broken:
            return {ERROR: "15 of 16 requests"}
        speed = unit.concurrency / step_s(unit.plan) / len(self.groups)
        condition = (unit.concurrency, unit.prompt_tokens, unit.new_tokens)
        latencies, rest = [1.0] * 6, (None, 8.0, 4, 16, 64, 16, [speed])
        about = ("vllm", unit.environment.vllm, unit.environment.hardware, "float32")
        return ServingMeasurement(*about, *condition, speed, 0.01 * speed, *latencies, *rest).to_dict()

    def _result(self, unit):
        speed = unit.concurrency / step_s(unit.plan) / len(self.groups)
        about = ("transformers", "a CPU (2 cores)", "float32", 1)
        condition = (unit.concurrency, unit.prompt_tokens, unit.new_tokens)
        return DecodeMeasurement(*about, *condition, speed, 0.01 * speed, 1.0, 1.0, 1.0, 1.0).to_dict()


@pytest.fixture
def machine(monkeypatch) -> FakeMachine:
    return FakeMachine(monkeypatch)


def context(inputs, monkeypatch, *overrides: str) -> RunContext:
    recipe = load_recipe(inputs.recipe, overrides)
    folder = RunFolder(inputs.folder.parent / "out")
    run = RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, RunState("m", 3, "nll", {}), Progress())
    monkeypatch.setattr(run, "connect", lambda: None)
    return run


def test_a_few_timings_predict_every_plan_and_are_not_repeated(inputs, machine, monkeypatch):
    run = context(inputs, monkeypatch, "throughput.concurrency=[1, 4]", "search.plans=[SNL]")
    measure_speed(run)
    plans = designed_plans(run)
    assert len(plans) == 8 and Plan.parse("SNL", 8) in plans
    assert [len(group) for group in machine.groups] == [8, 8] and machine.groups[0][0].plan is None
    assert [model.concurrency for model in run.state.speed.models] == [1, 4]
    for text in ("NNS", "LSW", "WWN", "LNN"):
        assert speedup(run, Plan.parse(text, 8)) == pytest.approx(10 / step_s(Plan.parse(text, 8)))
    assert layer_times(run)[Treatment.LINEAR_WINDOW] == pytest.approx(
        [2.0 * 2] * 3
    )  # the machine ran the second group half as fast
    predicted, stderr = predictions(run.state)(Plan.parse("LSW", 8), 1)
    assert predicted == pytest.approx(1 / 7) and 0 < stderr < 0.02
    rows = list(speed_rows(RecordReader(run.folder), run.state))
    assert len(rows) == 16 and all(row["in_fit"] and abs(row["relative_error"]) < 1e-6 for row in rows)

    again = context(inputs, monkeypatch, "throughput.concurrency=[1, 4]", "search.plans=[SNL]")
    measure_speed(again)
    assert len(machine.groups) == 2 and again.state.speed == run.state.speed


def test_a_plan_of_the_same_counts_stands_in_for_one_of_the_design(inputs, machine, monkeypatch):
    first = context(inputs, monkeypatch)
    mixture = designed_plans(first)[-1]
    turned = Plan((*mixture.treatments[1:], mixture.treatments[0]), mixture.window)
    units = {throughput_unit(first, plan, 1): ({}, None) for plan in (None, turned)}
    time_models(first, "throughput", units, "a CPU (2 cores)")
    run = context(inputs, monkeypatch)
    measure_speed(run)
    timed = [unit.plan for group in machine.groups for unit in group]
    assert turned in timed and mixture not in timed and len(run.state.speed.measured) == 8


def test_later_timings_stand_where_the_base_stood(inputs, machine, monkeypatch):
    run = context(inputs, monkeypatch)
    measure_speed(run)
    late = throughput_unit(run, None, 1, checkpoint="healed/x")
    key = time_models(
        run, "throughput", {throughput_unit(run, None, 1): ({}, None), late: ({}, "k")}, "a CPU (2 cores)"
    )
    record = run.folder.read_record("throughput", key[late]).result
    assert [unit.checkpoint for unit in machine.groups[-1]] == [None, "healed/x"]
    assert record["output_throughput_tok_per_s"] == pytest.approx(0.1) and record["scaled_by"] == pytest.approx(2.0)


def test_a_plan_that_cannot_be_timed_is_named_and_takes_no_other_with_it(inputs, machine, monkeypatch):
    run = context(inputs, monkeypatch)
    machine.broken = {str(designed_plans(run)[-1])}
    measure_speed(run)
    assert [failure.name["plan"] for failure in run.state.failures] == list(machine.broken)
    assert len(run.state.speed.measured) == 7 and len(run.state.speed.models) == 1


def test_without_measurements_speed_is_predicted_from_bytes(inputs, machine, monkeypatch):
    by_bytes = context(inputs, monkeypatch, "search.speed=bytes")
    measure_speed(by_bytes)
    failed = context(inputs, monkeypatch)
    machine.broken = {"None"}
    measure_speed(failed)
    assert by_bytes.state.speed is None and failed.state.speed.models == ()
    plan = Plan.parse("SNW", 8)
    for run in (by_bytes, failed):
        assert speedup(run, plan) == run.inputs.predicted_speedup(plan)
        times = layer_times(run)
        whole = sum(times[treatment][layer] for layer, treatment in enumerate(plan.treatments))
        all_none = 1 / run.inputs.predicted_speedup(Plan.uniform(Treatment.NONE, 3))
        assert all_none + whole == pytest.approx(1 / run.inputs.predicted_speedup(plan))
    assert predictions(failed.state)(plan, 1) is None


def test_groups_have_one_condition_and_checkpoints_on_a_gpu_are_alone(inputs, monkeypatch):
    run = context(inputs, monkeypatch)
    base = {n: throughput_unit(run, None, n) for n in (1, 2)}
    plan = {n: throughput_unit(run, Plan.parse("SNS"), n) for n in (1, 2)}
    healed = throughput_unit(run, None, 2, checkpoint="x")
    assert groups([plan[2], base[1], healed, plan[1]], on_gpu=False) == [
        (base[1], plan[1]),
        (base[2], plan[2]),
        (base[2], healed),
    ]
    assert groups([healed], on_gpu=True) == [(healed,)]


@pytest.fixture
def served(machine, monkeypatch) -> FakeMachine:
    environment = ServingEnvironment("/venv", "0.32.0", "0.2", "2.0", "5.0", "a CPU (2 cores)")
    monkeypatch.setattr("orchestrator.checks.serving.serving_environment", lambda *_: environment)
    monkeypatch.setattr(timing, "serving_environment", lambda *_: environment)
    monkeypatch.setattr(timing, "measure_groups", machine.serve)
    return machine


VLLM = ("throughput.engine=vllm", "throughput.concurrency=[1, 4]", "throughput.prompt_tokens=16")


def test_with_vllm_a_server_is_timed_under_all_conditions_and_scaled_to_the_parent(inputs, served, monkeypatch):
    run = context(inputs, monkeypatch, *VLLM)
    measure_speed(run)
    assert [len(group) for group in served.groups] == [2] * 8 and served.groups[0][0].plan is None
    late = {throughput_unit(run, None, n, checkpoint="healed/x"): ({"plan": "NNS"}, "k") for n in (1, 4)}
    keys = time_models(run, "throughput", late, timing.measuring_hardware(run))
    assert [[unit.checkpoint for unit in group] for group in served.groups[8:]] == [[None] * 2, ["healed/x"] * 2]
    base = run.folder.read_record("throughput", run.state.speed.measured[0].key).result
    for unit, key in keys.items():
        record = run.folder.read_record("throughput", key)
        # The call started the machine's ninth and tenth server; the tenth's timing is scaled to the ninth's.
        assert record.result["output_throughput_tok_per_s"] == pytest.approx(unit.concurrency / 10 / 10 * 9)
        assert record.result["scaled_by"] == pytest.approx(9) and record.result["duration_s"] == 2.0
        assert record.identity["engine_versions"]["vllm"] == "0.32.0" and "/venv" not in str(record.identity)
    assert "scaled_by" not in base


def test_a_condition_that_a_server_fails_under_takes_no_other_with_it(inputs, served, monkeypatch):
    run = context(inputs, monkeypatch, *VLLM)
    served.broken = {4}
    units = {throughput_unit(run, plan, n): ({"plan": str(plan)}, None) for plan in (None, BASE) for n in (1, 4)}
    keys = time_models(run, "throughput", units, "a CPU (2 cores)")
    there = [unit.concurrency for unit, key in keys.items() if run.folder.read_record("throughput", key)]
    assert there == [1, 1]
    assert [failure.name["concurrency"] for failure in run.state.failures] == [4, 4]
    assert run.state.failures[0].error == "15 of 16 requests"


def test_servers_on_a_gpu_need_no_parent_beside_them(inputs, served, monkeypatch):
    run = context(inputs, monkeypatch, *VLLM)
    healed = throughput_unit(run, None, 4, checkpoint="x")
    base = throughput_unit(run, None, 4)
    assert server_groups([healed], on_gpu=True) == [(healed,)]
    assert server_groups([healed], on_gpu=False) == server_groups([healed, base], on_gpu=True) == [(base,), (healed,)]


def test_rows_over_lengths_keep_what_failed(inputs, machine, monkeypatch):
    run = context(inputs, monkeypatch)
    units = {tokens: throughput_unit(run, Plan.parse("NNN"), 2, prompt_tokens=tokens) for tokens in (8, 16)}
    name = {"plan": "NNN", "origin": "all_none", "healed": "no"}
    keys = time_models(run, "lengths", {units[8]: (name, None)}, "a CPU (2 cores)")
    machine.broken = {"NNN"}
    keys |= time_models(run, "lengths", {units[16]: (name, None)}, "a CPU (2 cores)")
    finalist = Finalist(Plan.parse("NNN"), "all_none")
    run.state.lengths = [TimingEntry(finalist, 2, tokens, 4, keys[units[tokens]]) for tokens in (8, 16)]
    ok, failed = length_rows(RecordReader(run.folder), run.state)
    assert (ok["status"], ok["prompt_tokens"], ok["output_throughput_tok_per_s"]) == ("ok", 8, 2.0)
    assert failed["status"] == "failed" and "out of memory" in failed["error"] and "tpot_ms_p50" not in failed
