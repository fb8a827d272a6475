"""Tests whole runs of the command on a tiny model: killed in each stage, resumed, damaged, shared, reported again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from layerboost.checkpoint import load_model
from layerboost.convert import plan_of
from layerboost.families import attention_module
from tests.conftest import Inputs, repeatable_recipe
from tests.ray_workers import workers_of
from tests.results import TABLES, assert_equal_results, table

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KILL_AT = {
    # Each stage has the first words of the progress line after which the driver is killed.
    "sensitivity": "sensitivity 4/9 done",
    "search": "search 2/",
    "race": "race 2/",
    "refine": "refine 2/",
    "heal": "heal step ",
    "curve": "curve 2/",
    "report": "throughput 2/",
}


def command(inputs, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "run", str(inputs.recipe), "--out", str(out), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(inputs, out: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command(inputs, out, *arguments), env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == expect, result.stderr
    return result


def kill_at(inputs, out: Path, line_start: str, *arguments: str) -> None:
    """Starts the run and kills the driver with SIGKILL at the first progress line that starts with `line_start`."""
    process = subprocess.Popen(
        command(inputs, out, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = []
    assert process.stderr is not None
    for line in process.stderr:
        seen.append(line)
        if line.startswith(line_start):
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, "".join(seen)


def calibrated(out: Path, done: Path) -> Path:
    """Gives a new run folder with the calibration of another run, which timed the same model on the same machine."""
    shutil.copytree(done / "records" / "calibration", out / "records" / "calibration")
    return out


def records(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("records/*/*.json")}


@pytest.fixture(scope="module")
def recipe_values() -> dict:
    return {
        # Speeds come from the byte model, because measured speeds, and the plans with them, differ between runs.
        "search": {
            "trials": 3,
            "window": 8,
            "sinks": 2,
            "speed": "bytes",
            "plans": ["SNL"],
            "race": {"first": 0.7},
            "refine": {"method": "greedy", "plans": 8},
        },
        "healing": {
            "tokens": 2048,
            "text": [{"path": "heal.txt", "weight": 3}, {"format": "sampled", "weight": 1}],
            "batch_sequences": 2,
            "sequence_tokens": 32,
            "candidates": 1,
            "baselines": ["linear_window"],
            "curve": [0.5],
            "window_dropout": 0.2,
            "documents": "apart",
            "checkpoint_every_steps": 5,
            "zero_stage": 1,
        },
        "throughput": {"concurrency": [1, 2], "prompt_tokens": 16, "new_tokens": 4},
        "sensitivity": {"score": "nll", "treatments": ["none", "linear_window"], "shares": 4, "compare": True},
        # Each worker's start costs more than all of its units; several are there where tests disturb them.
        "placement": {"workers": 1},
    }


@pytest.fixture(scope="module")
def undisturbed(pristine_inputs, recipe_values, tmp_path_factory):
    """Gives inputs and the folder of an undisturbed run."""
    from tests.conftest import Inputs

    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(pristine_inputs, folder / "inputs")
    quality = {"tasks": ["./task.yaml"], "text": "judge.txt", "sequences": 6, "sequence_tokens": 32}
    inputs = Inputs(folder / "inputs", {"model": {"path": "./model"}, "quality": quality, **recipe_values})
    inputs.write_recipe()
    result = run(inputs, folder / "out")
    return inputs, folder / "out", result


def test_a_run_ends_with_the_front_a_report_and_checkpoints_that_load(undisturbed):
    _, out, result = undisturbed
    assert f"report: {out}/report.html" in result.stdout
    pareto = table(out, "pareto.csv")
    assert set(pareto["status"]) == {"ok"}
    assert {"base", "all_none", "all_window", "all_linear_window", "search"} <= set(pareto["origin"])
    assert set(pareto["concurrency"]) == {1, 2}
    healed = pareto[pareto["healed"]]
    assert healed["plan_id"].nunique() == 2
    has_window = pareto["window"].notna()
    assert set(pareto["sinks"][has_window]) == {2} and pareto["sinks"][~has_window].isna().all()
    assert set(healed["heal_tokens"]) == {2048}
    assert "linear_window" in set(healed["origin"])
    base = pareto[pareto["origin"] == "base"].iloc[0]
    assert base["quality_retained"] == 1
    for plan_id in healed["plan_id"].unique():
        assert plan_of(load_model(str(out / "healed" / plan_id))).plan_id == plan_id
    assert not list((out / "healing").glob("*")), "checkpoints of finished healing are removed"
    assert not list((out / "snapshots").glob("*")), "snapshots that are judged are removed"
    assert not (out / "teacher_states").exists(), "the teacher's states are removed when all plans are healed"
    assert len(list((out / "texts").glob("*/*.safetensors"))) == len(list((out / "records" / "sample").glob("*")))
    curves = table(out, "healing_quality.csv")
    assert set(curves["plan_id"]) == set(healed["plan_id"])
    assert curves.groupby("plan_id")["share"].apply(list).tolist() == [[0, 0.5, 1]] * 2
    last = curves[curves["share"] == 1].set_index("plan_id")["quality"]
    assert last.to_dict() == healed.drop_duplicates("plan_id").set_index("plan_id")["quality"].to_dict()
    branches = table(out, "branches.csv")
    assert branches["branch_zeroed"].fillna("").tolist() == ["", "linear", "window"] * branches["plan_id"].nunique()
    assert set(branches["origin"]) >= {"linear_window"}
    for name in ("pareto.png", "sensitivity.png", "report.html", "recipe.yaml", "sensitivity.csv", "candidates.csv"):
        assert (out / name).stat().st_size > 0
    assert len(table(out, "sensitivity.csv").query("task == 'mean' and metric == 'nll'")) == 2 * 3
    rankings = table(out, "rankings.csv")
    assert set(rankings["score"]) == {"benchmark", "margin", "nll", "kl", "cosine"}
    assert set(rankings.query("chosen")["treatment"]) == {"none", "linear_window"}
    assert len(table(out, "rank_correlations.csv")) == 2 * (10 + 6)
    interactions = table(out, "interactions.csv")
    assert {"all_none", "all_linear_window", "given"} <= set(interactions["origin"])
    single = interactions[interactions["plan"].isin(["NSS", "SNS", "SSN"])]
    assert single["interaction"].abs().max() < 1e-6 or single.empty


def test_killed_in_each_stage_it_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    inputs, expected, _ = undisturbed
    out = tmp_path / "out"
    for line_start in KILL_AT.values():
        before = records(out)
        kill_at(inputs, out, line_start)
        after = records(out)
        assert {name: after[name] for name in before} == before, "a recorded unit ran again"
    before = records(out)
    run(inputs, out)
    after = records(out)
    assert {name: after[name] for name in before} == before
    assert set(after) == set(records(expected))
    assert not list((out / "snapshots").glob("*"))
    assert_equal_results(out, expected)


def test_a_finished_run_does_nothing_and_a_damaged_record_is_redone(undisturbed):
    inputs, out, _ = undisturbed
    before = records(out)
    again = run(inputs, out)
    assert records(out) == before
    assert "duration_s=" not in again.stderr
    ablations = {unit["key"] for unit in json.loads((out / "run.json").read_text())["sensitivity"]}
    of_layers = (out / "records" / "scores" / f"{key}.json" for key in ablations)
    victim = sorted(path for path in of_layers if '"scores"' in path.read_text())[0]
    original = json.loads(victim.read_text())
    victim.write_text(victim.read_text()[:100])
    repaired = run(inputs, out)
    assert "is damaged" in repaired.stderr
    assert "duration_s=" not in repaired.stderr, "what plans said to the items is recorded still"
    assert json.loads(victim.read_text())["result"]["scores"] == original["result"]["scores"]


def test_the_report_is_written_again_from_the_records_alone(undisturbed, tmp_path):
    inputs, out, _ = undisturbed
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for path in copy.iterdir():
        if path.is_file() and path.name not in ("run.json", "recipe.yaml"):
            path.unlink()
    moved = inputs.folder.with_name("moved")
    inputs.folder.rename(moved)
    try:
        subprocess.run([sys.executable, "-m", "orchestrator", "report", str(copy)], check=True, env=environment())
    finally:
        moved.rename(inputs.folder)
    for name in TABLES:
        assert (copy / name).read_bytes() == (out / name).read_bytes()


def test_a_second_run_on_the_folder_is_refused_with_the_reason(undisturbed, tmp_path):
    inputs, _, _ = undisturbed
    out = tmp_path / "out"
    first = subprocess.Popen(
        command(inputs, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert first.stderr is not None
        assert first.stderr.readline().startswith("calibration 0/4")
        second = run(inputs, out, expect=2)
        assert str(first.pid) in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        first.kill()
        first.wait()


def test_a_dry_run_counts_the_units_and_starts_nothing(undisturbed, tmp_path):
    inputs, out, _ = undisturbed
    fresh = run(inputs, tmp_path / "out", "--dry-run")
    assert [path.parent.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["calibration"]
    assert "total" in fresh.stdout and "expected: " in fresh.stdout
    rows = {line.split()[0]: line.split()[1:] for line in fresh.stdout.splitlines()[1:] if line.strip()}
    assert rows["sensitivity"][:2] == ["9", "0"]
    before = records(out)
    finished = run(inputs, out, "--dry-run")
    assert records(out) == before
    rows = {line.split()[0]: line.split()[1:] for line in finished.stdout.splitlines()[1:] if line.strip()}
    assert rows["sensitivity"][:2] == ["9", "9"]


@pytest.fixture(scope="module")
def disturbed_sweep(undisturbed, tmp_path_factory) -> tuple[Path, list[str]]:
    """Gives the folder of a run until `sensitivity` whose workers were killed, and the units that it reported done."""
    inputs, done, _ = undisturbed
    out = calibrated(tmp_path_factory.mktemp("disturbed") / "out", done)
    process = subprocess.Popen(
        command(inputs, out, "--until", "sensitivity", "--set", "placement.workers=2"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    kills, finished = 0, []
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sensitivity ") and " done " in line:
            finished.append(line.split(" done ")[1].split(" duration_s=")[0])
            workers = workers_of(f"_{process.pid}", "ray::SweepWorker")
            if kills < 5 and workers:
                random.choice(workers).kill()
                kills += 1
    assert process.wait() == 0
    assert kills == 5
    return out, finished


def test_workers_killed_at_random_leave_the_same_table_and_no_unit_done_twice(undisturbed, disturbed_sweep):
    (_, expected, _), (out, finished) = undisturbed, disturbed_sweep
    assert len(set(finished)) == len(finished) == 9
    pd.testing.assert_frame_equal(table(out, "sensitivity.csv"), table(expected, "sensitivity.csv"), rtol=1e-6)


def test_a_run_can_stop_early_and_go_on_through_a_url(undisturbed, disturbed_sweep):
    (inputs, _, _), (out, _) = undisturbed, disturbed_sweep
    assert not (out / "pareto.csv").exists()
    through_url = run(inputs, f"file://{out}", "--until", "sensitivity")
    assert "duration_s=" not in through_url.stderr


def test_adaptive_tiers_resume_after_a_kill_and_spend_items_where_they_matter(undisturbed, tmp_path):
    inputs, done, _ = undisturbed
    settings = [
        *("--until", "sensitivity", "--set", "search.refine=null", "--set", "quality.sequences=30"),
        *("--set", "sensitivity.treatments=[none]", "--set", "sensitivity.compare=false"),
        *("--set", "sensitivity.adaptive={removed: 1, middle: 1, first_items: 4}"),
    ]
    whole, out = (calibrated(tmp_path / name, done) for name in ("whole", "out"))
    result = run(inputs, whole, *settings)
    assert "tiers are certain (95%)" in result.stderr
    kill_at(inputs, out, "sensitivity 1/", *settings)
    run(inputs, out, *settings)
    for name in ("sensitivity.csv", "run.json"):
        assert (out / name).exists()
    pd.testing.assert_frame_equal(table(out, "sensitivity.csv"), table(whole, "sensitivity.csv"), rtol=1e-6)
    mean = table(whole, "sensitivity.csv").query("task == 'mean'")
    assert len(mean) == 3 and mean["n_items"].between(4, 30).all()
    assert json.loads((whole / "run.json").read_text())["adaptive"]["tiers"].count("remove") == 1


def test_affine_layers_go_the_whole_way_killed_on_it_and_with_their_maps_lost(pristine_inputs, tmp_path):
    shutil.copytree(pristine_inputs, tmp_path / "inputs")
    inputs = Inputs(
        tmp_path / "inputs",
        repeatable_recipe(
            sensitivity={"treatments": ["none", "window", "affine"], "score": "kl"},
            search={"trials": 3, "method": "swaps", "sinks": 1, "affine": {"tokens": 512, "rank": 6}},
            constraints={"pin": {1: "affine"}},
            healing={"checkpoint_every_steps": 2},
        ),
    )
    inputs.write_recipe()
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(inputs, whole)
    drops = table(whole, "sensitivity.csv").query("task == 'mean'").groupby("treatment")["drop"].sum()
    assert set(drops.index) == {"none", "window", "affine"}
    assert drops["affine"] < drops["none"], "the maps replace a part of what attention did"
    pareto = table(whole, "pareto.csv")
    healed = pareto[pareto["healed"]].drop_duplicates("plan_id")
    assert healed["plan"].str[1].eq("A").all() and healed["n_affine"].ge(1).all() and len(healed) == 1
    (plan_id,) = healed["plan_id"]
    model = load_model(str(whole / "healed" / plan_id))
    assert attention_module(model, 1).affine.down.shape == (6, 16)
    assert healed["kv_bytes_per_token"].max() < pareto.query("origin == 'base'")["kv_bytes_per_token"].max()

    for line_start in ("evaluate 2/", "heal step 2/"):
        kill_at(inputs, out, line_start)
    (maps,) = out.glob("maps/*.safetensors")
    maps.unlink()
    resumed = run(inputs, out)
    assert "done maps=layers" in resumed.stderr, "maps that are lost are fitted again"
    assert set(records(out)) == set(records(whole))
    assert_equal_results(out, whole)
    assert maps.is_file()
