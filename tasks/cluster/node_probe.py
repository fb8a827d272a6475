"""Finds on each node of a cluster what it lacks for a run, before anything starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tasks.cluster.resources import NodeResources

HUB_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 90.0
"""The time that a node gets to answer; it starts a process and unpacks LayerBoost's packages first."""

_VERSION = re.compile(r"""^__version__ = ["']([^"']+)["']""", re.M)


@dataclass(frozen=True)
class ProbeRequest:
    """Says what a node looks for.

    Attributes:
        folder: the folder that must be writable, a path or an fsspec URL; None leaves storage unchecked.
        token: the part of the probe files' names that is unique to this probe.
        paths: local files and folders that must exist, by the fields that name them.
        models: names and revisions of models on the hub, by their fields.
        datasets: names of datasets on the hub, by their fields.
        packages: distributions whose versions are reported.
    """

    folder: str | None = None
    token: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()


@dataclass(frozen=True)
class NodeReport:
    """Holds what a node answered.

    Attributes:
        versions: the versions of `python`, `layerboost` and the requested packages; None for a missing one.
        shm_bytes: the size of /dev/shm; None where there is none.
        missing: the reason why something is unavailable, by the field that names it.
        storage: the reason why the folder cannot be used; None if it can.
        clock_s: the node's time of day when it had finished.
    """

    versions: Mapping[str, str | None]
    shm_bytes: int | None
    missing: Mapping[str, str]
    storage: str | None
    clock_s: float


@dataclass(frozen=True)
class Answer:
    """Holds a node's report, or why there is none, and the least lead of its clock over this process's clock."""

    report: NodeReport | None
    failure: str = ""
    ahead_s: float = 0.0


def probe_node(request: ProbeRequest, name: str) -> NodeReport:
    """Looks for everything on this machine; it writes only the probe file `name`, and only next to the driver's.

    Args:
        request: what to look for.
        name: the name of this node's probe file.
    """
    missing = {place: "is not there" for place, path in request.paths.items() if not os.path.exists(path)}
    for place, (model, revision) in request.models.items():
        missing |= _reason(place, _hub_model, model, revision)
    for place, dataset in request.datasets.items():
        missing |= _reason(place, _hub_dataset, dataset)
    return NodeReport(
        versions=versions(request.packages),
        shm_bytes=_shm_bytes(),
        missing=missing,
        storage=None if request.folder is None else _storage(request.folder, request.token, name),
        clock_s=time.time(),
    )


def probe_nodes(request: ProbeRequest, nodes: Sequence[NodeResources], timeout_s: float) -> dict[str, Answer]:
    """Makes every node of the connected cluster probe itself, even a node that offers no CPU.

    Args:
        request: what to look for; if it has a folder, the driver's probe file is there already.
        nodes: the nodes to ask.
        timeout_s: the time after which a node counts as silent and its probe is cancelled.

    Returns:
        An answer by each node's id.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(probe_node)
    pending, sent_s = {}, time.time()
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
        pending[probe.options(**options).remote(request, node.node_id)] = node.node_id
    answers = {}
    end = time.monotonic() + timeout_s
    while pending and (left_s := end - time.monotonic()) > 0:
        # Answers are taken one at a time, because the time of arrival shows how far the node's clock is off.
        for done in ray.wait(list(pending), num_returns=1, timeout=left_s)[0]:
            answers[pending.pop(done)] = _answer(done, sent_s)
    for late, node_id in pending.items():
        ray.cancel(late, force=True)
        answers[node_id] = Answer(None, f"no answer within {timeout_s:g} s")
    return answers


def ahead_s(clock_s: float, sent_s: float, arrived_s: float) -> float:
    """Returns the least lead, in seconds, of a clock that read `clock_s` between question and answer.

    It is negative for a clock that is behind. A clock that agrees reads a time between the two, however slow either
    machine is, and gives 0.
    """
    return max(clock_s - arrived_s, 0.0) + min(clock_s - sent_s, 0.0)


def put_probe_file(folder: str, token: str, name: str) -> str | None:
    """Writes a probe file and reads it back; returns why that fails, None if it works."""
    filesystem, path = _probe_file(folder, token, name)
    try:
        filesystem.pipe_file(path, token.encode())
        return None if filesystem.cat_file(path) == token.encode() else "reads back other than it was written"
    except Exception as error:  # each store's library raises errors of its own kinds
        return f"cannot be written ({_first_line(error)})"


def take_probe_file(folder: str, token: str, name: str) -> str | None:
    """Reads and removes a probe file; returns why that fails, None if it works."""
    filesystem, path = _probe_file(folder, token, name)
    try:
        filesystem.invalidate_cache()
        found = filesystem.cat_file(path)
        filesystem.rm_file(path)
    except Exception as error:  # each store's library raises errors of its own kinds
        return _first_line(error)
    return None if found == token.encode() else "it reads other than it was written"


def existing_ancestor(folder: str) -> str:
    """Returns the folder or its nearest existing ancestor, because probing creates no folders; a URL stays as it is."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    if not isinstance(filesystem, LocalFileSystem):
        return folder
    ancestor = Path(path).absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    return str(ancestor)


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Returns the versions of Python, LayerBoost and distributions without importing any of them."""
    found: dict[str, str | None] = {"python": platform.python_version(), "layerboost": _our_version()}
    for package in packages:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _our_version() -> str | None:
    """Returns the version of the package that would be imported; another one may be installed."""
    spec = importlib.util.find_spec("layerboost")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        file = Path(folder) / "version.py"
        if file.is_file() and (match := _VERSION.search(file.read_text(encoding="utf-8"))):
            return match[1]
    return None


def _storage(folder: str, token: str, name: str) -> str | None:
    filesystem, drivers = _probe_file(folder, token, "driver")
    try:
        filesystem.invalidate_cache()
        is_shared = filesystem.exists(drivers) and filesystem.cat_file(drivers) == token.encode()
    except Exception as error:  # each store's library raises errors of its own kinds
        return f"cannot be read ({_first_line(error)})"
    reason = put_probe_file(folder, token, name)
    if reason is None and not is_shared:
        take_probe_file(folder, token, name)
        return "is another folder than the driver's"
    return reason


def _probe_file(folder: str, token: str, name: str) -> tuple[Any, str]:
    filesystem, path = fsspec.core.url_to_fs(folder)
    return filesystem, f"{path.rstrip('/')}/.probe-{token}-{name}"


def _shm_bytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def _hub_model(name: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)


def _hub_dataset(name: str) -> None:
    from huggingface_hub import HfApi, constants

    repository = name.partition(":")[0]
    home = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    if (home / repository.replace("/", "___")).is_dir():
        return
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)


def _reason(place: str, look: Callable[..., None], *what: str | None) -> dict[str, str]:
    try:
        look(*what)
    except Exception as error:  # the hub's client and its HTTP library raise many kinds of errors
        return {place: f"is not in the cache, and the hub cannot be asked ({_first_line(error)})"}
    return {}


def _answer(done: Any, sent_s: float) -> Answer:
    import ray

    arrived_s = time.time()
    try:
        report = ray.get(done)
    except Exception as error:  # the node died or could not set up LayerBoost's packages
        return Answer(None, _first_line(error))
    return Answer(report, ahead_s=ahead_s(report.clock_s, sent_s, arrived_s))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
