"""Joins or starts a Ray cluster, and computes how many workers of a size fit on it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost.environ import environment
from tasks.cluster.resources import (
    AUTO,
    NodeResources,
)

logger = logging.getLogger(__name__)

OUR_PACKAGES = ("layerboost", "tasks", "orchestrator")


MAX_ADDED_NODES = 1000
"""A node type without a limit counts as this many nodes."""

_NODE_GROUP_LABEL = "ray.io/node-group"
_PROBE_TIMEOUT_S = 4.0
_PROBE_COMMAND_TIMEOUT_S = 30.0
"""Ray's command imports for seconds on a busy machine before it asks; only a server that is no Ray keeps it waiting."""


class ClusterError(RuntimeError):
    """There is no cluster to work on; the message names the address and the remedy."""


@dataclass(frozen=True)
class ClusterInfo:
    """Describes the cluster that this process is connected to.

    Attributes:
        address: the address of the cluster's head (`host:port`).
        started: True if `connect` started the cluster, so that `shutdown` ends it.
        nodes: the living nodes.
    """

    address: str
    started: bool
    nodes: tuple[NodeResources, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


_started = False


def connect(address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> ClusterInfo:
    """Connects this process to a cluster without printing; a second call only describes the cluster again.

    * If RAY_ADDRESS is set, by a Ray job or by hand, it joins that cluster. A job's workers inherit the job's working
      directory, and with it LayerBoost's packages.
    * With an address it joins that cluster and sends LayerBoost's packages as `py_modules`. The process must run on a
      machine that the cluster's nodes can reach.
    * Otherwise it starts an embedded cluster of this machine's CPUs and GPUs, which uses only loopback, has no
      dashboard, and ends with the process.

    Token authentication is turned on if RAY_AUTH_MODE is unset and a token exists (RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token). This is safe because a cluster that needs no token accepts one.

    Args:
        address: `host:port` or `auto` (the cluster that runs on this machine); None chooses as described above.
        num_cpus, num_gpus: resources of the embedded cluster; None takes what the machine has.

    Raises:
        ClusterError: nothing answers at the address, the token is refused, or the address has another form.
    """
    global _started
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None:
        use_token_if_at_hand()
    import ray

    if ray.is_initialized():
        return _info()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _keep_ray_off_stdout()
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        with _on_loopback():
            ray.init(address="local", num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=False, **quiet)
        _started = True
        return _info()
    if not _in_job():
        _check_address(address)
        quiet["runtime_env"] = {"py_modules": our_package_folders(), "excludes": ["__pycache__"]}
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ClusterError(
            f"address: {address}: no cluster there ({error}); start one with ray start --head"
        ) from error
    return _info()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Keeps all servers of an embedded cluster on 127.0.0.1, which is Ray's default on Windows and macOS.

    On Linux Ray would listen on the machine's address and, without a token, take commands from anyone who reaches it.
    """
    from ray._private import ray_constants

    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):  # for the processes that Ray starts
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def use_token_if_at_hand() -> None:
    """Turns token authentication on if RAY_AUTH_MODE is unset and a token exists."""
    if os.environ.get("RAY_AUTH_MODE"):
        return
    at_hand = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if at_hand or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
        if "ray" in sys.modules:
            # Ray has read the variable when it was imported, so it must be told to read it again.
            from ray import _raylet

            _raylet.Config.initialize("")  # type: ignore[attr-defined]


def shutdown() -> None:
    """Ends the embedded cluster if `connect` started one; a joined cluster goes on."""
    global _started
    if _started:
        import ray

        ray.shutdown()
        _started = False


def resources() -> tuple[NodeResources, ...]:
    """Returns the living nodes of the connected cluster, the largest first."""
    import ray

    nodes = (
        NodeResources(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            object_store_bytes=node["Resources"].get("object_store_memory", 0.0),
            labels=None if _started else tuple(sorted(node["Labels"].items())),
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    return tuple(sorted(nodes, key=lambda node: (-node.gpus, -node.cpus, node.node_id)))


def addable() -> tuple[NodeResources, ...]:
    """Returns the nodes that an autoscaler could add; it must have reported its node types to the cluster's head."""
    import ray
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None:
        return ()
    living = Counter(node["Labels"].get(_NODE_GROUP_LABEL) for node in ray.nodes() if node["Alive"])
    nodes: list[NodeResources] = []
    for group in config.node_group_configs:
        # A count of -1 means that there is no limit.
        most = MAX_ADDED_NODES if group.max_count < 0 else group.max_count
        size = (float(group.resources.get("CPU", 0)), float(group.resources.get("GPU", 0)))
        n_more = min(most - living[group.name], MAX_ADDED_NODES)
        nodes += [NodeResources(f"{group.name}-{index}", group.name, *size, labels=None) for index in range(n_more)]
    return tuple(nodes)


def our_package_folders() -> list[str]:
    """Returns the folders of LayerBoost's importable packages, for Ray's `py_modules`."""
    folders = []
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folders.append(str(Path(next(iter(spec.submodule_search_locations)))))
    return folders


def _info() -> ClusterInfo:
    import ray

    return ClusterInfo(ray.get_runtime_context().gcs_address, _started, resources())


def _in_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _keep_ray_off_stdout() -> None:
    """Redirects Ray's reports of dead workers to the log: Ray prints them to stdout, which carries results."""
    from ray._private import worker

    worker.print_to_stdstream = lambda data, ignore_prefix: logger.debug("ray: %s", "\n".join(data["lines"]))


def _check_address(address: str) -> None:
    """Checks the address first, because Ray waits two minutes and then ends the process.

    Ray does so when nothing answers or when it refuses the token.
    """
    if address == AUTO:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"address: {address}: must be host:port of a head that this machine shares a network with, or auto; "
            "to send work to a cluster elsewhere use ray job submit --working-dir . -- python -m orchestrator run ..."
        )
    try:
        with contextlib.closing(socket.create_connection((host, int(port)), timeout=_PROBE_TIMEOUT_S)):
            pass
    except OSError as error:
        raise ClusterError(f"address: {address}: nobody answers ({error}); check host, port and network") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"address: {address}: no Ray head answers; give the port of ray start --head") from error
    if probe.returncode == 0:
        return
    if "Authentication" in probe.stderr:
        raise ClusterError(
            f"address: {address}: the token is missing or refused; copy the head's ~/.ray/auth_token here "
            "(or set RAY_AUTH_TOKEN) and set RAY_AUTH_MODE=token"
        )
    reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else f"exit {probe.returncode}"
    raise ClusterError(f"address: {address}: no healthy Ray head ({reason}); look at ray status there")
