"""Tests two runs at once: as jobs of one cluster, and each with its own cluster on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RAY
from tests.conftest import repeatable_recipe
from tests.results import assert_equal_results, table

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

RECIPE = repeatable_recipe(
    quality={"sequences": 16, "batch_size": 2},
    sensitivity={"treatments": ["none", "window"], "shares": 4, "compare": False},
    search={"refine": None},
    healing={"curve": [], "checkpoint_every_steps": 4},
    placement={"workers": 1},
)


@pytest.fixture
def recipes(project) -> list[Path]:
    """Writes one recipe with two seeds, so that anything that one run takes from the other changes its results."""
    found = []
    for seed in (0, 1):
        recipe = {**RECIPE, "healing": {**RECIPE["healing"], "seed": seed}}
        found.append(project / "inputs" / f"seed{seed}.yaml")
        found[-1].write_text(yaml.safe_dump(recipe))
    return found


def alone(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "run", str(recipe), "--out", str(out), "--until", "heal"]


def finish(commands: list[list[str]], logs: Path, environment: dict[str, str], cwd: Path) -> None:
    """Runs commands at the same time; all must exit with 0."""
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
    # The first cluster is still up, and each run starts its own cluster next to it.
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    finish([alone(recipe, tmp_path / f"own-{recipe.stem}") for recipe in recipes], tmp_path, own, project)
    job, own = ([tmp_path / f"{how}-{recipe.stem}" for recipe in recipes] for how in ("job", "own"))
    for of_job, of_own in zip(job, own, strict=True):
        assert_equal_results(of_job, of_own)
    # If a run took anything from the other, those with two seeds would be alike, or the two ways would not.
    curves = [table(folder, "healing_curves.csv")["loss"].tolist() for folder in own]
    assert curves[0] != curves[1]
