"""Decode speed on the cluster: one measurement at a time, with nothing of ours beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerboost.convert import convert
from layerboost.decoding import DecodeMeasurement, measure_decode
from layerboost.plan import Plan

from .ablation import ModelSource, actor_maker
from .cluster import NodeResources, WorkerResources, resources
from .units import UnitFailure, run_units, worker_info


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


class MeasurementWorker:
    """Measures one model after the other and holds one at a time: weights that a plan removed must really be gone."""

    def __init__(self, source: ModelSource, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.source = source
        self._key: tuple | None = None
        self._model: torch.nn.Module | None = None

    def info(self) -> dict:
        return worker_info()

    def run(self, unit: ThroughputUnit) -> dict:
        """`DecodeMeasurement.to_dict()` of one unit."""
        return self.measure(unit).to_dict()

    def measure(self, unit: ThroughputUnit) -> DecodeMeasurement:
        return measure_decode(
            self._load(unit),
            concurrency=unit.concurrency,
            prompt_tokens=unit.prompt_tokens,
            new_tokens=unit.new_tokens,
            repeats=unit.repeats,
            seed=unit.seed,
        )

    def _load(self, unit: ThroughputUnit) -> torch.nn.Module:
        key = (unit.plan, unit.checkpoint)
        if self._model is None or key != self._key:
            self._model = None
            gc.collect()
            model = self.source.load(unit.checkpoint)
            self._key, self._model = key, model if unit.plan is None else convert(model, unit.plan)
        return self._model


def measure_units(
    units: Sequence[ThroughputUnit],
    source: ModelSource,
    *,
    on_result: Callable[[ThroughputUnit, dict, float, dict], None],
    on_failure: Callable[[UnitFailure], None] | None = None,
    max_attempts: int = 3,
) -> list[UnitFailure]:
    """Measures all units one after the other on one worker, so that all stand on the same hardware.

    The worker takes every CPU of the largest node, and one whole GPU where there are GPUs: nothing that asks Ray for
    room runs beside it. See `run_units` for the callbacks and failures.
    """
    alone = exclusive_worker(resources())
    return run_units(
        units,
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
