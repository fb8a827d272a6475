"""Tests the placement's arithmetic, unreachable addresses, and joining, leaving and outliving clusters."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from layerboost.checkpoint import ModelSource
from layerboost.evaluation.scores import QualitySpec
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan
from layerboost.text.sources import TextSource
from tasks.cluster import connection
from tasks.cluster.connection import ClusterError, connect, our_package_folders
from tasks.cluster.resources import NodeResources, ResourcesError, exclusive_worker, resolve_workers, with_node_to_come
from tasks.evaluation import EvaluationUnit, evaluate_units
from tasks.healing.job import Checkpoints, HealingJob, HealingText
from tasks.healing.run import heal
from tests.ray_workers import workers_of


def _nodes(*sizes) -> list[NodeResources]:
    return [NodeResources(f"n{i}", f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    "nodes, asked, expected",
    [
        (_nodes((2, 0)), {}, (2, 1, 0)),
        (_nodes((64, 0)), {}, (8, 8, 0)),
        (_nodes((16, 4), (16, 4)), {}, (8, 1, 1)),
        (_nodes((16, 4), (64, 0)), {}, (4, 1, 1)),
        (_nodes((16, 4)), {"gpus_per_worker": 0.5}, (8, 1, 0.5)),
        (_nodes((16, 2)), {"gpus_per_worker": 0.3}, (6, 1, 0.3)),
        (_nodes((16, 2)), {"gpus_per_worker": 0.4}, (4, 1, 0.4)),
        (_nodes((4, 8)), {"cpus_per_worker": 2}, (2, 2, 1)),
        (_nodes((4, 0), (2, 0)), {"cpus_per_worker": 2}, (3, 2, 0)),
        (_nodes((8, 2)), {"gpus_per_worker": 0}, (8, 1, 0)),
        (_nodes((8, 2)), {"workers": 1}, (1, 1, 1)),
        (_nodes((2, 0)), {"cpus_per_worker": 0.5, "workers": 4}, (4, 0.5, 0)),
    ],
)
def test_a_placement_becomes_workers_that_fit(nodes, asked, expected):
    resolved = resolve_workers(**asked, nodes=nodes)
    assert (resolved.n_workers, resolved.cpus, resolved.gpus) == expected
    assert resolved.actor_options() == {"num_cpus": expected[1], "num_gpus": expected[2]}


@pytest.mark.parametrize(
    "nodes, asked, field",
    [
        (_nodes((2, 0)), {"gpus_per_worker": 1}, "gpus_per_worker"),
        (_nodes((8, 4), (8, 4)), {"gpus_per_worker": 8}, "gpus_per_worker"),
        (_nodes((2, 0), (2, 0)), {"cpus_per_worker": 3}, "cpus_per_worker"),
        (_nodes((2, 0)), {"workers": 3}, "workers"),
        (_nodes((16, 2)), {"workers": 5, "gpus_per_worker": 0.4}, "workers"),
        (_nodes((2, 4), (64, 0)), {"cpus_per_worker": 8, "gpus_per_worker": 1}, "cpus_per_worker"),
        (_nodes((2, 0)), {"cpus_per_worker": 0}, "cpus_per_worker"),
    ],
)
def test_what_no_node_can_hold_is_refused_with_the_field(nodes, asked, field):
    with pytest.raises(ResourcesError, match=f"placement.{field}") as refused:
        resolve_workers(**asked, nodes=nodes)
    assert refused.value.field == field and refused.value.remedy


def test_auto_always_fits_and_leaves_no_room_for_another():
    nodes = _nodes(*((random.randint(1, 70), random.randint(0, 8)) for _ in range(random.randint(1, 5))))
    resolved = resolve_workers(nodes=nodes)
    with pytest.raises(ResourcesError):
        resolve_workers(resolved.n_workers + 1, resolved.cpus, resolved.gpus, nodes=nodes)


@pytest.mark.parametrize("address", ["ray://somewhere:10001", "http://somewhere:8265", "somewhere", "somewhere:port"])
def test_addresses_of_another_kind_are_refused_with_the_way_that_works(address):
    with pytest.raises(ClusterError, match="ray job submit") as refused:
        connect(address)
    assert address in str(refused.value)


def test_an_address_where_nobody_answers_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(ClusterError, match="nobody answers"):
            connect(f"127.0.0.1:{taken.getsockname()[1]}")
    assert time.monotonic() - start < 10


def test_our_packages_are_found_for_the_trip():
    assert [Path(folder).name for folder in our_package_folders()] == ["layerboost", "tasks", "orchestrator"]
    assert all((Path(folder) / "__init__.py").exists() for folder in our_package_folders())


@pytest.mark.cluster
def test_the_embedded_cluster_starts_once_and_ends_with_shutdown(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    me = psutil.Process()
    before, children = listening([me]), set(me.children())
    info = connect(num_cpus=2)
    try:
        assert info.started and info.cpus == 2 and len(info.nodes) == 1
        assert connect() == info
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        started = [child for child in me.children() if child not in children]
        below = [process for child in started for process in child.children(recursive=True)]
        workers = workers_of(f"_{me.pid}")
        assert len(workers) >= 1
        assert {address for address, _ in listening([me, *started, *below, *workers]) - before} == {"127.0.0.1"}
    finally:
        connection.shutdown()
    assert not ray.is_initialized()


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Returns the addresses and ports on which the processes listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {tuple(c.laddr) for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    return {(address.removeprefix("::ffff:"), port) for address, port in found}


_JOIN = """
    import ray, sys
    sys.path.insert(0, {root!r})
    from tasks.cluster.connection import connect, shutdown
    info = connect({address!r})
    assert not info.started and info.cpus == 1, info

    @ray.remote
    def where():
        import layerboost, tasks, orchestrator
        return layerboost.__file__

    print(ray.get(where.remote()))
    shutdown()
    assert ray.is_initialized()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_running_cluster_is_joined_with_our_packages_and_left_running(tmp_path):
    """Joins a cluster that needs a token: the client finds the token itself, and a wrong one is refused in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    temp_dir = f"/tmp/layerboost-{os.getpid()}"  # the paths of sockets have a length limit
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "1"]
    command += ["--port", str(port), "--include-dashboard", "false", "--temp-dir", temp_dir]
    for offset, name in enumerate(("dashboard-agent-listen-port", "ray-client-server-port", "dashboard-port"), 1):
        command += [f"--{name}", str(port + offset if port < 65000 else port - offset)]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(port)
        root = str(Path(__file__).resolve().parents[3])
        script = textwrap.dedent(_JOIN.format(root=root, address=f"127.0.0.1:{port}"))
        unset = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
        joined = _python(script, tmp_path, unset)
        assert joined.returncode == 0, joined.stderr
        assert "py_modules" in joined.stdout, "the worker imported another copy than the one that travelled"
        wrong = _python(script, tmp_path, {**unset, "RAY_AUTH_TOKEN": "f" * 64})
        assert wrong.returncode == 1 and "the token is missing or refused" in wrong.stderr
        assert _python(script, tmp_path, unset).returncode == 0, "leaving ended the cluster"
    finally:
        for process in (*psutil.Process(head.pid).children(recursive=True), head):
            process.kill()
        head.wait(30)
        log.close()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the head did not start"
            time.sleep(0.2)


def _python(script: str, folder: Path, environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


_DIE = """
    import logging, os, signal, sys, time
    sys.path.insert(0, {root!r})
    import ray
    from tasks.cluster.connection import connect, shutdown
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    connect(num_cpus=1)
    try:
        ray.get(ray.remote(lambda: os.kill(os.getpid(), signal.SIGKILL)).options(max_retries=0).remote())
    except ray.exceptions.WorkerCrashedError:
        print("crashed")
    time.sleep(2)
    shutdown()
"""


@pytest.mark.cluster
def test_a_workers_death_leaves_stdout_to_the_results(tmp_path):
    script = textwrap.dedent(_DIE.format(root=str(Path(__file__).resolve().parents[3])))
    died = _python(script, tmp_path, {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"})
    assert died.returncode == 0 and died.stdout == "crashed\n"
    assert "A worker died" in died.stderr, "Ray says it in another way now: look whether stdout still stays clean"


def test_labels_choose_among_the_nodes_and_say_nothing_on_a_machine_alone():
    small, large = (replace(node, labels=(("hardware", name),)) for node, name in zip(_nodes((4, 1), (8, 2)), "ab"))
    wanted = {"hardware": "b"}
    found = resolve_workers(nodes=[small, large], labels=wanted)
    assert (found.n_workers, found.actor_options()["label_selector"]) == (2, wanted)
    assert exclusive_worker([small, large], {"hardware": "a"}).cpus == 4
    assert "label_selector" not in resolve_workers(nodes=[small, large]).actor_options()
    for ask in (resolve_workers, exclusive_worker):
        with pytest.raises(ResourcesError, match=r"placement.labels: hardware: c: no node .* ray start --labels"):
            ask(nodes=[small, large], labels={"hardware": "c"})
    alone = resolve_workers(nodes=[replace(small, labels=None)], labels=wanted)
    assert alone.n_workers == 1 and "label_selector" not in alone.actor_options()


def test_a_node_to_come_counts_where_none_that_is_there_has_anything_to_give():
    head, small = (replace(node, labels=(("hardware", "a"),)) for node in _nodes((0, 0), (4, 1)))
    growth = [replace(node, labels=None) for node in _nodes((8, 1), (48, 4), (96, 0))]
    assert with_node_to_come([head, small], growth, {}) == (head, small)
    assert with_node_to_come([head], [], {}) == (head,)
    with pytest.raises(ResourcesError, match="no node has a CPU or GPU to give"):
        exclusive_worker([head], {})
    for living, labels in (([head], {}), ([head, small], {"hardware": "b"})):
        nodes = with_node_to_come(living, growth, labels)
        assert nodes == (*living, growth[1])
        alone = exclusive_worker(nodes, labels)
        assert (alone.cpus, alone.gpus, alone.labels) == (48, 1, tuple(labels.items()))


@pytest.mark.cluster
def test_workers_trials_and_train_jobs_go_where_the_labels_are(tiny_checkpoint, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    ours = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    ours.add_node(num_cpus=3, labels={"hardware": "large"})
    try:
        ray.init(address=ours.address, log_to_driver=False, logging_level="ERROR")
        there = next(node for node in connection.resources() if ("hardware", "large") in (node.labels or ()))
        workers = resolve_workers(cpus_per_worker=1, nodes=connection.resources(), labels={"hardware": "large"})
        assert workers.n_workers == 3
        source = ModelSource(str(tiny_checkpoint / "model"))
        spec = QualitySpec(text=str(tiny_checkpoint / "text.txt"), sequence_tokens=8, n_sequences=2)
        seen = []
        units = [EvaluationUnit(plan=Plan.parse(plan, window=4)) for plan in ("SSSN", "SSNS", "SNSS")]
        failures = evaluate_units(units, source, spec, workers, on_result=lambda done: seen.append(done.worker.node_id))
        assert failures == []
        assert seen == [there.node_id] * 3
        log = str(tmp_path / "nodes")

        def note_node(*_) -> None:
            import ray

            with open(log, "a") as file:
                file.write(ray.get_runtime_context().get_node_id() + "\n")

        job = HealingJob(
            parent=source,
            plan=Plan.parse("SSSN", window=4),
            spec=HealingSpec(tokens=32, sequence_tokens=8, batch_sequences=2),
            text=HealingText((TextSource(str(tiny_checkpoint / "text.txt")),)),
            checkpoints=Checkpoints(str(tmp_path / "storage"), "there"),
            output=str(tmp_path / "out"),
            workers=replace(workers, n_workers=1),
            on_step=note_node,
        )
        heal(job)
        assert set(Path(log).read_text().split()) == {there.node_id}
    finally:
        ray.shutdown()
        ours.shutdown()
