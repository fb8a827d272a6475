"""`ray up` with the shipped clusters/local.yaml on three hosts of our own, a run there, and what goes wrong in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import ADDRESSES, Hosts, wait_until, why_not
from tests.conftest import Inputs
from tests.results import assert_equal_results

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROJECT = Path(__file__).resolve().parents[2]
SUBMIT = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "/shared/project", "--"]
RUN = [sys.executable, "-m", "orchestrator", "run", "inputs/recipe.yaml", "--out", "/shared/run"]
TOKEN = {"RAY_AUTH_MODE": "token"}
SILENT_NODE_NOTICED_S = 70
"""What the health checks of clusters/local.yaml promise (20 s), and room for a machine that three hosts share."""


@pytest.fixture(scope="module")
def project(hosts, pristine_inputs) -> Inputs:
    """The working directory of a user, on the shared folder: the packages, and a recipe with its inputs beside."""
    folder = hosts.shared / "project"
    for package in ("layerboost", "tasks", "orchestrator"):
        shutil.copytree(
            PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "model", "data")
        )
    shutil.copytree(PROJECT / "clusters", folder / "clusters", ignore=shutil.ignore_patterns("__pycache__"))
    inputs = Inputs(folder / "inputs", RECIPE)
    shutil.copytree(pristine_inputs, inputs.folder)
    judge = (inputs.folder / "judge.txt").read_text()
    (inputs.folder / "long.txt").write_text("\n\n".join([judge] * 240))
    inputs.write_recipe()
    return inputs


RECIPE = {
    "model": {"path": "./model"},
    # Units of some seconds, so that all nodes have one before the first is killed.
    "quality": {"text": "long.txt", "sequences": 8000, "sequence_tokens": 32, "batch_size": 4},
    "sensitivity": {"score": "nll", "treatments": ["none", "window", "linear_window"], "shares": 12},
    # Measured speeds differ from run to run, and with them the plans.
    "search": {"trials": 1, "window": 8, "speed": "bytes"},
    "healing": {
        "tokens": 512,
        "text": "heal.txt",
        "batch_sequences": 2,
        "sequence_tokens": 32,
        "candidates": 1,
        "curve": [],
    },
    "throughput": {"concurrency": [1], "prompt_tokens": 16, "new_tokens": 4},
    # As the hosts below; a result's last bits depend on threads and, healed, on the number of workers.
    "placement": {"cpus_per_worker": 1, "healing_workers": 1},
}


@pytest.fixture(scope="module")
def cluster_yaml(hosts) -> Path:
    """The shipped file with addresses and user filled in, without its section for images, and one CPU for each host."""
    config = yaml.safe_load((PROJECT / "clusters" / "local.yaml").read_text())
    config["provider"].update(head_ip=ADDRESSES[0], worker_ips=ADDRESSES[1:])
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "/root/.ssh/hosts_key"}
    del config["docker"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        commands[-1] = commands[-1].replace("ray start", "ray start --num-cpus=1")
    (hosts.shared / "local.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Path("/shared/local.yaml")


def states(hosts: Hosts) -> dict[str, str]:
    """Address to state (ALIVE or DEAD), by Ray's state API through the tunnel to the head."""
    listed = hosts.run(
        "drv", "ray", "list", "nodes", "--format", "json", "--address", "http://127.0.0.1:8265", env=TOKEN, expect=None
    )
    try:
        nodes = json.loads(listed)
    except ValueError:
        return {}
    # A node that came back is a new one; the old one stays in the list.
    return {node["node_ip"]: node["state"] for node in sorted(nodes, key=lambda node: node["state"] == "ALIVE")}


def all_alive(hosts: Hosts) -> bool:
    return states(hosts) == dict.fromkeys(ADDRESSES, "ALIVE")


@pytest.fixture(scope="module")
def launched(hosts, cluster_yaml) -> Iterator[Path]:
    """The cluster after `ray up`, with `ray dashboard` as the way to it from drv."""
    hosts.run("drv", "ray", "get-auth-token", "--generate")
    hosts.run("drv", "ray", "up", "--yes", "--no-config-cache", "--disable-usage-stats", str(cluster_yaml))
    log = hosts.folder / "dashboard.log"
    tunnel = hosts.start("drv", "ray", "dashboard", str(cluster_yaml), env=TOKEN, log=log)
    try:
        wait_until(lambda: all_alive(hosts), lambda: f"three nodes alive: {states(hosts)}\n{log.read_text()}", 300)
        yield cluster_yaml
    finally:
        tunnel.kill()
        tunnel.wait()


def worker_hosts(out: Path) -> set[str]:
    """Names of the hosts whose workers have recorded shares of the sweep."""
    return {
        json.loads(path.read_text())["result"]["worker"]["node"] for path in (out / "records" / "sweep").glob("*.json")
    }


def test_doctor_finds_the_cluster_in_order(hosts, launched, project):
    doctor = f"cd /shared/project && {sys.executable} -m orchestrator doctor --address {ADDRESSES[0]}:6379"
    table = hosts.run("h0", "sh", "-c", doctor, env=TOKEN)
    assert "3 nodes alive" in table
    assert all(address in table for address in ADDRESSES)
    assert "missing" not in table


def test_nodes_carry_the_label_of_their_hardware(hosts, launched):
    nodes = json.loads(hosts.run(
        "drv", "ray", "list", "nodes", "--format", "json", "--detail", "--address", "http://127.0.0.1:8265", env=TOKEN
    ))  # fmt: skip
    assert {node["labels"]["layerboost/hardware"] for node in nodes} == {"small"}


def test_a_job_without_the_token_is_refused(hosts, launched, project):
    refused = subprocess.run(
        hosts.on("drv", *SUBMIT, "true", env={"RAY_AUTH_MODE": "disabled"}),
        env=hosts.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "authentication" in (refused.stdout + refused.stderr).lower()


def test_a_job_ends_right_although_a_raylet_is_killed_in_the_middle(hosts, launched, project, tmp_path):
    out = hosts.shared / "run"
    job = hosts.start("drv", *SUBMIT, *RUN, env=TOKEN, log=hosts.folder / "job.log")
    try:
        wait_until(lambda: job.poll() is not None or worker_hosts(out) == {"h0", "h1", "h2"}, "units on all nodes", 600)
        hosts.run("h1", "sh", "-c", "kill -KILL $(pidof raylet)")
        assert job.wait(timeout=600) == 0, (hosts.folder / "job.log").read_text()[-6000:]
    finally:
        job.kill()
    fetched = hosts.shared / "fetched"
    hosts.run("drv", "ray", "rsync-down", str(launched), "/shared/run/", "/shared/fetched/")
    assert worker_hosts(fetched) == {"h0", "h1", "h2"}
    assert (fetched / "report.html").exists()
    here = tmp_path / "here"
    command = [sys.executable, "-m", "orchestrator", "run", str(project.recipe), "--out", str(here)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}, check=True, capture_output=True)
    assert_equal_results(fetched, here)
    wait_until(lambda: all_alive(hosts), "the killed node is back", timeout_s=300)


def test_a_silent_node_is_noticed_in_seconds(hosts, launched):
    hosts.call("cut", "h2")
    noticed_s = wait_until(lambda: states(hosts).get(ADDRESSES[2]) == "DEAD", "h2 dead", SILENT_NODE_NOTICED_S)
    print(f"silent node noticed after {noticed_s:.1f} s")
    hosts.call("join", "h2")


def test_ray_down_stops_the_cluster(hosts, launched):
    hosts.run("drv", "ray", "down", "--yes", str(launched))
    for host in ("h0", "h1", "h2"):
        wait_until(lambda host=host: not hosts.run(host, "pidof", "raylet", expect=None), f"no raylet on {host}", 90)


def test_hosts_go_with_the_process_that_owns_them(tmp_path):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    hosts = Hosts(tmp_path, f"o{os.getpid() % 100000}")
    owner = subprocess.Popen(["sleep", "60"])
    try:
        subprocess.run(hosts.command("up", "1"), env={**hosts.environment, "OWNER": str(owner.pid)}, check=True)
        assert hosts.leftovers() != []
    finally:
        owner.kill()
        owner.wait()
    wait_until(lambda: hosts.leftovers() == [], "nothing left", timeout_s=30)
