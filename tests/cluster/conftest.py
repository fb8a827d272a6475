"""Provides a Ray cluster of two nodes with a token, a project to send there, and simulated hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, Hosts, why_not
from tests.cluster.state_api import nodes_of

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


@dataclass
class RayCluster:
    """Holds a cluster whose nodes are started one by one, and the environment of its nodes and clients."""

    home: Path
    gcs: int
    dashboard: int
    environment: dict[str, str]
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, *options: str, cover: str = "") -> subprocess.Popen:
        """Starts a node and waits until it is alive; the shell command `cover` runs first, in its mount namespace."""
        number = len(self.processes)
        # Each node has its own folder, as on two hosts: in a shared one each would delete what the other has unpacked.
        # The path is short because the paths of sockets have a length limit.
        command = [
            *RAY, "start", f"--dashboard-agent-listen-port={free_ports(1)[0]}", f"--temp-dir={self.temp(number)}",
            f"--node-ip-address=127.0.0.{number + 1}", "--disable-usage-stats", "--block", *options,
        ]  # fmt: skip
        if cover:
            command = ["unshare", "-m", "sh", "-c", f"{cover} && exec {shlex.join(command)}"]
        n_nodes = sum(process.poll() is None for process in self.processes) + 1
        with open(self.home / f"node{number}.log", "w") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        self.wait_for_nodes(n_nodes)
        return process

    def wait_for_nodes(self, n_nodes: int) -> None:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        wait_until(partial(has_nodes, n_nodes, self.url, token), self.home)

    def temp(self, number: int) -> str:
        return f"/tmp/lb{os.getpid()}{'abcdefgh'[number]}"

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for number, process in enumerate(self.processes):
            process.wait(timeout=60)
            shutil.rmtree(self.temp(number), ignore_errors=True)


@pytest.fixture(scope="package")
def ray_cluster(tmp_path_factory):
    """Starts a fresh cluster of two nodes that needs a token."""
    home = tmp_path_factory.mktemp("home")
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
    gcs, dashboard, client = free_ports(3)
    cluster = RayCluster(home, gcs, dashboard, environment)
    try:
        cluster.start(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=1",
            f"--ray-client-server-port={client}", "--include-dashboard=true",
        )  # fmt: skip
        cluster.start(f"--address={cluster.address}", "--num-cpus=1")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="package")
def cluster(ray_cluster) -> tuple[str, dict[str, str]]:
    """Gives the address of the cluster's job server, and the environment that holds its token."""
    return ray_cluster.url, ray_cluster.environment


def has_nodes(n_nodes: int, url: str, token: str) -> bool:
    """Says whether the cluster's job server answers and knows `n_nodes` living nodes."""
    try:
        return sum(node["state"] == "ALIVE" for node in nodes_of(url, token)) == n_nodes
    except OSError:
        return False


def wait_until(condition, logs: Path, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail("\n".join(path.read_text()[-2000:] for path in logs.glob("*.log")))
        time.sleep(1)


@pytest.fixture
def project(pristine_inputs, tmp_path) -> Path:
    """Makes a user's working directory: the packages, and a recipe next to its inputs."""
    folder = tmp_path / "project"
    for package in ("layerboost", "tasks", "orchestrator"):
        ignored = shutil.ignore_patterns("__pycache__", "model", "data")
        shutil.copytree(PROJECT / package, folder / package, ignore=ignored)
    shutil.copytree(pristine_inputs, folder / "inputs")
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """Sets up three hosts and `drv`, and removes every trace of them; skips where the machine cannot have them."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), f"l{os.getpid() % 100000}")
    try:
        hosts.call("up", str(len(ADDRESSES)))
        yield hosts
    finally:
        hosts.call("down")
        assert hosts.leftovers() == []
