"""Tests stage `heal` without a cluster: identity of a healed plan, job, baselines, sampled text and tables."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layerboost.evaluation.evaluate import text_scores
from layerboost.plan import Plan
from layerboost.text.sources import write_token_rows
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import load_recipe
from orchestrator.results.healing import baseline_rows, branch_rows, early_stops, healing_rows, quality_curve_rows
from orchestrator.results.plans import candidate_rows, pareto_rows
from orchestrator.results.reading import RecordReader
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BranchesEntry, Finalist, FinalistEntry, HealedEntry, TimingEntry, Trial
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.placement import Placement
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.stages import curve, sampled
from orchestrator.stages.baselines import baselines
from orchestrator.stages.candidates import candidates
from orchestrator.stages.curve import curve_entries, measure_curves, snapshot_folder
from orchestrator.stages.heal import healed_entry, plans_to_heal
from orchestrator.stages.healing_jobs import TEACHER_CACHE, healed_name, healed_unit, healing_job, teacher_cache
from tasks.cluster.resources import NodeResources, WorkerResources
from tasks.evaluation import EvaluationUnit, cosine_unit

PLAN, OTHER = Plan.parse("SLN", 8), Plan.parse("NLS", 8)


def context(inputs, *overrides: str) -> RunContext:
    recipe = load_recipe(inputs.recipe, overrides)
    folder = RunFolder(inputs.folder.parent / "out")
    facts = preflight(recipe, folder)
    return RunContext(RunInputs(recipe, facts), folder, RunState("m", 3, "nll", {}), Progress(), None)


def key_of(inputs, *overrides: str) -> str:
    return unit_key(context(inputs, *overrides).inputs.healing(PLAN))


def test_what_only_memory_depends_on_is_no_part_of_the_identity(inputs):
    shutil.copytree(inputs.model, inputs.folder / "teacher")
    key = key_of(inputs)
    for same in (
        "healing.zero_stage=3",
        "healing.micro_batch_sequences=1",
        "healing.activation_checkpointing=true",
        "healing.offload_optimizer=true",
        "healing.transfer=by_layer",
        "healing.curve=[0.5]",
        "healing.teacher_cache_gib=0",
        "healing.baselines=[last]",
        "placement.healing_workers=1",
        "placement.cpus_per_worker=1",
        "healing.text=[{path: heal.txt}]",
    ):
        assert key_of(inputs, same) == key, same
    others = [
        "healing.divergence=reverse_kl",
        "healing.window_dropout=0.1",
        "healing.stop_when_flat=0.1",
        "healing.documents=apart",
        "healing.teacher=./teacher",
        "healing.text=[{path: heal.txt}, {format: sampled, weight: 1}]",
        "healing.text=[{path: heal.txt}, {format: sampled, weight: 2}]",
        "healing.text=[{path: heal.txt}, {format: sampled, weight: 2, temperature: 0.5}]",
    ]
    assert len({key, *(key_of(inputs, other) for other in others)}) == len(others) + 1


def test_the_job_has_what_the_recipe_says(inputs):
    shutil.copytree(inputs.model, inputs.folder / "teacher")
    run = context(
        inputs,
        "healing.text=[{path: heal.txt, weight: 3}, {format: sampled, weight: 1}]",
        "healing.teacher=./teacher",
        "healing.documents=apart",
        "healing.offload_optimizer=true",
        "healing.transfer=by_layer",
        "healing.curve=[0.5]",
        "healing.micro_batch_sequences=1",
    )
    job = healing_job(run, PLAN, "0123456789abcdef", WorkerResources(2, 1.0, 0.0))
    text, own = job.text.sources
    assert (text.path, text.weight, text.format) == (str(inputs.folder / "heal.txt"), 3.0, "text")
    assert (own.path, own.weight, own.format) == (sampled.sampled_folder(run), 1.0, "tokens")
    assert job.teacher.path == str(inputs.folder / "teacher")
    assert (job.text.apart, job.zero.offload_optimizer) == (True, True)
    assert (job.transfer, job.workers.n_workers) == ("by_layer", 2)
    assert job.snapshots.shares == (0.5,)
    assert job.snapshots.url == f"{run.folder}/{snapshot_folder(job.name)}"
    assert job.spec.micro_batch_sequences == 1


def test_any_number_of_workers_up_to_the_sequences_of_a_step(inputs):
    context(inputs, "healing.batch_sequences=3", "placement.healing_workers=1")
    with pytest.raises(InputError, match=r"placement.healing_workers: 4: is more than the 3 sequences of a step"):
        context(inputs, "healing.batch_sequences=3", "placement.healing_workers=4")


@pytest.mark.parametrize(
    ("cpus", "asked", "expected"),
    [
        ([2], "auto", (1, 2)),
        ([4, 8], "auto", (1, 8)),
        ([8, 8, 8], 4, (4, 4)),
        ([4, 4, 4], 4, (4, 2)),
        ([8, 4], 4, (4, 2)),
        ([64, 8], 4, (4, 16)),
    ],
)
def test_workers_of_healing_fit_on_the_nodes(inputs, cpus, asked, expected):
    run = context(inputs, "healing.batch_sequences=4")
    placement = run.inputs.recipe.placement.model_copy(update={"healing_workers": asked})
    run.inputs = replace(run.inputs, recipe=run.inputs.recipe.model_copy(update={"placement": placement}))
    nodes = [NodeResources(str(n), "", float(of_node), 0.0) for n, of_node in enumerate(cpus)]
    found = Placement(run.inputs.recipe, nodes).healing()
    assert (found.n_workers, found.cpus, found.gpus) == (*expected, 0.0)


def test_jobs_side_by_side_share_the_cpus_and_not_the_gpus(inputs):
    run = context(inputs)
    two, large = NodeResources("a", "", 2.0, 0.0), NodeResources("b", "", 64.0, 0.0)

    def size(node: NodeResources, n_jobs: int = 1) -> tuple[int, float, float]:
        found = Placement(run.inputs.recipe, [node]).healing(n_jobs)
        return found.n_workers, found.cpus, found.gpus

    assert size(two, 12) == (1, 1.0, 0.0)
    assert size(large, 3) == (1, 21.0, 0.0)
    assert size(large, 100) == (1, 8.0, 0.0)
    gpus = NodeResources("c", "", 64.0, 8.0)
    assert size(gpus, 100) == size(gpus) == (2, 1.0, 1.0)


def trial(plan: Plan, objective: float | None, speedup: float, quality: float = 0.5) -> Trial:
    return Trial(plan, "search", quality=quality, quality_stderr=0.1, objective=objective, speedup=speedup)


def test_candidates_go_by_the_objective_and_hold_the_constraints(inputs, capsys):
    overrides = ("healing.candidates=2", "constraints.at_most={n_softmax: 1}", "constraints.pin={2: none}")
    run = context(inputs, *overrides)
    plans = [Plan.parse(text, 8) for text in ("SSN", "SNN", "NSN", "NNN")]
    rising = [trial(plan, -0.1 * n, 1.2 + 0.3 * n, quality=0.1 * n) for n, plan in enumerate(plans)]
    run.state.trials = [*rising, trial(Plan.parse("SSS"), 0.0, 1.0)]
    assert set(candidates(run, 9)) == set(plans[1:])
    assert len(candidates(run)) == 2
    assert candidates(run, 1) == [plans[1]]
    run.state.trials = [replace(entry, objective=None) for entry in run.state.trials]
    assert candidates(run, 1) == [], "nothing is known of what they keep"
    run.state.trials = rising[:1]
    assert plans_to_heal(run) == {}
    (failure,) = run.state.failures
    assert failure.stage == "candidates"
    assert "none of them holds constraints.pin.2, at_most.n_softmax" in capsys.readouterr().err


def test_baselines_are_made_for_each_candidate_and_no_plan_twice(inputs):
    run = context(inputs, "healing.baselines=[window, linear, interleaved_1/2, cosine, first, last]")
    identity = run.inputs.scores(cosine_unit(), run.inputs.text_spec)
    run.record("sensitivity", identity, {"cosine": [[0.3, 0.5], [0.1, 0.1], [0.2, 0.2]], "duration_s": 0.0})
    found = baselines(run, [PLAN, Plan.parse("SSN")])
    assert {(str(plan), plan.window): origin for plan, origin in found.items()} == {
        ("WWW", 8): "window",
        ("LLL", 1): "linear",
        ("SLS", 8): "interleaved_1/2",
        ("SNL", 8): "cosine",  # the layer that changes the residual stream's direction least loses its attention
        ("SNS", None): "cosine",
        ("NLS", 8): "first",
        ("NSS", None): "first",
    }
    alone = baselines(run, [])  # without a candidate there is no budget to match
    assert list(alone.values()) == ["window", "linear", "interleaved_1/2"]


def test_the_control_is_the_parent_healed_alike(inputs):
    run = context(inputs, "healing.baselines=[parent, window]", "quality.tasks=[]", "healing.curve=[0.5]")
    untouched = Plan.parse("SSS")
    found = baselines(run, [PLAN])
    assert found == {untouched: "parent", Plan.parse("WWW", 8): "window"}
    before_healing = [unit for unit, name in curve._points(run, [], list(found), {})[0].items() if name["share"] == 0]
    assert before_healing == [EvaluationUnit(), EvaluationUnit(plan=Plan.parse("WWW", 8))], "the base is judged once"
    run.state.trials = [Trial(untouched, "base"), Trial(PLAN, "search", 0.1, 0.2)]
    spec, nll = run.inputs.full_spec, {untouched: 1.0, PLAN: 1.2}
    base = run.inputs.plan_scores(untouched, spec)
    record(run, "evaluate", base, 1.1)
    run.state.base_key = unit_key(base)
    finalists = [FinalistEntry(Finalist(untouched, "base"), unit_key(base))]
    for plan, origin in ((untouched, "parent"), (PLAN, "search")):
        key = unit_key(run.inputs.healing(plan))
        run.record("heal", run.inputs.healing(plan), {"tokens": 64})
        identity = run.inputs.scores(healed_unit(run, plan), spec, key)
        record(run, "measure", identity, nll[plan])
        run.state.healed.append(HealedEntry(plan, origin, key, unit_key(identity), ()))
        finalists.append(FinalistEntry(Finalist(plan, origin, key), unit_key(identity)))
    run.state.finalists = finalists
    run.state.throughput = [TimingEntry(entry.finalist, 1, 16, 4, "0" * 16) for entry in finalists]
    rows = pareto_rows(RecordReader(run.folder), run.state, lambda plan, concurrency: None)
    shares = {row["origin"]: (row["quality_retained"], row["control_retained"]) for row in rows}
    assert shares["base"] == pytest.approx((1, math.exp(-0.1)))
    assert shares["parent"] == pytest.approx((math.exp(0.1), 1)), "it gains, though nothing of it was treated"
    assert shares["search"] == pytest.approx((math.exp(-0.1), math.exp(-0.2)))
    assert all(row["control_retained_stderr"] is not None for row in rows)


def missing(run) -> list:
    return [unit.work for unit in sampled.list_documents(run).todo]


def give_tokens(run, n_tokens_of_unit) -> None:
    for unit in missing(run):
        n_tokens = n_tokens_of_unit(unit)
        write_token_rows(f"{sampled.sampled_folder(run)}/{unit.first:09d}.safetensors", [[1, 5, 2]])
        run.record("sample", run.inputs.sample(unit), {"tokens": n_tokens, "duration_s": 1.0})


def test_the_teachers_states_are_kept_where_several_plans_share_them(inputs, monkeypatch):
    one = ("healing.candidates=1", "healing.baselines=[]")
    assert teacher_cache(context(inputs, *one)) is None
    for several in (("healing.candidates=2", one[1]), (one[0], "healing.baselines=[parent]")):
        cache = teacher_cache(context(inputs, *several))
        assert cache is not None and cache.max_gib == 8
        assert Path(cache.folder).parent == inputs.folder.parent / "out" / TEACHER_CACHE
        for without in ("teacher_cache_gib=0", "zero_stage=3", "hidden_weight=0.1"):
            assert teacher_cache(context(inputs, *several, f"healing.{without}")) is None
    run = context(inputs, *several)
    other = teacher_cache(context(inputs, *several, "model.dtype=bfloat16"))
    assert other is not None and other.folder != cache.folder, "states of another dtype lie elsewhere"
    assert cache == healing_job(run, PLAN, "key", WorkerResources(1, 1.0, 0.0)).teacher_cache
    monkeypatch.setattr(run.folder, "is_local", False)
    assert teacher_cache(run) is None


def test_documents_are_sampled_until_they_fill_their_share(inputs):
    run = context(inputs, "healing.text=[{path: heal.txt, weight: 3}, {format: sampled, weight: 5}]")
    assert run.inputs.sampled_tokens == 1024 * 5 // 8 + 32
    assert len(sampled.list_documents(run).units) == 1
    give_tokens(run, lambda unit: 100)
    # Documents came out shorter than possible, so enough further ones of that length are asked for to fill the rest.
    assert [unit.first for unit in missing(run)] == [32 * n for n in range(1, 7)]
    give_tokens(run, lambda unit: 99)
    assert missing(run) == []
    assert len(sampled.list_documents(run).units) == 7
    next(iter((inputs.folder.parent / "out" / "texts").glob("*/000000032.safetensors"))).unlink()
    assert [unit.first for unit in missing(run)] == [32], "a record without its file is not done"


def recorded_run(inputs) -> tuple[RunContext, dict[Plan, str]]:
    """Returns a run whose healing of a candidate and a baseline is recorded, and the keys of both."""
    run = context(inputs, "quality.tasks=[]", "healing.curve=[0.5]", "healing.baselines=[first]")
    base = run.inputs.plan_scores(Plan.parse("SSS"), run.inputs.full_spec)
    run.state.base_key = unit_key(base)
    record(run, "evaluate", base, 1.0)
    run.state.trials = [Trial(PLAN, "search", 0.1, 0.2, quality=0.4, quality_stderr=0.1, speedup=1.5, objective=-0.1)]
    origins = plans_to_heal(run)
    assert origins == {PLAN: "search", OTHER: "first"}
    keys = {plan: unit_key(run.inputs.healing(plan)) for plan in origins}
    for plan, key in keys.items():
        n_steps = 16 if plan == PLAN else 12
        rows = [{"phase": "heal", "step": n, "tokens": 64 * n, "loss": 1.0 / n} for n in range(1, n_steps + 1)]
        result = {
            "tokens": 64 * n_steps,
            "budget": 1024,
            "curve": rows,
            "held_out": [{"step": 0, "divergence": 2.0}, {"step": 8, "divergence": 1.0}],
            "stopped_early": n_steps < 16,
            "snapshots": [{"step": 8, "share": 0.5}],
        }
        run.record("heal", run.inputs.healing(plan), result)
        run.folder.write_text(f"{snapshot_folder(key)}/8.safetensors", "")
        run.folder.write_text(f"{healed_name(plan)}/healing.json", json.dumps({"key": key}))
    return run, keys


def record(run, stage_name, identity, nll) -> None:
    items = [nll + 0.01 * n for n in range(4)]
    scores = text_scores(items, [0.0] * 4, primary=True)
    run.record(stage_name, identity, {"scores": scores.to_dict(), "duration_s": 1.0})


def test_snapshots_are_judged_once_and_deleted_when_all_are(inputs, monkeypatch):
    run, keys = recorded_run(inputs)
    judged = []

    def evaluate(stage_name, spec, units, healed_keys):
        for unit in units:
            identity = run.inputs.scores(unit, spec, healed_keys.get(unit))
            if run.recorded(identity) is None:
                judged.append(unit)
                if unit.plan != OTHER or unit.trained is None:
                    record(run, stage_name, identity, 2.0)
        return True

    monkeypatch.setattr(run, "evaluate", evaluate)
    measure_curves(run, list(keys.items()))
    assert [(unit.plan, unit.trained is not None) for unit in judged] == [
        (PLAN, False),
        (PLAN, True),
        (OTHER, False),
        (OTHER, True),
    ]
    assert not run.folder.exists(snapshot_folder(keys[PLAN]))
    assert run.folder.exists(snapshot_folder(keys[OTHER])), "one that failed is kept for another try"
    judged.clear()
    measure_curves(run, list(keys.items()))
    assert [(unit.plan, unit.trained is not None) for unit in judged] == [(OTHER, True)]


def test_a_lost_snapshot_is_told_and_leaves_the_rest(inputs, monkeypatch, capsys):
    run, keys = recorded_run(inputs)
    run.folder.remove(snapshot_folder(keys[PLAN]))
    asked = []
    monkeypatch.setattr(run, "evaluate", lambda stage_name, spec, units, healed_keys: asked.extend(units))
    measure_curves(run, [(PLAN, keys[PLAN])])
    assert asked == [EvaluationUnit(plan=PLAN)]
    assert "healed without snapshots at shares 0.5: no such points plan=SLN" in capsys.readouterr().err


def test_tables_of_healing_come_from_the_records(inputs):
    run, keys = recorded_run(inputs)
    spec, folder, state = run.inputs.full_spec, run.folder, run.state
    for plan, healed_nll in ((PLAN, 1.2), (OTHER, 1.1)):
        record(run, "curve", run.inputs.plan_scores(plan, spec), 2.0)
        middle = EvaluationUnit(plan=plan, trained="snapshot", healing=run.inputs.healing_spec)
        record(run, "curve", run.inputs.scores(middle, spec, f"{keys[plan]}@8"), 1.5)
        record(run, "measure", run.inputs.scores(healed_unit(run, plan), spec, keys[plan]), healed_nll)
    origins = {PLAN: "search", OTHER: "first"}
    state.healed = [healed_entry(run, plan, origins[plan], key) for plan, key in keys.items()]
    points = [(row["origin"], row["share"], row["tokens"]) for row in quality_curve_rows(RecordReader(folder), state)]
    assert points == [
        *[("search", share, tokens) for share, tokens in ((0.0, 0), (0.5, 512), (1.0, 1024))],
        *[("first", share, tokens) for share, tokens in ((0.0, 0), (0.5, 512), (0.75, 768))],
    ]
    assert all(0 < row["quality_retained"] < 1 for row in quality_curve_rows(RecordReader(folder), state))
    assert curve_entries(run, PLAN, keys[PLAN])[1].key == state.healed[0].curve[1].key

    (beside,) = baseline_rows(RecordReader(folder), state)
    assert (beside["origin"], beside["candidate"], beside["plan"]) == ("first", "SLN", "NLS")
    assert beside["nll_gain"] == pytest.approx(0.1)
    assert beside["nll_gain_stderr"] == pytest.approx(0.0, abs=1e-9)
    assert beside["quality_ratio"] > 1

    losses = [row for row in healing_rows(RecordReader(folder), state) if row["plan_id"] == PLAN.plan_id]
    assert [row["step"] for row in losses] == list(range(17))
    assert (losses[0]["loss"], losses[0]["held_out_divergence"], losses[0]["tokens"]) == (None, 2.0, 0)
    assert (losses[8]["held_out_divergence"], losses[7]["held_out_divergence"]) == (1.0, None)
    (stop,) = early_stops(RecordReader(folder), state)
    assert (stop["plan_id"], stop["tokens"], stop["budget"]) == (OTHER.plan_id, 768, 1024)

    rows = {row["plan_id"]: row for row in candidate_rows(RecordReader(folder), state, lambda plan, concurrency: None)}
    assert rows[OTHER.plan_id]["origin"] == "first"
    assert rows[OTHER.plan_id]["status"] == "ok" and 0 < rows[OTHER.plan_id]["quality"] < 1


def test_branches_come_from_the_records(inputs):
    run = context(inputs)
    unit = EvaluationUnit("branches", checkpoint="healed")
    identity = run.inputs.scores(unit, run.inputs.full_spec, "key")
    values = {"nll": 2.0, "nll_loss": 0.0, "nll_loss_stderr": 0.0, "n_items": 4}
    run.record("measure", identity, {"branches": [{"zeroed": zeroed, **values} for zeroed in (None, "linear")]})
    run.state.branches = [BranchesEntry(Finalist(PLAN, "search", "key"), unit_key(identity))]
    first, second = branch_rows(RecordReader(run.folder), run.state)
    assert (first["branch_zeroed"], second["branch_zeroed"]) == (None, "linear")
    assert first["window"] == 8 and first["n_items"] == 4
    run.state.branches[0] = replace(run.state.branches[0], key="0" * 16)
    assert list(branch_rows(RecordReader(run.folder), run.state)) == []


def test_candidates_are_plans_that_may_hold_the_target_after_healing(inputs):
    plans = {text: Plan.parse(text, 8) for text in ("SSN", "SNS", "SNN", "NNN")}
    # The fastest plan covers most of the volume above a plan that keeps nothing, but it is useless.
    found = [("SSN", -0.03, 1.2), ("SNS", -0.2, 1.5), ("SNN", -0.9, 2.5), ("NNN", -3.0, 9.0)]

    def chosen(*overrides: str, n: int = 4) -> list[str]:
        run = context(inputs, *overrides)
        run.state.trials = [trial(plans[text], loss, speedup) for text, loss, speedup in found]
        return [str(plan) for plan in candidates(run, n)]

    assert chosen() == ["SSN", "SNS", "SNN", "NNN"], "what lies below the floor comes last, the slowest first"
    assert chosen("constraints.at_least={quality_retained: 0.9}", n=1) == ["SNN"]
    assert chosen("constraints.at_least={quality_retained: 0.5}", n=1) == ["NNN"]


def test_a_quality_as_objective_is_set_against_that_of_the_base(inputs):
    run = context(inputs, "search.objective=quality")
    base = replace(trial(Plan.parse("SSS"), 0.8, 1.0, quality=0.8), origin="base")
    run.state.trials = [base, trial(Plan.parse("SSN"), 0.78, 1.2), trial(Plan.parse("NNN"), 0.1, 9.0)]
    assert [str(plan) for plan in candidates(run, 1)] == ["SSN"]
