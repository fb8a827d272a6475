"""Tests what a node finds on itself, on this machine and without Ray."""

from __future__ import annotations

import importlib.metadata
import time

import pytest

from layerboost.version import __version__
from tasks.cluster import node_probe
from tasks.cluster.node_probe import ProbeRequest, existing_ancestor, probe_node, put_probe_file, take_probe_file

TOKEN = "0123456789ab"


def test_what_this_machine_has():
    before = time.time()
    report = probe_node(ProbeRequest(packages=("torch", "no-such-package")), "me")
    assert report.versions["torch"] == importlib.metadata.version("torch")
    assert report.versions["no-such-package"] is None
    assert report.versions["layerboost"] == __version__
    assert before <= report.clock_s <= time.time()
    assert report.storage is None and not report.missing
    assert report.shm_bytes is None or report.shm_bytes > 0


def test_files_and_hub_names_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "datasets" / "some___cached").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("x")
    request = ProbeRequest(
        paths={"quality.text": str(tmp_path / "text.txt"), "model.path": str(tmp_path / "model")},
        models={"healing.teacher": ("some/model", None)},
        datasets={"a": "some/cached:en", "b": "some/data"},
    )
    missing = probe_node(request, "me").missing
    assert missing == {
        "model.path": "is not there",
        "healing.teacher": "is not in the cache, and the hub cannot be asked (HF_HUB_OFFLINE is set)",
        "b": "is not in the cache, and the hub cannot be asked (HF_HUB_OFFLINE is set)",
    }


@pytest.mark.parametrize("kind", ["", "memory://"])
def test_a_shared_folder_is_written_and_left_as_it_was(tmp_path, kind):
    folder = kind + (str(tmp_path) if not kind else f"probe{time.monotonic_ns()}")
    request = ProbeRequest(folder, TOKEN)
    assert put_probe_file(folder, TOKEN, "driver") is None
    assert probe_node(request, "node").storage is None
    assert take_probe_file(folder, TOKEN, "node") is None
    assert take_probe_file(folder, TOKEN, "driver") is None
    assert take_probe_file(folder, TOKEN, "node")  # the reason is that the file is gone
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_nodes_own_is_noticed_and_left_as_it_was(tmp_path):
    assert probe_node(ProbeRequest(str(tmp_path), TOKEN), "node").storage == "is another folder than the driver's"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "absent", tmp_path / "file", "/proc"):
        assert str(probe_node(ProbeRequest(str(bad), TOKEN), "node").storage).startswith("cannot be")
    # A file of the same name with other content is no proof of a shared folder.
    put_probe_file(str(tmp_path), TOKEN, "driver")
    (tmp_path / f".probe-{TOKEN}-driver").write_text("another")
    assert probe_node(ProbeRequest(str(tmp_path), TOKEN), "node").storage == "is another folder than the driver's"


def test_probing_makes_no_folders(tmp_path):
    assert existing_ancestor(str(tmp_path / "a" / "b")) == str(tmp_path)
    assert existing_ancestor("memory://bucket/run") == "memory://bucket/run"
    assert existing_ancestor(f"file://{tmp_path}/a") == str(tmp_path)


@pytest.mark.parametrize(("clock_s", "expected_s"), [(100.0, 0.0), (109.0, 0.0), (115.0, 5.0), (70.0, -30.0)])
def test_only_a_clock_outside_the_question_and_the_answer_is_off(clock_s, expected_s):
    assert node_probe.ahead_s(clock_s, sent_s=100.0, arrived_s=110.0) == expected_s


@pytest.mark.cluster
def test_every_node_answers_also_one_without_a_cpu_and_a_silent_one_is_named(monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    from tasks.cluster.connection import addable, resources
    from tasks.cluster.resources import NodeResources

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        nodes = resources()
        answers = node_probe.probe_nodes(ProbeRequest(), nodes, 60)
        assert sorted(answers) == sorted(node.node_id for node in nodes)
        for answer in answers.values():
            assert answer.report is not None and answer.failure == "" and answer.ahead_s == 0
        gone = NodeResources("ab" * 28, "10.0.0.9", 1, 0)
        answers = node_probe.probe_nodes(ProbeRequest(), [*nodes, gone], 20)
        assert answers[gone.node_id].report is None and answers[gone.node_id].failure
        assert addable() == ()
        _report_node_types(cluster.address)
        assert [(node.cpus, node.gpus) for node in addable()] == [(8.0, 2.0)] * 3
        silent = node_probe.probe_nodes(ProbeRequest(), nodes, 0.0)
        assert {answer.failure for answer in silent.values()} == {"no answer within 0 s"}
    finally:
        ray.shutdown()
        cluster.shutdown()


def _report_node_types(address: str) -> None:
    """Reports to the cluster's head, as an autoscaler does, that three nodes of 8 CPUs and 2 GPUs can be added."""
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE, GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    group = NodeGroupConfig(name="gpu", max_count=3, resources={"CPU": 8, "GPU": 2})
    config = ClusterConfig(node_group_configs=[group]).SerializeToString()
    GcsClient(address).internal_kv_put(
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), config, True, GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    )
