"""`ray job submit` to a cluster of two nodes with token authentication, as a user would."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROJECT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster(tmp_path_factory):
    """Address of the job server of a fresh cluster of two nodes, and the environment that holds its token."""
    home = tmp_path_factory.mktemp("home")
    # A folder for each node, as on two hosts (in a shared one each would clean up what the other has unpacked), and a
    # short one, since the paths of sockets have a limit.
    temp = f"/tmp/lb{os.getpid()}"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    environment = {
        **os.environ,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / ".ray" / "auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    gcs, dashboard, client, *agents = free_ports(7)
    common = ["--num-cpus=1", "--disable-usage-stats", "--block"]
    head = [
        *RAY, "start", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agents[0]}", f"--temp-dir={temp}a",
        "--node-ip-address=127.0.0.1", "--include-dashboard=true", *common,
    ]  # fmt: skip
    worker = [
        *RAY, "start", f"--address=127.0.0.1:{gcs}", f"--dashboard-agent-listen-port={agents[1]}",
        "--node-ip-address=127.0.0.2", f"--temp-dir={temp}b", *common,
    ]  # fmt: skip
    processes = []
    try:
        for command in (head, worker):
            log = open(home / f"node{len(processes)}.log", "w")  # noqa: SIM115
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
            n_nodes = len(processes)
            wait_until(partial(has_nodes, n_nodes, f"127.0.0.1:{gcs}", environment), home)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
        for node in "ab":
            shutil.rmtree(temp + node, ignore_errors=True)


def has_nodes(n_nodes: int, address: str, environment: dict) -> bool:
    """Whether the cluster answers and has so many living nodes."""
    script = (
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); "
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, address], env=environment, capture_output=True, text=True, check=False
    )
    return result.returncode == 0 and result.stdout.split()[-1:] == [str(n_nodes)]


def wait_until(condition, logs: Path, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail("\n".join(path.read_text()[-2000:] for path in logs.glob("*.log")))
        time.sleep(1)


def test_a_submitted_job_uses_both_nodes(cluster, pristine_inputs, tmp_path):
    address, environment = cluster
    # The working directory as a user has it: the packages, and a recipe with its inputs beside.
    project = tmp_path / "project"
    for package in ("layerboost", "tasks", "orchestrator"):
        ignored = shutil.ignore_patterns("__pycache__", "model", "data")
        shutil.copytree(PROJECT / package, project / package, ignore=ignored)
    shutil.copytree(pristine_inputs, project / "inputs")
    judge = (project / "inputs" / "judge.txt").read_text()
    (project / "inputs" / "long.txt").write_text("\n\n".join([judge] * 60))
    recipe = {
        "model": {"path": "./model"},
        # Units of some seconds, so that the second node's worker is there before all are done.
        "quality": {"text": "long.txt", "sequences": 2000, "sequence_tokens": 32, "batch_size": 1},
        "sensitivity": {"score": "nll", "treatments": ["none", "window", "linear_window"]},
        "search": {"trials": 1, "window": 8},
        "healing": {
            "tokens": 512,
            "text": "heal.txt",
            "batch_sequences": 3,
            "sequence_tokens": 32,
            "candidates": 1,
            "curve": [],
        },
        "throughput": {"concurrency": [1], "prompt_tokens": 16, "new_tokens": 4},
        "placement": {"healing_workers": 2},
    }
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
