"""Decode speed on the cluster: one measurement at a time, with nothing of ours beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerboost.convert import convert
from layerboost.decoding import DecodeMeasurement, measure_together
from layerboost.plan import Plan

from .ablation import ModelSource, actor_maker
from .cluster import NodeResources, WorkerResources, resources
from .units import UnitFailure, run_units, worker_info

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ThroughputUnit:
    """One model under one serving condition.

    Attributes:
        plan: how the parent is converted; None measures the untouched parent, or the checkpoint.
        checkpoint: folder of a healed model to measure; no plan then, it has its own.
    """

    concurrency: int
    prompt_tokens: int
    new_tokens: int
    plan: Plan | None = None
    checkpoint: str | None = None
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plan is not None and self.checkpoint is not None:
            raise ValueError(f"checkpoint: {self.checkpoint} has its own plan; give either a plan or a checkpoint")

    @property
    def condition(self) -> dict[str, Any]:
        """How `measure_together` is asked for it."""
        names = ("concurrency", "prompt_tokens", "new_tokens", "repeats", "seed")
        return {name: getattr(self, name) for name in names}


Group = tuple[ThroughputUnit, ...]
"""Models that are timed side by side under one condition."""


class MeasurementWorker:
    """Times groups of models; holds the checkpoints that the group at hand is made of, and no others."""

    def __init__(self, source: ModelSource, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.source = source
        self._loaded: dict[str | None, PreTrainedModel] = {}

    def info(self) -> dict:
        return worker_info()

    def run(self, group: Group) -> list[dict]:
        """`DecodeMeasurement.to_dict()` of each unit."""
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
        # Conversions share the parent's weights, so that a group of plans holds them once.
        models = [
            self._loaded[unit.checkpoint] if unit.plan is None else convert(self._loaded[None], unit.plan)
            for unit in group
        ]
        return measure_together(models, **group[0].condition)


def measure_groups(
    groups: Sequence[Group],
    source: ModelSource,
    *,
    on_result: Callable[[Group, list[dict], float, dict], None],
    on_failure: Callable[[UnitFailure], None] | None = None,
    max_attempts: int = 3,
) -> list[UnitFailure]:
    """Times all groups one after the other on one worker, so that all stand on the same hardware.

    The worker takes every CPU of the largest node, and one whole GPU where there are GPUs: nothing that asks Ray for
    room runs beside it. See `run_units` for the callbacks and failures.
    """
    alone = exclusive_worker(resources())
    return run_units(
        groups,
        actor_maker(MeasurementWorker, alone, source, measuring_threads(alone)),
        n_workers=1,
        on_result=on_result,
        on_failure=on_failure,
        max_attempts=max_attempts,
    )


def measuring_threads(alone: WorkerResources) -> int:
    """All of the worker's CPUs but one, which the driver and Ray's own processes run on.

    With every CPU taken, torch's threads spin while they wait for one that is not running, and a decode step of a
    small model was seen to take fifty times as long.
    """
    return max(1, alone.threads - 1)


def exclusive_worker(nodes: Sequence[NodeResources]) -> WorkerResources:
    """A worker that has the largest node (most GPUs, then most CPUs) for itself, and one of its GPUs."""
    node = max(nodes, key=lambda node: (node.gpus, node.cpus))
    return WorkerResources(1, node.cpus, min(1.0, node.gpus))
