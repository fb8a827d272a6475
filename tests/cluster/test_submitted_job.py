"""Tests `layerboost submit` to a real cluster: results, exit codes, a cut connection, and refused tokens."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import RAY

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SECRET = "hf_wouldBeASecret123"
RECIPE = {
    "model": {"path": "./model"},
    "quality": {"tasks": ["./task.yaml"], "text": "judge.txt", "sequences": 4, "sequence_tokens": 32},
    "sensitivity": {"score": "nll", "shares": 2},
    "search": {"trials": 1, "window": 8},
    "throughput": {"concurrency": [1], "prompt_tokens": 16, "new_tokens": 4},
}


@pytest.fixture
def recipe(project) -> Path:
    path = project / "inputs" / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def command(address: str, out: Path, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "orchestrator", "submit", "inputs/recipe.yaml", "--address", address]
    python = [] if "--python" in arguments else ["--python", sys.executable]
    return [*start, *python, "--out", str(out), *arguments]


def slow_lines(folder: Path, n_lines: int, code: int) -> str:
    """Writes a program to follow in place of a run: it prints two lines a second and ends with an exit code."""
    script = folder / f"lines{code}.sh"
    script.write_text(
        f"#!/bin/sh\ni=0\nwhile [ $i -lt {n_lines} ]; do i=$((i+1)); echo line $i; sleep 0.5; done\nexit {code}\n"
    )
    script.chmod(0o755)
    return str(script)


def submitted(cluster, project: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = cluster
    # Without RAY_AUTH_MODE, submit must find the token by itself.
    environment = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
    return subprocess.run(
        command(address, out, *arguments), cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def records(out: Path) -> dict[str, dict]:
    """Returns identity and result of each evaluation, without where and how long it ran."""

    def lasting(value):
        if not isinstance(value, dict):
            return value
        return {name: lasting(inner) for name, inner in value.items() if name != "worker" and not name.endswith("_s")}

    found = {}
    for stage in ("scores", "sweep"):
        for path in (out / "records" / stage).glob("*.json"):
            record = json.loads(path.read_text())
            found[f"{stage}/{path.name}"] = {name: lasting(record[name]) for name in ("identity", "result")}
    return found


def test_it_gives_what_ray_job_submit_gives(cluster, project, recipe, tmp_path):
    address, environment = cluster
    ours = submitted(cluster, project, tmp_path / "ours", "--until", "sensitivity")
    assert ours.returncode == 0, ours.stdout[-4000:] + ours.stderr[-4000:]
    assert "report: " in ours.stdout
    assert re.search(
        rf"log: +RAY_AUTH_MODE=token ray job logs recipe-\d+-\d+-\w+ --address {address} --follow\n", ours.stderr
    )
    assert ours.stderr.splitlines()[-1].endswith("succeeded, exit code 0")
    run = [sys.executable, "-m", "orchestrator", "run", "inputs/recipe.yaml", "--until", "sensitivity"]
    plain = [*RAY, "job", "submit", f"--address={address}", "--working-dir", ".", "--", *run, "--out"]
    theirs = subprocess.run(
        [*plain, str(tmp_path / "theirs")], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert theirs.returncode == 0, theirs.stdout[-4000:]
    assert records(tmp_path / "ours") == records(tmp_path / "theirs")
    assert len(records(tmp_path / "ours")) > 2


def test_the_exit_code_is_the_jobs(cluster, project, recipe, tmp_path):
    absent = submitted(cluster, project, tmp_path / "a", "--set", "model.path=/no/such/model")
    assert "note: model.path: /no/such/model does not travel; every node must have it" in absent.stderr
    assert (absent.returncode, "error: model.path: /no/such/model" in absent.stdout) == (2, True), absent.stdout
    for code in (1, 2):
        failed = submitted(cluster, project, tmp_path / "b", "--python", slow_lines(tmp_path, 2, code))
        assert failed.returncode == code and "line 2\n" in failed.stdout
        assert failed.stderr.splitlines()[-1].endswith(f"failed, exit code {code}")
    nobody = submitted(cluster, project, tmp_path / "c", "--python", "/no/such/python")
    assert nobody.returncode == 127 and "give --python" in nobody.stderr


class Line:
    """Forwards a TCP port of this machine; the connection can be cut and restored."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        # `close` alone would keep the port as long as a thread waits in accept, so the socket is shut down first.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):  # the other end has closed already
                one.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def wait_for(path: Path, text: str, process: subprocess.Popen, timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while text not in path.read_text():
        assert process.poll() is None and time.monotonic() < end, path.read_text()
        time.sleep(0.1)


@pytest.fixture
def started(cluster, project, recipe, tmp_path):
    """Gives a function that starts a submission in the background; it returns the process and its two outputs."""
    processes = []

    def start(address: str, *arguments: str, **variables: str) -> tuple[subprocess.Popen, Path, Path]:
        outputs = [tmp_path / f"{name}{len(processes)}" for name in ("stdout", "stderr")]
        with outputs[0].open("w") as out, outputs[1].open("w") as err:
            process = subprocess.Popen(
                command(address, tmp_path / "run", *arguments),
                cwd=project, env=cluster[1] | variables, stdout=out, stderr=err,
            )  # fmt: skip
        processes.append(process)
        return process, *outputs

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ray_job(cluster, verb: str, submission_id: str) -> str:
    address, environment = cluster
    done = subprocess.run(
        [*RAY, "job", verb, submission_id, "--address", address],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_cut_line_loses_nothing_and_the_secret_is_not_shown(cluster, started, tmp_path):
    line = Line(int(cluster[0].rpartition(":")[2]))
    arguments = ["--python", slow_lines(tmp_path, 30, 1), "--env", "HF_TOKEN", "--submission-id", "cut"]
    process, stdout, stderr = started(f"http://127.0.0.1:{line.port}", *arguments, HF_TOKEN=SECRET)
    for after in ("line 3\n", "line 15\n"):
        wait_for(stdout, after, process)
        line.cut()
        wait_for(stderr, "trying again", process)
        time.sleep(1)
        line.mend()
    assert process.wait(180) == 1, stderr.read_text()
    assert "connected again" in stderr.read_text()
    written = re.findall(r"^line \d+$", stdout.read_text(), re.M)
    assert written == [f"line {number}" for number in range(1, 31)]
    # Ray's own command adds lines about the job around its log.
    assert stdout.read_text() in ray_job(cluster, "logs", "cut")
    assert SECRET not in stdout.read_text() + stderr.read_text()


def test_ctrl_c_leaves_the_job_and_stopping_it_ends_a_follower(cluster, started, tmp_path):
    address, _ = cluster
    long = ["--python", slow_lines(tmp_path, 2000, 0)]
    process, stdout, stderr = started(address, "--submission-id", "left", *long)
    wait_for(stdout, "line 1\n", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "left goes on. To follow it again: ray job logs left" in stderr.read_text()
    assert "RUNNING" in ray_job(cluster, "status", "left")
    again, printed, refused = started(address, "--submission-id", "left", *long)
    assert (again.wait(120), printed.read_text()) == (2, "")
    assert refused.read_text().splitlines()[-1].startswith("error: --submission-id: left: is the id of another job")
    ray_job(cluster, "stop", "left")

    quick, printed, _ = started(address, "--submission-id", "quick", "--no-wait", *long)
    assert (quick.wait(120), printed.read_text()) == (0, "quick\n")
    ray_job(cluster, "stop", "quick")

    follower, stdout, stderr = started(address, "--submission-id", "stopped", *long)
    wait_for(stdout, "line 1\n", follower)
    ray_job(cluster, "stop", "stopped")
    assert follower.wait(120) == 1 and "stopped stopped, exit code 1" in stderr.read_text()


def test_without_the_token_it_is_refused(cluster, project, recipe, tmp_path):
    address, environment = cluster
    (tmp_path / "home").mkdir()
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    bare = {name: value for name, value in environment.items() if name not in hidden} | {"HOME": str(tmp_path / "home")}
    for variables in ({}, {"RAY_AUTH_TOKEN": "f" * 64}):
        done = subprocess.run(
            command(address, tmp_path / "run"), cwd=project, env=bare | variables, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: --address: {address}: the token is missing or refused")
        assert done.stderr.count("\n") == 1


def test_our_packages_travel_where_the_working_directory_has_none(cluster, tmp_path):
    address, environment = cluster
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    script = (
        "import sys; from orchestrator.submit.job_log import JobServer, exit_code, follow\n"
        "server = JobServer(sys.argv[1])\n"
        "environment = {'working_dir': '.', 'py_modules': server.send_our_packages()}\n"
        "server.start('packages', sys.argv[2], environment)\n"
        "sys.exit(exit_code(follow(server, 'packages', sys.stdout.write, print)))"
    )
    entrypoint = f"{sys.executable} -c 'import orchestrator, tasks; print(orchestrator.__file__)'"
    done = subprocess.run(
        [sys.executable, "-c", script, address, entrypoint],
        cwd=folder, env=environment | {"RAY_API_SERVER_ADDRESS": address}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "py_modules" in done.stdout
