"""Tests clusters/wait_for.py on an idle head whose autoscaler starts nodes of two kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

WAIT_FOR = Path(__file__).resolve().parents[2] / "clusters" / "wait_for.py"
# This starts Ray's autoscaler, whose nodes are processes here. It needs a host of its own, because it first ends all of
# Ray. The wheel lacks the autoscaler's file of defaults, so the script puts one into the folder on that host.
START = """
import json, pathlib, shutil, subprocess
import ray.cluster_utils

commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
defaults = {
    "cluster_name": "fake", "max_workers": 8, "head_node_type": "ray.head.default", "upscaling_speed": 1.0,
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                 "disable_launch_config_check": True},
    "available_node_types": {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}},
    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "rsync_exclude": [], "rsync_filter": [], **{f"{name}_commands": [] for name in commands},
}
folder = pathlib.Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
if not (folder / "example.yaml").exists():
    copy = pathlib.Path("/tmp/fake_multi_node")
    shutil.copytree(folder, copy)
    (copy / "example.yaml").write_text(json.dumps(defaults))
    subprocess.run(["mount", "--bind", copy, folder], check=True)

def kind(hardware, gpus):
    return {"resources": {"CPU": 1, "GPU": gpus}, "labels": {"layerboost/hardware": hardware},
            "node_config": {}, "min_workers": 0, "max_workers": 2}

ray.cluster_utils.AutoscalingCluster(
    head_resources={"CPU": 0},
    worker_node_types={"gpu-small": kind("small", 1), "gpu-large": kind("large", 4)},
    autoscaler_v2=True,
    idle_timeout_minutes=0.5,  # A look at the nodes takes several seconds on a busy machine.
).start()
"""
NODES = """
import json, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
print(json.dumps([node["Labels"].get("layerboost/hardware", "head") for node in ray.nodes() if node["Alive"]]))
"""


def test_gpus_are_asked_for_by_hardware_and_leave_when_idle(hosts):
    def kinds() -> list[str]:
        return sorted(json.loads(hosts.run("h0", sys.executable, "-c", NODES).splitlines()[-1]))

    (hosts.shared / "wait_for.py").write_bytes(WAIT_FOR.read_bytes())
    wait_for = [sys.executable, "/shared/wait_for.py"]
    hosts.run("h0", sys.executable, "-c", START)
    assert kinds() == ["head"]
    hosts.run("h0", *wait_for, "gpus", "2", "--hardware", "small", "--timeout-s", "120")
    assert kinds() == ["head", "small", "small"]
    hosts.run("h0", *wait_for, "nodes", "3", "--timeout-s", "5")
    hosts.run("h0", *wait_for, "gpus", "9", "--hardware", "small", "--timeout-s", "3", expect=1)
    wait_until(lambda: kinds() == ["head"], "idle nodes leave, since nobody asks for them any more", timeout_s=90)
