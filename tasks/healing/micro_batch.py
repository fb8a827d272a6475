"""Keeps the micro batch of a healing job whose workers ran out of memory in Ray's key-value store.

The processes of the job are started again after a failure, and read there how many sequences they may run at once.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tasks.healing.job import HealingJob

logger = logging.getLogger(__name__)


def with_noted_micro_batch(job: HealingJob) -> HealingJob:
    """Returns the job with the micro batch that an earlier attempt noted; without a note it is unchanged."""
    noted = noted_micro_batch(job)
    return job if noted is None else replace(job, spec=replace(job.spec, micro_batch_sequences=noted))


def note_smaller_micro_batch(job: HealingJob, n_workers: int) -> bool:
    """Halves the micro batch of later attempts; returns False if it is one sequence already.

    Args:
        job: the job as it ran out of memory, so that all workers of an attempt note the same value.
        n_workers: the number of workers that shared its batches.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    of_worker = -(-job.spec.batch_sequences // n_workers)
    used = min(job.spec.micro_batch_sequences or of_worker, of_worker)
    if used <= 1:
        return False
    _internal_kv_put(_key(job), str(used // 2).encode())
    logger.warning("out of memory with %d sequences at once, going on with %d", used, used // 2)
    return True


def noted_micro_batch(job: HealingJob) -> int | None:
    """Returns the sequences that a worker runs at once since memory ran out; None if it did not run out."""
    from ray.experimental.internal_kv import _internal_kv_get

    noted = _internal_kv_get(_key(job))
    return None if noted is None else int(noted)


def forget_micro_batch(job: HealingJob) -> None:
    """Deletes the note; it is called when a job is done."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(job))


def _key(job: HealingJob) -> bytes:
    return f"layerboost:micro_batch:{job.checkpoints.storage_path}:{job.name}".encode()
