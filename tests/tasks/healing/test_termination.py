"""Tests termination notices: metadata servers over HTTP, SIGTERM, and a healing that saves a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.healing import termination
from tasks.healing.job import StepEvent
from tasks.healing.run import heal
from tests.tasks.healing.test_healing import STEPS, check_result, folder, job_of, local, record_steps, steps_in

__all__ = ["folder", "local"]


class _Cloud(BaseHTTPRequestHandler):
    """Answers as EC2 (only IMDSv2) and Compute Engine do; the file `notice` exists once notice is given."""

    notice: Path

    def do_PUT(self):
        ok = self.path == "/aws/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if ok else 404, "a-token")

    def do_GET(self):
        if self.path == "/aws/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401, "")
            elif self.notice.exists():
                self._answer(200, json.dumps({"action": "terminate", "time": "2026-11-28T15:00:00Z"}))
            else:
                self._answer(404, "Not Found")
        elif self.path == "/gcp/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "TRUE" if self.notice.exists() else "FALSE")
        else:
            self._answer(403, "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextmanager
def cloud(notice: Path):
    """Serves the metadata of a cloud and gives the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Cloud", (_Cloud,), {"notice": notice}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


ASKED = {"aws": termination._aws_notice, "gcp": termination._gcp_notice}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_cloud_says(tmp_path, name):
    def ask(url: str) -> bool:
        return ASKED[name](f"{url}/{name}")

    notice = tmp_path / "notice"
    with cloud(notice) as url:
        assert ask(url) is False
        notice.touch()
        assert ask(url) is True
        with pytest.raises((OSError, ValueError)):
            ask(f"{url}/elsewhere")
    with pytest.raises(OSError):
        ask(url)


_LISTENER = """
import os, signal, sys, time
from tasks.healing.termination import MetadataServers, listen_for_notices, notice_given
listen_for_notices(MetadataServers(*sys.argv[1:3]))
if any(sys.argv[1:3]):
    print("none" if not notice_given() else "too early", flush=True)
    while not notice_given():
        time.sleep(0.1)
    sys.exit()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print("notice" if notice_given() else "none", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""


def listener(aws: str = "", gcp: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", _LISTENER, aws, gcp]
    return subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)


def test_the_first_sigterm_is_a_notice_and_the_second_ends_the_process():
    process = listener()
    stdout, _ = process.communicate(timeout=60)
    assert stdout == "notice\n" and process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ASKED)
def test_a_notice_of_either_cloud_is_noticed(tmp_path, name):
    notice = tmp_path / "notice"
    with cloud(notice) as url:
        process = listener(**{name: f"{url}/{name}"})
        assert process.stdout is not None and process.stdout.readline() == "none\n"
        notice.touch()
        assert process.wait(timeout=60) == 0


@pytest.mark.cluster
@pytest.mark.slow
def test_a_worker_that_gets_sigterm_has_all_write_a_checkpoint_first(folder, local, tmp_path):
    import ray

    steps, mark = tmp_path / "steps", tmp_path / "signalled"
    record = record_steps(steps)

    def signal_once(event: StepEvent) -> None:
        record(event)
        if event.rank == 1 and event.step == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        if event.step == 5:
            time.sleep(2)  # so that the main thread runs its handler during training

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        # The only checkpoints are those at the ends of the phases and the one after the notice.
        job = job_of(
            folder, "sigterm", n_workers=2, max_failures=1, checkpoint_every_steps=100, on_step=signal_once, **_NO_CLOUD
        )
        check_result(heal(job), job, local)
    finally:
        ray.shutdown()
    ran = steps_in(steps)
    assert mark.exists() and ran == list(range(1, STEPS + 1)), "a step was done twice"


_NO_CLOUD = {"metadata_servers": termination.MetadataServers("", "")}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_spot_machine_that_goes_is_left_behind_a_checkpoint(folder, local, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    notice, steps = tmp_path / "notice", tmp_path / "steps"
    record = record_steps(steps)

    def go_slowly(event: StepEvent) -> None:
        record(event)
        if event.step == 5 and not notice.exists():
            notice.touch()
            time.sleep(termination.POLL_S + 2)

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    with cloud(notice) as url:
        try:
            spot = nodes.add_node(num_cpus=1)
            ray.init(address=nodes.address, log_to_driver=False)
            servers = termination.MetadataServers(aws=f"{url}/aws", gcp="")
            job = job_of(folder, "spot", checkpoint_every_steps=100, on_step=go_slowly, metadata_servers=servers)

            with ThreadPoolExecutor(1) as beside:  # only the main thread can start the cluster's nodes
                healing = beside.submit(heal, job)
                while not notice.exists():
                    time.sleep(0.1)
                time.sleep(termination.POLL_S + 6)
                notice.unlink()
                nodes.add_node(num_cpus=1)
                nodes.remove_node(spot, allow_graceful=False)
                check_result(healing.result(timeout=180), job, local)  # succeeds although no failure is allowed
        finally:
            ray.shutdown()
            nodes.shutdown()
    assert sorted(set(steps_in(steps))) == list(range(1, STEPS + 1))
    assert len(steps_in(steps)) <= STEPS + 1
