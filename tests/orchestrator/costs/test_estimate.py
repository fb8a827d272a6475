"""Tests the estimate: its arithmetic on made-up costs, its table, and how it is kept between calls."""

from __future__ import annotations

import functools
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import orchestrator.costs.measure as calibration
from layerboost.costs.costs import Costs, DecodeCosts, EvaluationCosts, HealingCosts
from layerboost.plan import Plan
from layerboost.search.loop import fixed_points
from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator import pipeline
from orchestrator.checks.preflight import preflight
from orchestrator.costs import estimate as module
from orchestrator.costs.estimate import estimate_stages, estimate_table, expected_line
from orchestrator.costs.seconds import decode_s
from orchestrator.recipe.load import load_recipe
from orchestrator.results.estimates import estimate_rows
from orchestrator.run.context import RunContext
from orchestrator.run.entries import StageEstimate
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.state import RECIPE_FILE, RunState, load_state
from orchestrator.stages import timing
from orchestrator.text_tables import duration
from tasks.cluster.resources import NodeResources

TREATMENTS = ("softmax", "none", "linear_window", "window")
EACH = dict.fromkeys(TREATMENTS, 2.0)
COSTS = Costs(
    slowness=0.0,  # leaves out the seconds that do not depend on the model
    load_s=0.0,
    n_parameters=2**20,
    dtype_bytes=4,
    evaluation=EvaluationCosts(
        0.0, 0.0, EACH, EACH, 6.0, {"tasks": 90.0, "text": 180.0}, dict.fromkeys(TREATMENTS, 0.5)
    ),
    healing=HealingCosts({"softmax": 1.0, "none": 0.2, "linear_window": 2.6}, 0.5, 2**18, 0.0),
    decode=(
        DecodeCosts(1, 16, dict.fromkeys(TREATMENTS, 1.0), dict.fromkeys(TREATMENTS, 0.1)),
        DecodeCosts(9, 16, dict.fromkeys(TREATMENTS, 5.0), dict.fromkeys(TREATMENTS, 0.3)),
    ),
    sample_token_s=None,
)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    nodes = (NodeResources("here", "localhost", 1.0, 0.0),)
    monkeypatch.setattr(calibration, "find_nodes", lambda address: nodes)


def context(inputs, *overrides: str) -> RunContext:
    recipe = load_recipe(inputs.recipe, overrides)
    folder = RunFolder(inputs.folder.parent / "out")
    run = RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, RunState("m", 3, "nll", {}), Progress())
    run.progress = Progress(io.StringIO())
    return run


def stages_of(run: RunContext, costs: Costs = COSTS) -> dict[str, StageEstimate]:
    return {stage.stage: stage for stage in estimate_stages(run, costs)}


def test_seconds_follow_from_units_and_their_costs(inputs):
    common = ("healing.curve=[0.5]", "search.speed=bytes", "sensitivity.compare=true")
    found = stages_of(context(inputs, *common, "healing.baselines=[linear_window]"))
    assert list(found) == ["evaluate", "sensitivity", "search", "heal", "curve", "measure", "throughput"]
    assert found["evaluate"].seconds == pytest.approx(4)
    assert found["sensitivity"].seconds == pytest.approx(270), "items are the same, whatever their shares"
    # There are 16 steps, which take the candidate 1.0 s each on average and the baseline 2.6 s; 5 % of the tokens are
    # less than a step.
    steps = 1024 // 64
    assert found["heal"].seconds == pytest.approx(steps * 1.0 + steps * 2.6)
    assert (found["heal"].units, found["heal"].tokens) == (2, 2048)
    # Two plans are judged half-way. Before healing the baseline is `all_linear_window`, which the search judges.
    assert found["curve"].units == 2 and found["curve"].seconds == pytest.approx(12)
    other = stages_of(context(inputs, *common, "healing.baselines=[linear]"))
    assert other["curve"].units == 3, "a baseline of another window"
    assert other["curve"].seconds == pytest.approx(2 * 6 + 4), "before healing it shares the parent's weights"
    # The base, three uniform plans, and two healed plans, each timed together with the parent.
    assert found["throughput"].seconds == pytest.approx((4 + 2 * 2) * 3.2 * (1.0 + 3 * 0.1))


def test_without_comparison_the_sweep_and_the_search_read_the_text_alone(inputs):
    both = stages_of(context(inputs, "sensitivity.compare=true", "search.speed=bytes"))
    text = stages_of(context(inputs, "search.speed=bytes"))
    assert (both["sensitivity"].seconds, text["sensitivity"].seconds) == pytest.approx((270, 180))
    # The sweep has judged the base by everything that its text gives, the search by the likelihood alone.
    assert both["search"].units + 1 == text["search"].units
    by_tasks = stages_of(context(inputs, "search.objective=quality", "search.speed=bytes"))
    each_s = [found["search"].seconds / found["search"].units for found in (by_tasks, text)]
    assert each_s == pytest.approx([2.0, 0.5]), "of the text only the likelihood is measured"


def test_servers_are_asked_in_waves(inputs, monkeypatch):
    run = context(inputs, "healing.tokens=0", "search.speed=bytes", "throughput.concurrency=[9]")
    run.inputs.recipe.throughput.__dict__["engine"] = "vllm"  # skips the checks of the environment
    served = ServingEnvironment("there", vllm="1", layerboost="1", torch="1", transformers="1", hardware="a GPU")
    monkeypatch.setattr(timing, "serving_environment", lambda *_: served)
    # The base, three uniform plans and the base again. Each runs 36 requests, 9 at a time, three times, and one more
    # wave to warm up.
    assert stages_of(run)["throughput"].seconds == pytest.approx(5 * (1 + 3 * 4) * (5.0 + 3 * 0.3))


def test_all_healings_but_the_first_do_without_the_teacher(inputs):
    taught = replace(COSTS, healing=replace(COSTS.healing, teacher_step_s=0.1))
    two = ("healing.candidates=2", "healing.baselines=[]", "healing.curve=[]")
    apart = stages_of(context(inputs, *two, "healing.teacher_cache_gib=0"), taught)["heal"]
    assert apart.seconds == pytest.approx(2 * 16 * 1.0), "a step of each includes the teacher"
    shared = stages_of(context(inputs, *two), taught)["heal"]
    assert shared.seconds == pytest.approx(16 * 1.0 + 16 * 0.9)
    named = stages_of(context(inputs, *two, "healing.baselines=[parent]"), taught)["heal"]
    assert named.seconds == pytest.approx(3 * 16 * 1.0 - 2 * 16 * 0.1)


def test_transfer_steps_cost_their_own(inputs):
    found = stages_of(context(inputs, "healing.transfer_fraction=0.5"))
    assert found["heal"].seconds == pytest.approx(8 * 0.5 + 8 * 1.0)


def test_halving_adds_its_rungs(inputs):
    overrides = ("healing.halving={plans: 4, first: 0.25, rungs: 1}", "healing.curve=[]")
    found = stages_of(context(inputs, *overrides))
    assert (found["halving"].units, found["halving"].tokens) == (4, 4 * 256)
    assert found["halving"].seconds == pytest.approx(4 * 4 * 1.0 + 4 * 0.5), "rungs are judged by likelihood"
    both = stages_of(context(inputs, *overrides, "sensitivity.compare=true"))
    assert both["halving"].seconds == pytest.approx(4 * 4 * 1.0 + 4 * 6.0)
    assert found["heal"].units == 1
    run = context(inputs, *overrides)
    for number in range(4):
        run.folder.write_record("halving", {"healing": number}, {"duration_s": 1.0})
    assert stages_of(run) == found, "healings of another run"


def test_conditions_between_those_that_were_timed(inputs):
    assert decode_s(COSTS.decode, None, 5, 16, middle="window") == pytest.approx((3.0, 0.2))
    assert decode_s(COSTS.decode, Plan.parse("SSN"), 9, 16, middle="window") == pytest.approx((5.0, 0.3))
    longest = (DecodeCosts(2, 100, EACH, EACH),)
    assert decode_s(longest, None, 2, 50, middle="window") == pytest.approx((1.0, 2.0)), (
        "a prefill grows with its tokens"
    )


def test_what_is_recorded_costs_nothing_and_tells_what_the_rest_costs(inputs):
    run = context(inputs)
    before = stages_of(run)["search"]
    for name in ("search", "scores"):
        run.folder.write_record(name, {"unit": "made up"}, {"duration_s": 50.0})
    assert stages_of(run)["search"] == before, "what another run has made is no unit of this one"
    removed = run.inputs.plan_scores(Plan.parse("NNN"), run.inputs.search_quality_spec)
    run.record("search", removed, {"scores": {}, "duration_s": 50.0})
    after = stages_of(run)["search"]
    assert after.recorded == 1 and after.units == before.units
    assert after.seconds == pytest.approx(50 * (before.units - 1))


def test_more_workers_share_the_units(inputs, monkeypatch):
    alone = stages_of(context(inputs))["sensitivity"].seconds
    nodes = (NodeResources("here", "localhost", 2.0, 0.0),)
    monkeypatch.setattr(calibration, "find_nodes", lambda address: nodes)
    shared = stages_of(context(inputs))["sensitivity"].seconds
    assert alone / 2 < shared < 0.75 * alone, "workers that run together are each slower than one alone"


def test_memory_of_healing_follows_what_is_trained(inputs):
    run = context(inputs, "healing.batch_sequences=2")
    lora = stages_of(run)["heal"].memory_mib
    # There are 4 MiB of weights. A quarter of the 2**20 numbers is trained; each needs itself, a gradient and two
    # moments in fp32.
    activations = 2 * 32 * 16 * 3 * 34 * 4 / 2**20
    assert lora == pytest.approx(4 + 0.25 * 4 * 4 + activations)
    full = replace(COSTS, healing=replace(COSTS.healing, n_trained=2**20))
    assert stages_of(run, full)["heal"].memory_mib == pytest.approx(4 + 4 * 4 + activations)


def test_the_table_has_a_total_and_says_what_does_not_fit():
    stages = [StageEstimate("evaluate", 1, 0, 10.0, memory_mib=5), StageEstimate("heal", 2, 1, 125.0, 7, 2.0, 500)]
    text = estimate_table(stages, device_mib=100)
    assert [line.split()[0] for line in text.splitlines()] == ["stage", "evaluate", "heal", "total", "memory:"]
    assert text.splitlines()[3].split() == ["total", "3", "1", "135", "0.06944", "7"]
    assert "heal needs about 500 MiB" in text and "activation_checkpointing" in text
    assert "memory:" not in estimate_table(stages, device_mib=1000)
    assert expected_line(stages) == "expected: 2 min 15 s in all; heal 2 min 5 s, evaluate 10 s"
    assert [duration(s) for s in (0.4, 59.4, 61, 12000)] == ["0 s", "59 s", "1 min 1 s", "3 h 20 min"]


def test_rows_compare_expected_and_actual(tmp_path):
    state = RunState("m", 3, "nll", {}, stage_s={"heal": 30.0, "calibration": 4.0})
    state.estimates = [StageEstimate("heal", 2, 0, 20.0, 64, 2.0, 9.0)]
    healed, calibrated = estimate_rows(RunFolder(tmp_path), state)
    assert healed == {
        "stage": "heal",
        "units": 2,
        "estimated_s": 20.0,
        "actual_s": 30.0,
        "ratio": 1.5,
        "estimated_tokens": 64,
        "actual_tokens": None,
        "estimated_gpu_hours": pytest.approx(40 / 3600),
        "actual_gpu_hours": pytest.approx(60 / 3600),
        "memory_mib": 9.0,
    }
    assert (calibrated["stage"], calibrated["actual_s"], calibrated["ratio"]) == ("calibration", 4.0, None)


def made_up_calibration(inputs, nodes):
    yield from ((part, COSTS) for part in calibration.calibration_parts(inputs))


def dry_run(run: RunContext) -> int:
    return pipeline.dry_run(run.inputs.recipe, run.folder, run.inputs.facts)


def test_a_dry_run_leaves_its_calibration_and_nothing_else(inputs, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "calibrate", made_up_calibration)
    run = context(inputs)
    assert dry_run(run) == 0
    first = capsys.readouterr()
    assert "total" in first.out
    parts = [line.split()[1:] for line in first.err.splitlines() if " done " in line]
    assert [(at, found) for at, _, found, *_ in parts] == [
        (f"{number}/4", f"part={name}") for number, name in enumerate(["load", "heal", "judge", "decode"], start=1)
    ]
    assert [path.relative_to(run.folder.path).parts[:2] for path in Path(run.folder.path).rglob("*.json")] == [
        ("records", "calibration")
    ]
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("measured again"))
    assert dry_run(context(inputs)) == 0
    second = capsys.readouterr()
    assert second.out == first.out and "calibration 4/4" in second.err


def test_what_healing_takes_is_said_before_the_rest_is_timed(inputs, monkeypatch):
    def parts(inputs, nodes):
        costs = replace(COSTS, healing=replace(COSTS.healing, step_s=dict.fromkeys(TREATMENTS, 0.0)))
        for part in calibration.calibration_parts(inputs):
            costs = COSTS if part == "heal" else costs
            yield part, costs

    monkeypatch.setattr(calibration, "calibrate", parts)
    run, printed = context(inputs), io.StringIO()
    monkeypatch.setattr(calibration, "_measured", functools.partial(_measured_here, calibration._measured))
    run.progress = Progress(printed)
    pipeline._estimate(run)
    lines = printed.getvalue().splitlines()
    early = [number for number, line in enumerate(lines) if line.startswith("expected:")]
    assert len(early) == 2 and "of healing; the other stages are being timed" in lines[early[0]]
    assert "part=heal" in lines[early[0] - 1] and "in all" in lines[early[1]]
    heal = next(stage for stage in run.state.estimates if stage.stage == "heal")
    assert duration(heal.seconds) in lines[early[0]]


def _measured_here(measured, run, nodes, on_cluster, on_part):
    return measured(run, nodes, False, on_part)


def test_a_dry_run_says_where_it_cannot_keep_its_calibration(inputs, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "calibrate", made_up_calibration)
    run = context(inputs)
    with RunFolder(run.folder.path).lock():
        assert dry_run(run) == 0
    printed = capsys.readouterr()
    assert "total" in printed.out and "the calibration is not recorded" in printed.err
    assert str(os.getpid()) in printed.err, "it names who holds the folder"
    assert not list(Path(run.folder.path).rglob("*.json"))


def test_a_dry_run_in_a_folder_that_cannot_be_written(inputs, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "calibrate", made_up_calibration)
    run = context(inputs)
    monkeypatch.setattr(RunFolder, "lock", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert dry_run(run) == 0
    printed = capsys.readouterr()
    assert "total" in printed.out and "the calibration is not recorded because=" in printed.err


def test_a_calibration_that_is_recorded_is_used(inputs, monkeypatch):
    run = context(inputs)
    nodes = calibration.find_nodes(None)
    identity = calibration.calibration_identity(run.inputs, nodes, calibration._device_name())
    run.record(calibration.CALIBRATION, identity, {"costs": COSTS.to_dict()})
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("measured again"))
    assert calibration.costs_of(run, on_cluster=True) == COSTS
    other = context(inputs, "healing.rank=4")
    assert calibration.calibration_identity(other.inputs, nodes, "same") != {**identity, "hardware": "same"}


def test_every_treatment_that_a_plan_can_have_is_timed(inputs):
    both = context(inputs, "healing.baselines=[window, parent]").inputs
    assert {t.value for t in calibration.healed_treatments(both)} == {"softmax", "none", "linear_window", "window"}
    plain = context(inputs, "healing.baselines=[]", "search.middle=window").inputs
    assert {t.value for t in calibration.healed_treatments(plain)} == {"softmax", "none", "window"}
    uniform = {plan.treatments[0] for _, plan in fixed_points(plain.search_spec, plain.n_layers)}
    assert set(calibration.timed_treatments(plain)) == uniform | set(calibration.healed_treatments(plain))
    assert len(uniform) == 4


def run_with(monkeypatch, run: RunContext, stage) -> None:
    """Runs the command with one made-up stage."""
    monkeypatch.setattr(pipeline, "STAGES", {"evaluate": stage})
    monkeypatch.setattr(calibration, "costs_of", lambda run, on_cluster, on_part: COSTS)
    monkeypatch.setattr(pipeline, "_write_report", lambda folder: None)
    pipeline.run(
        run.inputs.recipe,
        run.folder,
        run.inputs.facts,
        until="evaluate",
        address=None,
        progress=Progress(io.StringIO()),
    )


def test_the_first_estimate_stays_and_seconds_add_up_over_calls(inputs, monkeypatch):
    import orchestrator.run.progress as progress_module

    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])

    def works(run: RunContext) -> bool:
        now[0] += 1.0  # time between stages counts for the next one
        run.progress.start_stage("evaluate", 1)
        now[0] += 4.0
        run.progress.end_stage()
        return True

    def fails(run: RunContext) -> bool:
        run.progress.start_stage("evaluate", 1)
        now[0] += 7.0
        raise KeyboardInterrupt

    run = context(inputs)
    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, run, fails)
    interrupted = load_state(run.folder)
    assert interrupted.stage_s["evaluate"] == pytest.approx(7.0)
    assert {entry.stage for entry in interrupted.estimates} >= {"evaluate", "heal", "throughput"}
    monkeypatch.setattr(module, "estimate_stages", lambda *_: pytest.fail("estimated again"))
    run_with(monkeypatch, run, works)
    resumed = load_state(run.folder)
    assert resumed.stage_s["evaluate"] == pytest.approx(12.0)
    assert resumed.estimates == interrupted.estimates


def test_another_recipe_in_the_folder_is_estimated_anew(inputs, monkeypatch):
    def stage(run: RunContext) -> bool:
        return True

    run = context(inputs)
    run_with(monkeypatch, run, stage)
    other = context(inputs, "search.trials=9")
    run_with(monkeypatch, other, stage)
    trials = [{e.stage: e for e in load_state(run.folder).estimates}["search"].units]
    assert trials[0] > stages_of(run)["search"].units
    assert "trials: 9" in run.folder.read_text(RECIPE_FILE)
    shutil.rmtree(run.folder.path)
