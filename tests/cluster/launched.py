"""Starts a cluster on simulated hosts with `ray up` and clusters/local.yaml, and copies a project to run there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import ADDRESSES, Hosts, wait_until
from tests.conftest import Inputs

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
JOB_SERVER = "http://127.0.0.1:8265"
HEAD = f"{ADDRESSES[0]}:6379"
TOKEN = {"RAY_AUTH_MODE": "token"}


LONG_TEXT = "long.txt"


def copy_project(hosts: Hosts, inputs: Path, recipe: dict[str, Any], *, long_text: int) -> Inputs:
    """Makes a user's working directory on the shared folder: the packages, and a recipe next to its inputs.

    Args:
        long_text: how often LONG_TEXT repeats the text that judges models, so that units take a while.
    """
    folder = hosts.shared / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("layerboost", "tasks", "orchestrator", "recipes", "clusters"):
        shutil.copytree(PROJECT / package, folder / package, ignore=ignored)
    shutil.copytree(inputs, folder / "inputs")
    copied = Inputs(folder / "inputs", recipe)
    (copied.folder / LONG_TEXT).write_text("\n\n".join([(copied.folder / "judge.txt").read_text()] * long_text))
    copied.write_recipe()
    return copied


def write_cluster_yaml(hosts: Hosts, environment: Mapping[str, str] | None = None) -> Path:
    """Writes the shipped file with addresses and user, without its section for images, and one CPU for each host.

    Args:
        environment: variables for all of Ray's processes, in addition to those of the file.

    Returns:
        The path of the file on the hosts.
    """
    config = yaml.safe_load((PROJECT / "clusters" / "local.yaml").read_text())
    config["provider"].update(head_ip=ADDRESSES[0], worker_ips=ADDRESSES[1:])
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "/root/.ssh/hosts_key"}
    del config["docker"]
    settings = "".join(f"{name}={value} " for name, value in (environment or {}).items())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        commands[-1] = settings + commands[-1].replace("ray start", "ray start --num-cpus=1")
    (hosts.shared / "local.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Path("/shared/local.yaml")


@dataclass(frozen=True)
class Launched:
    """Shows a running cluster as drv sees it through the tunnel of `ray dashboard`."""

    hosts: Hosts
    yaml: Path

    def nodes(self) -> list[dict[str, Any]]:
        """Returns what Ray's state API reports on each node; the list is empty where it does not answer."""
        command = [PYTHON, str(Path(__file__).with_name("state_api.py")), JOB_SERVER]
        try:
            return json.loads(self.hosts.run("drv", *command, expect=None))
        except ValueError:
            return []

    def states(self) -> dict[str, str]:
        """Returns the state of each node (ALIVE or DEAD) by its address."""
        # A node that came back is a new entry and the old one stays listed, so living nodes must overwrite dead ones.
        nodes = sorted(self.nodes(), key=lambda node: node["state"] == "ALIVE")
        return {node["node_ip"]: node["state"] for node in nodes}

    def all_alive(self) -> bool:
        return self.states() == dict.fromkeys(ADDRESSES, "ALIVE")

    def wait_for_nodes(self, timeout_s: float = 300) -> float:
        """Waits until all three nodes are alive and returns the seconds it took."""
        return wait_until(self.all_alive, lambda: f"three nodes alive: {self.states()}", timeout_s)


@contextmanager
def launched(hosts: Hosts, cluster_yaml: Path) -> Iterator[Launched]:
    """Keeps a cluster up for a block: `ray up`, and `ray dashboard` as the tunnel to it from drv."""
    hosts.run("drv", "ray", "get-auth-token", "--generate")
    hosts.run("drv", "ray", "up", "--yes", "--no-config-cache", "--disable-usage-stats", str(cluster_yaml))
    log = hosts.folder / "dashboard.log"
    tunnel = hosts.start("drv", "ray", "dashboard", str(cluster_yaml), env=TOKEN, log=log)
    try:
        cluster = Launched(hosts, cluster_yaml)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        tunnel.kill()
        tunnel.wait()
