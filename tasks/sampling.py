"""Samples a teacher's own text on a cluster: workers hold the teacher and sample a few documents at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layerboost.checkpoint import ModelSource
from layerboost.text.sampling import SamplingSpec, sample_documents
from tasks.cluster.resources import WorkerResources
from tasks.pool.actors import actor_maker
from tasks.pool.finished import Finished, WorkerInfo, worker_info
from tasks.pool.out_of_memory import in_memory
from tasks.pool.pool import UnitFailure, run_units
from tasks.pool.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class SampleUnit:
    """Asks for `n_documents` documents of a set, starting at number `first`."""

    first: int
    n_documents: int


class SamplingWorker:
    """Holds the teacher and samples from it. It is a plain class that Ray only wraps.

    Args:
        source: the source of the teacher.
        spec: the settings of the sampling.
        threads: CPU threads for torch; None leaves them.
    """

    def __init__(self, source: ModelSource, spec: SamplingSpec, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec, self._batch_size = spec, spec.batch_size
        self.model, self.tokenizer = source.load(), source.load_tokenizer()

    def info(self) -> WorkerInfo:
        return worker_info()

    def shrink(self) -> bool:
        """Halves the number of documents sampled together; returns False if it is one already."""
        self._batch_size, before = max(1, self._batch_size // 2), self._batch_size
        return before > 1

    def run(self, unit: SampleUnit) -> list[list[int]]:
        """Returns the token ids of each document of a unit; fewer are sampled together if memory runs out."""
        return in_memory(lambda: self._sample(unit), self.shrink)

    def _sample(self, unit: SampleUnit) -> list[list[int]]:
        return sample_documents(
            self.model,
            self.tokenizer,
            unit.n_documents,
            self.spec.max_tokens,
            seed=self.spec.seed,
            first=unit.first,
            temperature=self.spec.temperature,
            batch_size=self._batch_size,
        )


def sample_units(
    units: Sequence[SampleUnit],
    source: ModelSource,
    spec: SamplingSpec,
    resources: WorkerResources,
    *,
    on_result: Callable[[Finished[SampleUnit, list[list[int]]]], None],
    on_failure: Callable[[UnitFailure[SampleUnit]], None] | None = None,
    max_attempts: int = 3,
    watch: Watch[SampleUnit] = UNWATCHED,
) -> list[UnitFailure[SampleUnit]]:
    """Samples all units on the cluster, one teacher for each worker; see `run_units` for callbacks and failures."""
    return run_units(
        units,
        actor_maker(SamplingWorker, resources, source, spec, resources.threads),
        n_workers=resources.n_workers,
        on_result=on_result,
        on_failure=on_failure,
        max_attempts=max_attempts,
        watch=watch,
    )
