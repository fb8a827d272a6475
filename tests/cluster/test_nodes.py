"""Tests the preflight on a real cluster of which two nodes have another disk than the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.cluster.conftest import RayCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mount namespaces need root"),
]


def layerboost(cluster: RayCluster, *arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments, "--address", cluster.address],
        cwd=cwd, env=cluster.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_nodes_with_another_disk_stop_the_run_before_it_starts(ray_cluster, project, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (project / "inputs" / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"path": "./model"}, "quality": {"text": "judge.txt", "sequence_tokens": 32},
                        "search": {"window": 8}, "throughput": {"prompt_tokens": 16, "new_tokens": 4}})
    )  # fmt: skip
    run = ["run", "inputs/recipe.yaml", "--out", str(shared / "run"), "--until", "evaluate"]
    # A node without a CPU is asked as well. All nodes share this machine's /dev/shm.
    others = [
        ray_cluster.start(
            f"--address={ray_cluster.address}", "--num-cpus=0", cover=f"mount -t tmpfs {options} none {shared}"
        )
        for options in ("", "-o ro")
    ]
    own, read_only = (f"127.0.0.{number}" for number in (len(ray_cluster.processes) - 1, len(ray_cluster.processes)))
    try:
        refused = layerboost(ray_cluster, *run, cwd=project)
        assert refused.returncode == 2 and refused.stdout == "", refused.stdout + refused.stderr
        assert f"{own} run folder" in refused.stderr and "is another folder than the driver's" in refused.stderr
        assert f"{read_only} run folder" in refused.stderr and "cannot be written" in refused.stderr
        last = refused.stderr.splitlines()[-1]
        assert last.startswith("error: 127.0.0.") and "give an --out that all nodes share" in last
        assert list(shared.iterdir()) == []
        # The doctor checks no run folder, and nothing else is wrong.
        healthy = layerboost(ray_cluster, "doctor", cwd=project)
        assert healthy.returncode == 0, healthy.stdout
        assert "4 nodes alive" in healthy.stdout and f"{own}  " in healthy.stdout
    finally:
        for node in others:
            node.terminate()
            node.wait(60)
        ray_cluster.wait_for_nodes(2)
    good = layerboost(ray_cluster, *run, cwd=project)
    assert good.returncode == 0, good.stdout + good.stderr
    assert not list(shared.glob(".probe-*"))
