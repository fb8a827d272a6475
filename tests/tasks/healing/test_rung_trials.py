"""Tests healings as Train jobs inside Tune trials: together without a deadlock, with deaths, failures and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from safetensors.torch import load_file

from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan
from layerboost.text.sources import TextSource
from tasks.cluster.resources import NodeResources, jobs_at_once
from tasks.healing.job import HealingJob
from tasks.healing.rungs import heal_all
from tests.conftest import wait_for_cpus
from tests.tasks.healing.jobs import job_of_settings

cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS = 4
SPEC = HealingSpec(
    tokens=STEPS * 2 * 16, sequence_tokens=16, batch_sequences=2, rank=2, learning_rate=5e-3, transfer_fraction=0.25
)


def job_of(checkpoint: Path, folder: Path, plan: str, **settings) -> HealingJob:
    defaults: dict[str, Any] = {
        "model": str(checkpoint / "model"),
        "plan": Plan.parse(plan, 3),
        "spec": SPEC,
        "sources": (TextSource(str(checkpoint / "text.txt")),),
        "output": None,
        "snapshot_url": str(folder / "snapshots" / plan),
        "storage_path": str(folder / "storage"),
        "name": plan,
        "max_failures": 0,
        "checkpoint_every_steps": 1,
    }
    return job_of_settings(**(defaults | settings))


def fail(event) -> None:
    # Not only at step 2: a trial that is killed after its checkpoint of step 2 goes on at step 3.
    if event.step >= 2:
        raise RuntimeError("a bad plan")


@pytest.mark.parametrize(
    ("n_workers", "cpus", "gpus", "expected"), [(1, 1, 0, 12), (1, 4, 0, 3), (5, 1, 0, 2), (1, 1, 1, 3), (2, 1, 1, 1)]
)
def test_as_many_jobs_run_at_once_as_there_is_room_for(tmp_path, n_workers, cpus, gpus, expected):
    nodes = [NodeResources("a", "", 8.0, 2.0), NodeResources("b", "", 4.0, 1.0)]
    size = {"n_workers": n_workers, "cpus": cpus, "gpus": gpus}
    spec = HealingSpec(tokens=160, sequence_tokens=4, batch_sequences=10)
    assert jobs_at_once(job_of(tmp_path, tmp_path, "SN", spec=spec, **size).workers, nodes) == expected


def test_a_job_that_keeps_neither_checkpoint_nor_snapshot_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"snapshots\.url: None"):
        job_of(tmp_path, tmp_path, "SN", snapshot_url=None)


@pytest.mark.cluster
def test_the_first_interrupt_hands_over_what_is_under_way(ray_local, tiny_checkpoint, tmp_path):
    done = []

    def interrupt(finished) -> None:
        done.append(finished.unit.name)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        heal_all(
            [job_of(tiny_checkpoint, tmp_path, plan, cpus=2) for plan in ("SNSS", "SNNS")],
            on_result=interrupt,
        )
    assert done == ["SNSS"]
    assert not (tmp_path / "snapshots" / "SNNS").exists()


@pytest.mark.cluster
def test_jobs_are_healed_side_by_side_though_a_trial_is_killed_and_one_fails(ray_local, tiny_checkpoint, tmp_path):
    mark = tmp_path / "killed"

    def kill_a_trial(event) -> None:
        from tests.ray_workers import session_of, workers_of

        if event.step == 3 and not mark.exists():
            processes = workers_of(session_of())
            trials = [process for process in processes if process.cmdline()[0].endswith("Trainable.train")]
            mark.touch()
            trials[0].kill()

    jobs = [
        job_of(tiny_checkpoint, tmp_path, "LNSS", on_step=kill_a_trial, transfer="by_layer"),
        job_of(tiny_checkpoint, tmp_path, "NNSS", on_step=fail),
        job_of(tiny_checkpoint, tmp_path, "SNSS"),
    ]
    done = {}
    failures = heal_all(jobs, on_result=lambda finished: done.update({finished.unit.name: finished.result}))
    assert mark.exists()
    assert [failure.unit.name for failure in failures] == ["NNSS"]
    assert "a bad plan" in failures[0].error
    assert set(done) == {"LNSS", "SNSS"}
    for name, result in done.items():
        assert [row.step for row in result.curve] == list(range(1, STEPS + 1))
        assert (result.output, result.tokens) == (None, SPEC.tokens)
        assert result.snapshots == {STEPS: str(tmp_path / "snapshots" / name / f"{STEPS}.safetensors")}
        assert load_file(result.snapshots[STEPS])
    wait_for_cpus(2)  # this includes the CPUs of the killed trial's job
