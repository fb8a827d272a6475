"""Tests clusters/slurm.sh on two simulated hosts, where SSH replaces Slurm's srun."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.launched import LONG_TEXT, copy_project
from tests.conftest import repeatable_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Like srun it runs a command on a node in the caller's folder and environment, and ends it when it ends itself.
SRUN = """#!/usr/bin/env python3
import os, shlex, signal, subprocess, sys
node = next(word.split("=")[1] for word in sys.argv if word.startswith("--nodelist="))
command = sys.argv[1 + sum(word.startswith("--") for word in sys.argv[1:5]):]
assert sys.argv[1:4] == ["--nodes=1", "--ntasks=1", "--overlap"], sys.argv
settings = [f"{name}={value}" for name, value in os.environ.items()]
line = f"cd {shlex.quote(os.getcwd())}; echo $$ >&2; exec env -i {shlex.join([*settings, *command])}"
ssh = ["ssh", "-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", "/shared/key", node]
remote = subprocess.Popen([*ssh, line], stderr=subprocess.PIPE, text=True)
pid = remote.stderr.readline().strip()

def end(*_):
    subprocess.run([*ssh, f"kill {pid}"])

signal.signal(signal.SIGTERM, end)
for text in remote.stderr:
    sys.stderr.write(text)
sys.exit(remote.wait())
"""
RECIPE = repeatable_recipe(
    # A unit takes about a second, so that both nodes get some.
    quality={"text": LONG_TEXT, "sequences": 4000, "batch_size": 4},
    sensitivity={"treatments": ["none"], "shares": 16, "compare": False},
    placement={"workers": 2, "cpus_per_worker": 2},
)
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames h[0-1]" ] && printf 'h0\\nh1\\n'
"""


@pytest.fixture
def allocation(hosts, pristine_inputs) -> list[str]:
    """Returns the start of a command line that runs on the first node inside an allocation of both nodes."""
    tools = hosts.shared / "slurm"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    shutil.copy(hosts.folder / "key", hosts.shared / "key")
    for host in ("h0", "h1"):
        # On such machines the home folder is shared and host names are known.
        hosts.run(host, "sh", "-c", "mkdir -p /shared/home-ray && ln -sfn /shared/home-ray /root/.ray")
        hosts.run(host, "sh", "-c", "printf '10.77.0.10 h0\\n10.77.0.11 h1\\n' >> /etc/hosts")
    copy_project(hosts, pristine_inputs, RECIPE, long_text=120)
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "h[0-1]", "SLURM_CPUS_ON_NODE": "2"}
    settings = [f"{name}={value}" for name, value in variables.items()]
    path = f"PATH=/shared/slurm:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    return ["env", "-C", "/shared/project", path, *settings]


def test_a_job_runs_its_recipe_on_all_nodes_and_leaves_none_behind(hosts, allocation):
    run = ["clusters/slurm.sh", "inputs/recipe.yaml", "/shared/run", "--until", "sensitivity"]
    hosts.run("h0", *allocation, *run)
    out = hosts.shared / "run"
    assert (out / "sensitivity.csv").exists()
    records = [json.loads(path.read_text()) for path in (out / "records" / "sweep").glob("*.json")]
    assert {record["result"]["worker"]["node"] for record in records} == {"h0", "h1"}
    for host in ("h0", "h1"):
        assert not hosts.run(host, "pidof", "raylet", "gcs_server", expect=None).strip()
    assert oct((hosts.shared / "home-ray" / "auth_token").stat().st_mode & 0o777) == "0o600"
