"""Describes the resources of nodes and workers, and computes how many workers fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

AUTO = "auto"


MAX_AUTO_CPU_WORKERS_PER_NODE = 8
"""Without GPUs `auto` starts at most this many workers on a node, because each one loads the model."""


class ResourcesError(ValueError):
    """The cluster can never hold the workers.

    Attributes:
        field: the placement field at fault: `workers`, `cpus_per_worker`, `gpus_per_worker` or `labels`.
        value: the value of the field.
        remedy: what to write instead.
    """

    def __init__(self, field: str, value: object, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"placement.{field}: {value}: {remedy}")


@dataclass(frozen=True)
class NodeResources:
    """Describes a living node, or one that could be started.

    Attributes:
        labels: Ray's node labels. None means that every label fits: the labels of nodes to come are unknown, and those
            of the embedded cluster do not count.
    """

    node_id: str
    address: str
    cpus: float
    gpus: float
    object_store_bytes: float = 0.0
    labels: tuple[tuple[str, str], ...] | None = ()

    def carries(self, labels: Mapping[str, str]) -> bool:
        """Says whether work for nodes with these labels may run on this node."""
        return self.labels is None or set(labels.items()) <= set(self.labels)


@dataclass(frozen=True)
class WorkerResources:
    """Says how many workers run, what each one holds, and which labels their nodes must carry.

    Attributes:
        activations_gib: the limit on a worker's activations in GiB; None lets the worker choose.
    """

    n_workers: int
    cpus: float
    gpus: float
    activations_gib: float | None = None
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def actor_options(self) -> dict:
        """Returns the options for `ray.remote(...)` of one worker."""
        selector = {"label_selector": dict(self.labels)} if self.labels else {}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **selector}


def labelled(nodes: Sequence[NodeResources], labels: Mapping[str, str]) -> tuple[NodeResources, ...]:
    """Returns the nodes on which work for these labels may run."""
    return tuple(node for node in nodes if node.carries(labels))


def with_node_to_come(
    nodes: Sequence[NodeResources], growth: Sequence[NodeResources], labels: Mapping[str, str]
) -> tuple[NodeResources, ...]:
    """Returns the nodes, with the largest of `growth` added if no node with the labels offers a CPU or GPU.

    This is the case on an idle cluster in a cloud, of which only the head is left.
    """
    if not growth or any(node.cpus or node.gpus for node in labelled(nodes, labels)):
        return tuple(nodes)
    return (*nodes, max(growth, key=lambda node: (node.gpus, node.cpus)))


def selected(nodes: Sequence[NodeResources], labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns the labels to pass to Ray; there are none if labels do not count, as on the embedded cluster."""
    return () if all(node.labels is None for node in nodes) else tuple(sorted(labels.items()))


def no_such_node(labels: Mapping[str, str]) -> ResourcesError:
    """Makes the error that no node carries the labels."""
    written = ", ".join(f"{name}: {value}" for name, value in sorted(labels.items()))
    return ResourcesError("labels", written, "no node carries them; start one with ray start --labels")


def resolve_workers(
    workers: int | str = AUTO,
    cpus_per_worker: float | str = AUTO,
    gpus_per_worker: float | str = AUTO,
    *,
    nodes: Sequence[NodeResources],
    growth: Sequence[NodeResources] = (),
    labels: Mapping[str, str] = MappingProxyType({}),
) -> WorkerResources:
    """Turns a placement into a number of workers and the size of each, or raises if it can never be placed.

    `auto` starts as many workers as fit. Each takes one GPU if there are GPUs. Without GPUs at most
    MAX_AUTO_CPU_WORKERS_PER_NODE workers share the CPUs of a node. The check is needed because Ray waits for ever,
    without an error, for a worker that no node can hold.

    Args:
        workers, cpus_per_worker, gpus_per_worker: numbers or `auto`; GPUs may be a fraction of one.
        nodes: the nodes of the cluster.
        growth: the nodes that an autoscaler adds when work waits; they count where the others do not suffice.
        labels: the labels that a node must carry.

    Raises:
        ResourcesError: no node can hold one worker, or the nodes together cannot hold all of them.
    """
    usable = labelled(nodes, labels)
    if not usable and not growth:
        raise no_such_node(labels)
    try:
        workers_there = fit_workers(workers, cpus_per_worker, gpus_per_worker, usable)
    except ResourcesError:
        if not growth:
            raise
        workers_there = fit_workers(workers, cpus_per_worker, gpus_per_worker, (*usable, *growth))
    return replace(workers_there, labels=selected(nodes, labels))


def exclusive_worker(nodes: Sequence[NodeResources], labels: Mapping[str, str]) -> WorkerResources:
    """Describes a worker that takes all CPUs and one GPU of the largest node with these labels (by GPUs, then CPUs).

    Raises:
        ResourcesError: no node carries the labels, or none that does has a CPU or GPU to give.
    """
    usable = labelled(nodes, labels)
    if not usable:
        raise no_such_node(labels)
    if not any(node.cpus or node.gpus for node in usable):
        raise ResourcesError("workers", 1, "no node has a CPU or GPU to give; start one with ray start --address")
    node = max(usable, key=lambda node: (node.gpus, node.cpus))
    return WorkerResources(1, node.cpus, min(1.0, node.gpus), labels=selected(nodes, labels))


def jobs_at_once(workers: WorkerResources, nodes: Sequence[NodeResources]) -> int:
    """Returns how many jobs with these workers each fit on the nodes side by side, at least 1."""
    size = {"cpus": workers.cpus, "gpus": workers.gpus}
    n_workers = 0
    for node in labelled(nodes, dict(workers.labels)):
        n_workers += min(int(getattr(node, name) / amount + 1e-9) for name, amount in size.items() if amount)
    return max(1, n_workers // workers.n_workers)


def fit_workers(
    workers: int | str, cpus_per_worker: float | str, gpus_per_worker: float | str, nodes: Sequence[NodeResources]
) -> WorkerResources:
    most_cpus, most_gpus = (max((size(node) for node in nodes), default=0.0) for size in (_cpus, _gpus))
    gpus = (1.0 if most_gpus >= 1 else 0.0) if gpus_per_worker == AUTO else float(gpus_per_worker)
    if gpus > most_gpus:
        raise ResourcesError("gpus_per_worker", gpus, f"no node has more than {most_gpus:g} GPUs; ask for at most that")
    if cpus_per_worker != AUTO:
        cpus = float(cpus_per_worker)
    elif gpus > 0:
        cpus = 1.0
    else:
        cpus = max(1.0, most_cpus // MAX_AUTO_CPU_WORKERS_PER_NODE)
    if cpus > most_cpus:
        raise ResourcesError("cpus_per_worker", cpus, f"no node has more than {most_cpus:g} CPUs; ask for at most that")
    if cpus == 0 and gpus == 0:
        raise ResourcesError("cpus_per_worker", 0, "a worker needs a CPU or a GPU; give one of them")
    fitting = sum(_fitting(node, cpus, gpus) for node in nodes)
    if fitting == 0:
        raise ResourcesError(
            "cpus_per_worker", cpus, f"no node has {cpus:g} CPUs and {gpus:g} GPUs together; ask for fewer of one"
        )
    n_workers = fitting if workers == AUTO else int(workers)
    if n_workers > fitting:
        raise ResourcesError(
            "workers", n_workers, f"only {fitting} of {cpus:g} CPUs and {gpus:g} GPUs fit; ask for at most that"
        )
    return WorkerResources(n_workers, cpus, gpus)


def _cpus(node: NodeResources) -> float:
    return node.cpus


def _gpus(node: NodeResources) -> float:
    return node.gpus


def _fitting(node: NodeResources, cpus: float, gpus: float) -> int:
    """Returns how many workers of a size fit on a node; a fraction of a GPU never spans two GPUs."""
    by_cpu = math.floor(node.cpus / cpus + 1e-9) if cpus else math.inf
    if not gpus:
        by_gpu = math.inf
    elif gpus < 1:
        by_gpu = int(node.gpus) * math.floor(1 / gpus + 1e-9)
    else:
        by_gpu = math.floor(node.gpus / gpus + 1e-9)
    return int(min(by_cpu, by_gpu))
