"""Tests that a model from the hub is downloaded once for each node, however many workers load it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

REPOSITORY, REVISION = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class _Hub(BaseHTTPRequestHandler):
    """Serves the files of one repository as the hub does; the weights take a while."""

    folder: Path
    sent: Counter[str]

    def do_HEAD(self) -> None:
        self._answer(is_get=False)

    def do_GET(self) -> None:
        self._answer(is_get=True)

    def _answer(self, *, is_get: bool) -> None:
        prefix = f"/{REPOSITORY}/resolve/{REVISION}/"
        path = self.path.partition("?")[0]
        name = path.removeprefix(prefix)
        file = self.folder / name
        if not path.startswith(prefix) or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if is_get:
            self.sent[name] += 1
            if name == WEIGHTS:
                time.sleep(3)  # so that the other workers arrive during the download
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Logs nothing, to keep the test's output clean."""


_WORKERS = """
    import json, sys, time
    from layerboost.evaluation.scores import QualitySpec
    from layerboost.plan import Plan
    from tasks.evaluation import EvaluationUnit, evaluate_units; from layerboost.checkpoint import ModelSource
    from tasks.cluster.connection import connect, resources
    from tasks.cluster.resources import resolve_workers

    repository, revision, text = sys.argv[1:]
    connect(num_cpus=3)
    pids = []

    def on_result(done):
        pids.append(done.worker.pid)
        if len(set(pids)) == 1:
            time.sleep(8)  # units are tiny, so the first worker would do all of them while the others start

    failures = evaluate_units(
        [EvaluationUnit(plan=Plan.parse(plan)) for plan in ("NSSS", "SNSS", "SSNS", "SSSN", "NNSS", "SSNN")],
        ModelSource(repository, revision=revision),
        QualitySpec(text=text, n_sequences=4, sequence_tokens=24, batch_size=4),
        resolve_workers(3, 1, 0, nodes=resources()),
        on_result=on_result,
    )
    print(json.dumps({"pids": pids, "failures": [failure.error for failure in failures]}))
"""


@pytest.fixture
def hub(tiny_checkpoint):
    handler = type("Hub", (_Hub,), {"folder": tiny_checkpoint / "model", "sent": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.sent
    server.shutdown()


def test_workers_of_a_node_share_one_download(hub, tiny_checkpoint, tmp_path):
    address, sent = hub
    settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WORKERS), REPOSITORY, REVISION, str(tiny_checkpoint / "text.txt")],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["failures"] == [] and len(said["pids"]) == 6
    assert len(set(said["pids"])) > 1, "one worker did it all"
    assert sent[WEIGHTS] == 1, sent
