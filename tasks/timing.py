"""Measures decode speed on the cluster, one measurement at a time, so that no other work disturbs it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from layerboost.checkpoint import ModelSource, save_checkpoint
from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.registry import resolved
from layerboost.speed.decoding import DecodeMeasurement, measure_together
from layerboost.speed.vllm_bench import ServingCondition, ServingMeasurement, local_checkpoint, measure_served
from layerboost.speed.vllm_environment import ServingEnvironment, ServingError
from layerboost.storage.publish import local_folder
from tasks.cluster.connection import addable, resources
from tasks.cluster.resources import (
    WorkerResources,
    exclusive_worker,
    with_node_to_come,
)
from tasks.engines import ENGINES, TRANSFORMERS
from tasks.pool.actors import actor_maker
from tasks.pool.finished import Finished, WorkerInfo, worker_info
from tasks.pool.pool import UnitFailure, run_units
from tasks.pool.watch import UNWATCHED, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ThroughputUnit:
    """Asks to time one model under one serving condition.

    Attributes:
        plan: the plan that is applied to the parent; None measures the untouched parent or the checkpoint.
        checkpoint: the folder of a healed model to measure; it has its own plan, so give none.
        environment: the environment that an engine of another Python runs in; None for the worker's own Python.
        engine: the engine that times it, one of `tasks.engines.ENGINES`.
    """

    concurrency: int
    prompt_tokens: int
    new_tokens: int
    plan: Plan | None = None
    checkpoint: str | None = None
    repeats: int = 3
    seed: int = 0
    environment: ServingEnvironment | None = None
    engine: str = TRANSFORMERS

    def __post_init__(self) -> None:
        if self.plan is not None and self.checkpoint is not None:
            raise ValueError(f"checkpoint: {self.checkpoint} has its own plan; give either a plan or a checkpoint")

    @property
    def condition(self) -> dict[str, Any]:
        """Returns the serving condition as keyword arguments of `measure_together` and `ServingCondition`."""
        names = ("concurrency", "prompt_tokens", "new_tokens", "repeats", "seed")
        return {name: getattr(self, name) for name in names}


Group = tuple[ThroughputUnit, ...]
"""Units that are timed together.

With transformers they are models under one condition, with vLLM the conditions of one server.
"""

Result = TypeVar("Result")

ERROR = "error"
"""The key of the error that replaces the result of a condition under which a server failed."""


class MeasurementWorker:
    """Times groups of models; it keeps only the checkpoints of the current group loaded."""

    def __init__(self, source: ModelSource, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.source = source
        self._loaded: dict[str | None, PreTrainedModel] = {}

    def info(self) -> WorkerInfo:
        return worker_info()

    def run(self, group: Group) -> list[dict[str, Any]]:
        """Returns `DecodeMeasurement.to_dict()` of each unit."""
        return [measured.to_dict() for measured in self.measure(group)]

    def measure(self, group: Group) -> list[DecodeMeasurement]:
        if any(unit.condition != group[0].condition for unit in group):
            raise ValueError("group: models that are timed side by side need one condition")
        wanted = dict.fromkeys(unit.checkpoint for unit in group)
        self._loaded = {path: model for path, model in self._loaded.items() if path in wanted}
        gc.collect()
        for path in wanted:
            if path not in self._loaded:
                self._loaded[path] = self.source.load(path)
        # Conversions share the parent's weights, so a group of plans holds them only once.
        models = [
            self._loaded[unit.checkpoint] if unit.plan is None else convert(self._loaded[None], unit.plan)
            for unit in group
        ]
        return measure_together(models, **group[0].condition)


class ServingWorker:
    """Times groups of conditions; vLLM serves the one model of each group, so this process holds no model."""

    def __init__(self, source: ModelSource):
        self.source = source

    def info(self) -> WorkerInfo:
        return worker_info()

    def run(self, group: Group) -> list[dict[str, Any]]:
        """Returns `ServingMeasurement.to_dict()` of each unit, or its error under the key `ERROR`.

        Raises:
            ServingError: vLLM cannot serve the model.
        """
        unit, found = group[0], []
        assert unit.environment is not None

        def on_result(_: ServingCondition, result: ServingMeasurement | ServingError) -> None:
            found.append({ERROR: str(result)} if isinstance(result, ServingError) else result.to_dict())

        with local_folder(unit.checkpoint) if unit.checkpoint else nullcontext() as folder:
            model: Path | Callable[[Path], None]
            if unit.plan is not None:
                model = self._writer(unit.plan)
            elif folder is not None:
                model = local_checkpoint(folder)
            else:
                model = local_checkpoint(self.source.path, self.source.revision)
            conditions = [ServingCondition(**unit.condition) for unit in group]
            measure_served(unit.environment, model, conditions, dtype=self.source.dtype, on_result=on_result)
        return found

    def _writer(self, plan: Plan) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            parent = replace(self.source, device="cpu").load()  # the GPU belongs to the server
            save_checkpoint(convert(parent, plan), self.source.load_tokenizer(), folder)

        return write


def measure_groups(
    groups: Sequence[Group],
    source: ModelSource,
    *,
    on_result: Callable[[Finished[Group, list[dict[str, Any]]]], None],
    on_failure: Callable[[UnitFailure[Group]], None] | None = None,
    max_attempts: int | None = None,
    watch: Watch[Group] = UNWATCHED,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> list[UnitFailure[Group]]:
    """Times all groups one after the other on one worker, so that all are measured on the same hardware.

    The worker takes every CPU of the largest node, and one whole GPU if there are GPUs, so that Ray runs nothing else
    there. See `run_units` for the callbacks and failures. All groups are of one engine, which says how often a group is
    tried.
    """
    alone = _exclusive_worker_here(labels)
    engine = ENGINES[groups[0][0].engine if groups else TRANSFORMERS]
    arguments = () if engine.serves else (measuring_threads(alone),)
    return run_units(
        groups,
        actor_maker(resolved(engine.worker), alone, source, *arguments),
        n_workers=1,
        on_result=on_result,
        on_failure=on_failure,
        max_attempts=max_attempts or engine.max_attempts,
        watch=watch,
    )


def on_measuring_node(labels: Mapping[str, str], ask: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function on the measuring node of the connected cluster: the largest node with these labels.

    Raises:
        Exception: the error that the function raises there.
    """
    import ray

    worker = _exclusive_worker_here(labels)
    try:
        return ray.get(ray.remote(ask).options(**worker.actor_options()).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def measuring_threads(alone: WorkerResources) -> int:
    """Returns the worker's CPUs less one, which is left to the driver and Ray's own processes.

    If torch took every CPU, its threads would spin while they wait for one that is not running; a decode step of a
    small model then took fifty times as long.
    """
    return max(1, alone.threads - 1)


def _exclusive_worker_here(labels: Mapping[str, str]) -> WorkerResources:
    """Finds the exclusive worker on the connected cluster, which may have to start a node for it."""
    return exclusive_worker(with_node_to_come(resources(), addable(), labels), labels)
