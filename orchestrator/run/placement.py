"""Turns the placement of a recipe and the nodes of a cluster into the workers of each kind of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.recipe.errors import InputError
from orchestrator.recipe.recipe import Recipe
from tasks.cluster.resources import (
    AUTO,
    MAX_AUTO_CPU_WORKERS_PER_NODE,
    NodeResources,
    ResourcesError,
    WorkerResources,
    exclusive_worker,
    labelled,
    resolve_workers,
    with_node_to_come,
)


@dataclass(frozen=True)
class WantedWorkers:
    """Workers that are asked for, whether the nodes can hold them or not.

    Attributes:
        field: the placement's field that gives their number.
        workers, cpus, gpus: the number of workers, and the size of each; numbers or `auto`.
        labels: the labels that their nodes must carry.
    """

    field: str
    workers: int | str
    cpus: float | str
    gpus: float | str
    labels: Mapping[str, str]

    def on(self, nodes: Sequence[NodeResources], growth: Sequence[NodeResources] = ()) -> WorkerResources:
        """Fits the workers on nodes, and on nodes that an autoscaler could add if the others do not suffice.

        Raises:
            ResourcesError: The nodes can never hold them.
        """
        return resolve_workers(self.workers, self.cpus, self.gpus, nodes=nodes, growth=growth, labels=self.labels)


@dataclass(frozen=True)
class Placement:
    """Says which workers each kind of work of a recipe gets on some nodes.

    Attributes:
        recipe: the recipe of the run.
        nodes: the existing nodes.
        growth: the nodes that an autoscaler could add.
    """

    recipe: Recipe
    nodes: Sequence[NodeResources]
    growth: Sequence[NodeResources] = ()

    def evaluating(self) -> WorkerResources:
        """Returns the workers that judge models.

        Raises:
            ResourcesError: the nodes can never hold them.
        """
        budget = self.recipe.placement.activations_gib
        workers = self.wanted_to_evaluate().on(self.nodes, self.growth)
        return replace(workers, activations_gib=budget if isinstance(budget, float) else None)

    def healing(self, n_jobs: int = 1) -> WorkerResources:
        """Returns the workers that heal one plan while `n_jobs` healings run side by side.

        Raises:
            ResourcesError: the nodes can never hold them.
        """
        nodes = with_node_to_come(self.nodes, self.growth, self.recipe.placement.labels.heal)
        return replace(self, nodes=nodes).wanted_to_heal(n_jobs).on(nodes)

    def measuring(self) -> WorkerResources:
        """Returns the one worker that measures speed, with a node to itself.

        Raises:
            ResourcesError: there is no such node.
        """
        labels = self.recipe.placement.labels.time
        return exclusive_worker(with_node_to_come(self.nodes, self.growth, labels), labels)

    def wanted_to_evaluate(self) -> WantedWorkers:
        """Returns the workers that the recipe wants for judging."""
        placement = self.recipe.placement
        sizes = placement.workers, placement.cpus_per_worker, placement.gpus_per_worker
        return WantedWorkers("workers", *sizes, placement.labels.evaluate)

    def wanted_to_heal(self, n_jobs: int = 1) -> WantedWorkers:
        """Returns the workers that the recipe wants for one healing; they may be more than the nodes hold.

        `auto` takes every GPU that a step has a sequence for, or one worker with a node's CPUs. Jobs that run side by
        side share the CPUs, because the start of a job keeps one CPU busy however many it has. They do not share the
        GPUs: each worker of a job with fewer GPUs would have to hold more.
        """
        placement, batch_sequences = self.recipe.placement, self.recipe.healing.batch_sequences
        labels, nodes = placement.labels.heal, labelled(self.nodes, placement.labels.heal)
        n_gpus = self.n_healing_gpus()
        asked = placement.healing_workers
        n_workers = max(1, min(n_gpus, batch_sequences)) if asked == AUTO else int(asked)
        if n_gpus:
            return WantedWorkers("healing_workers", n_workers, 1.0, 1.0, labels)
        # Each worker takes as many CPUs as all workers can have, whichever nodes they run on.
        largest = int(max((node.cpus for node in nodes), default=1))
        n_jobs = min(n_jobs, max(1, MAX_AUTO_CPU_WORKERS_PER_NODE * len(nodes) // n_workers))
        fitting = (c for c in range(largest, 1, -1) if sum(node.cpus // c for node in nodes) >= n_workers * n_jobs)
        return WantedWorkers("healing_workers", n_workers, float(next(fitting, 1)), 0.0, labels)

    def n_healing_gpus(self) -> int:
        """Returns the GPUs that healing may use."""
        if self.recipe.placement.gpus_per_worker == 0:
            return 0
        return int(sum(node.gpus for node in labelled(self.nodes, self.recipe.placement.labels.heal)))


def placed(resolve: Callable[[], WorkerResources]) -> WorkerResources:
    """Returns what `resolve` gives; workers that the cluster can never hold become an error of the input.

    Raises:
        InputError: the cluster can never hold the workers.
    """
    try:
        return resolve()
    except ResourcesError as error:
        raise InputError(f"placement.{error.field}", error.value, error.remedy) from error
