"""What a node of a cluster lacks for a run, asked on the node itself before anything starts."""

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
"""A node starts a process, and unpacks our packages, before it answers."""

_VERSION = re.compile(r"""^__version__ = ["']([^"']+)["']""", re.M)


@dataclass(frozen=True)
class ProbeRequest:
    """What to look for.

    Attributes:
        folder: where files are to be written, a path or an fsspec URL; None asks nothing about storage.
        token: of the probe files' names, of this probe alone.
        paths: local files and folders that must be there, by the fields that name them.
        models: names and revisions of models on the hub, by their fields.
        datasets: names of datasets on the hub, by their fields.
        packages: distributions whose versions are asked.
    """

    folder: str | None = None
    token: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()


@dataclass(frozen=True)
class NodeReport:
    """What a node answered.

    Attributes:
        versions: of `python`, `layerboost` and the packages asked for; None where there is none.
        shm_bytes: size of /dev/shm; None where there is none.
        missing: why something cannot be had, by the field that names it.
        storage: why the folder cannot be used; None if it can.
        clock_s: the node's time of day when it had finished.
    """

    versions: Mapping[str, str | None]
    shm_bytes: int | None
    missing: Mapping[str, str]
    storage: str | None
    clock_s: float


@dataclass(frozen=True)
class Answer:
    """A node's report, or why there is none, and by how much at least its clock is ahead of this process's."""

    report: NodeReport | None
    failure: str = ""
    ahead_s: float = 0.0


def probe_node(request: ProbeRequest, name: str) -> NodeReport:
    """Looks for everything on this machine. Writes the probe file `name` where it finds the driver's, and nothing else.

    Args:
        request: what to look for.
        name: of this node among the probe files.
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
    """Has every node of the connected cluster probe itself, also those without a CPU to give.

    Args:
        request: what to look for; where it has a folder, the driver's probe file lies there already.
        nodes: to ask.
        timeout_s: after which a node counts as silent; its probe is cancelled.

    Returns:
        An answer for each node's id.
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
        # One at a time: when an answer arrives says how far its clock is off.
        for done in ray.wait(list(pending), num_returns=1, timeout=left_s)[0]:
            answers[pending.pop(done)] = _answer(done, sent_s)
    for late, node_id in pending.items():
        ray.cancel(late, force=True)
        answers[node_id] = Answer(None, f"no answer within {timeout_s:g} s")
    return answers


def ahead_s(clock_s: float, sent_s: float, arrived_s: float) -> float:
    """By how much at least a clock is ahead (below 0: behind) that read `clock_s` between question and answer.

    A clock that agrees reads something between the two, however slow either machine is.
    """
    return max(clock_s - arrived_s, 0.0) + min(clock_s - sent_s, 0.0)


def put_probe_file(folder: str, token: str, name: str) -> str | None:
    """Writes a probe file; returns why it cannot be written or read back, None if it can."""
    filesystem, path = _probe_file(folder, token, name)
    try:
        filesystem.pipe_file(path, token.encode())
        return None if filesystem.cat_file(path) == token.encode() else "reads back other than it was written"
    except Exception as error:  # of whatever kind a store's library has
        return f"cannot be written ({_first_line(error)})"


def take_probe_file(folder: str, token: str, name: str) -> str | None:
    """Removes a probe file; returns why it could not be read first, None if it could."""
    filesystem, path = _probe_file(folder, token, name)
    try:
        filesystem.invalidate_cache()
        found = filesystem.cat_file(path)
        filesystem.rm_file(path)
    except Exception as error:  # as above
        return _first_line(error)
    return None if found == token.encode() else "it reads other than it was written"


def existing_ancestor(folder: str) -> str:
    """The folder itself, or what is there of the way to it: probing makes no folders. URLs have none to make."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    if not isinstance(filesystem, LocalFileSystem):
        return folder
    ancestor = Path(path).absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    return str(ancestor)


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The versions of Python, of LayerBoost, and of distributions; nothing heavy is imported."""
    found: dict[str, str | None] = {"python": platform.python_version(), "layerboost": _our_version()}
    for package in packages:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _our_version() -> str | None:
    """Of the package that would be imported, which need not be the one that is installed."""
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
    except Exception as error:  # as above
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
    except Exception as error:  # the hub's client has many kinds, and its HTTP library more
        return {place: f"is not in the cache, and the hub cannot be asked ({_first_line(error)})"}
    return {}


def _answer(done: Any, sent_s: float) -> Answer:
    import ray

    arrived_s = time.time()
    try:
        report = ray.get(done)
    except Exception as error:  # a node that dies, or cannot set up our packages
        return Answer(None, _first_line(error))
    return Answer(report, ahead_s=ahead_s(report.clock_s, sent_s, arrived_s))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
