"""The micro batch of a healing job whose workers ran out of memory, in the cluster's own store.

Its processes are started again after a failure, and learn there how many sequences they may run at once.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tasks.healing.job import HealingJob

logger = logging.getLogger(__name__)


def with_noted_micro_batch(job: HealingJob) -> HealingJob:
    """The job as an attempt before that ran out of memory left it; as it is where none did."""
    noted = noted_micro_batch(job)
    return job if noted is None else replace(job, spec=replace(job.spec, micro_batch_sequences=noted))


def note_smaller_micro_batch(job: HealingJob, n_workers: int) -> bool:
    """Halves the micro batch of attempts to come; False where it is one sequence.

    Args:
        job: as it ran out of memory, so that all workers of an attempt note the same.
        n_workers: that shared its batches.
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
    """Sequences that a worker runs at once since memory ran out; None where it did not."""
    from ray.experimental.internal_kv import _internal_kv_get

    noted = _internal_kv_get(_key(job))
    return None if noted is None else int(noted)


def forget_micro_batch(job: HealingJob) -> None:
    """Called when a job is done."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(job))


def _key(job: HealingJob) -> bytes:
    return f"layerboost:micro_batch:{job.storage_path}:{job.name}".encode()
