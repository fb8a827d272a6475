"""Two runs at once: as jobs of one cluster, and each with a cluster of its own on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RAY
from tests.results import assert_equal_results

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

RECIPE = {
    "model": {"path": "./model"},
    "quality": {"text": "judge.txt", "sequences": 16, "sequence_tokens": 32, "batch_size": 2},
    "sensitivity": {"score": "nll", "treatments": ["none", "window"], "shares": 4, "compare": False},
    # Measured speeds differ from run to run, and with them the plans.
    "search": {"trials": 2, "window": 8, "speed": "bytes", "refine": None},
    "healing": {
        "tokens": 512,
        "text": "heal.txt",
        "batch_sequences": 2,
        "sequence_tokens": 32,
        "candidates": 1,
        "curve": [],
        "checkpoint_every_steps": 4,
    },
    "throughput": {"concurrency": [1], "prompt_tokens": 16, "new_tokens": 4},
    # A result's last bits depend on threads and, healed, on the number of workers.
    "placement": {"workers": 1, "cpus_per_worker": 1, "healing_workers": 1},
}


@pytest.fixture
def recipes(project) -> list[Path]:
    """The same recipe under two seeds: what one run takes from the other would show."""
    found = []
    for seed in (0, 1):
        recipe = {**RECIPE, "healing": {**RECIPE["healing"], "seed": seed}}
        found.append(project / "inputs" / f"seed{seed}.yaml")
        found[-1].write_text(yaml.safe_dump(recipe))
    return found


def alone(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "run", str(recipe), "--out", str(out)]


def finish(commands: list[list[str]], logs: Path, environment: dict[str, str], cwd: Path) -> None:
    """Runs commands at the same time; all must end with 0."""
    files = [(logs / f"{number}.log").open("w+") for number in range(len(commands))]
    started = [
        subprocess.Popen(command, env=environment, cwd=cwd, stdout=file, stderr=file)
        for command, file in zip(commands, files, strict=True)
    ]
    for process, file in zip(started, files, strict=True):
        code = process.wait(timeout=600)
        file.seek(0)
        assert code == 0, file.read()[-6000:]
        file.close()


def test_two_jobs_of_a_cluster_and_two_clusters_of_a_machine_do_not_disturb_each_other(
    cluster, project, recipes, tmp_path
):
    address, environment = cluster
    jobs = [
        [*RAY, "job", "submit", f"--address={address}", "--working-dir", str(project), "--",
         *alone(recipe.relative_to(project), tmp_path / f"job-{recipe.stem}")]
        for recipe in recipes
    ]  # fmt: skip
    finish(jobs, tmp_path, environment, project)
    # Beside the cluster that is up: each run starts one of its own.
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    finish([alone(recipe, tmp_path / f"own-{recipe.stem}") for recipe in recipes], tmp_path, own, project)
    for recipe in recipes:
        finish([alone(recipe, tmp_path / f"alone-{recipe.stem}")], tmp_path, own, project)
        for how in ("job", "own"):
            assert_equal_results(tmp_path / f"{how}-{recipe.stem}", tmp_path / f"alone-{recipe.stem}")
