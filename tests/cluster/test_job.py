"""Tests `ray job submit` to a cluster of two nodes with token authentication, as a user would call it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from tests.cluster.conftest import RAY
from tests.conftest import small_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_submitted_job_uses_both_nodes(cluster, project, tmp_path):
    address, environment = cluster
    judge = (project / "inputs" / "judge.txt").read_text()
    (project / "inputs" / "long.txt").write_text("\n\n".join([judge] * 60))
    recipe = small_recipe(
        # One worker alone needs 20 s, so that the second node's worker starts before all is done on a busy machine too.
        quality={"text": "long.txt", "sequences": 1000, "batch_size": 1},
        sensitivity={"score": "nll", "treatments": ["none", "window"], "shares": 40, "compare": False},
        search={"trials": 1},
        healing={"batch_sequences": 3, "curve": []},
        placement={"healing_workers": 2},
    )
    (project / "inputs" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "shared" / "run"
    submit = [
        *RAY, "job", "submit", f"--address={address}", "--working-dir", str(project), "--",
        sys.executable, "-m", "orchestrator", "run", "inputs/recipe.yaml", "--verbose", "--out", str(out),
    ]  # fmt: skip
    result = subprocess.run(submit, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert "succeeded" in (result.stdout + result.stderr).lower()
    nodes = {
        json.loads(path.read_text())["result"]["worker"]["node_id"]
        for path in (out / "records" / "sweep").glob("*.json")
    }
    assert len(nodes) == 2
    assert (out / "report.html").exists()
