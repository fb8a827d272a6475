"""Tests that workers of Ray which a server forks are workers like others, in a cluster of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server.worker_start import SERVERS

pytestmark = pytest.mark.cluster

SCRIPT = """
import json, os, pathlib, random, signal, sys, time
import psutil, ray

@ray.remote(num_cpus=1)
class Worker:
    def tell(self):
        import numpy as np
        return {
            "pid": os.getpid(), "parent": psutil.Process(os.getppid()).cmdline(), "folder": os.getcwd(),
            "variable": os.environ.get("GIVEN"), "raylet": os.environ["RAY_RAYLET_PID"], "script": sys.argv[0],
            "loaded": "torch" in sys.modules, "numbers": [random.random(), float(np.random.random())],
        }

    def end(self, number):
        os.kill(os.getpid(), number)

told = []
for _ in range(2):  # Each cluster has a raylet of its own.
    # Without an address Ray would join a cluster that another test has started meanwhile.
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    given = {"env_vars": {"GIVEN": "value"}}
    for options in ({}, {}, {"runtime_env": given}, {"runtime_env": given}):
        worker = Worker.options(**options).remote()
        told.append(ray.get(worker.tell.remote()) | options)
        worker.end.remote(signal.SIGKILL)
        try:
            ray.get(worker.tell.remote())
        except ray.exceptions.ActorDiedError as error:
            told[-1]["ended"] = "unexpectedly" in str(error)
    # A server starts with the second worker of its environment; the next cluster begins when both of them answer.
    sockets = pathlib.Path(os.environ["SOCKETS"])
    for _ in range(600 if sockets.is_dir() else 0):
        if len(list(sockets.glob("*.socket"))) == 2:
            break
        time.sleep(0.1)
    ray.shutdown()
print(json.dumps(told))
"""


def run(folder: Path, servers: str | None) -> list[dict]:
    environment = {**os.environ, "SOCKETS": str(folder)}
    if servers is not None:
        environment[SERVERS] = servers
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def sockets(tmp_path) -> Path:
    folder = tmp_path / "sockets"
    folder.mkdir()
    return folder


def test_forked_workers_are_like_others_but_for_what_is_loaded(sockets):
    if not os.environ.get(SERVERS):
        pytest.skip(f"{SERVERS} is empty, so workers start and import by themselves")
    _, owner, namespaces = os.environ[SERVERS].split(":", 2)
    told = run(sockets, f"{sockets}:{owner}:{namespaces}")
    alone = run(sockets.parent / "none", "")
    forked = [worker for worker in told if any("import_server.py" in part for part in worker["parent"])]
    assert len(forked) >= len(told) // 2 and all(worker["loaded"] for worker in forked)
    assert not any(worker["loaded"] for worker in alone)
    for worker, other in zip(told, alone, strict=True):
        for name in ("folder", "variable", "script", "ended"):
            assert worker[name] == other[name], name
        assert worker["ended"]
    assert len({worker["raylet"] for worker in told}) == 2
    for part in (0, 1):
        assert len({worker["numbers"][part] for worker in told}) == len(told)


def test_a_server_ends_with_the_process_of_the_tests(sockets):
    owner = subprocess.Popen(["sleep", "60"])
    script = Path(__file__).parent / "fork_server" / "import_server.py"
    command = [sys.executable, str(script), str(sockets / "s"), str(owner.pid)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (sockets / "s.socket").exists():
            assert server.poll() is None
            time.sleep(0.1)
        owner.kill()
        owner.wait()
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        owner.kill()
