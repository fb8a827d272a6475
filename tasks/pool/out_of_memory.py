"""Work that runs out of memory goes on with half as much at a time, which changes speed and no result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

SHRUNK = "shrunk"
"""Key under which a worker's result says with how much less at a time it came; its record has it with the worker."""

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator, of a GPU or of the host."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def in_memory(call: Callable[[], Result], shrink: Callable[[], bool]) -> Result:
    """What a call gives, which is made again while memory runs out and there is less to do at a time.

    Args:
        shrink: halves what the next call does at a time; False where it is the least already.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error) or not shrink():
                raise
            logger.warning("out of memory, going on with half at a time: %s", str(error).splitlines()[0])
        # Behind the handler, since the error's traceback holds what the call had allocated.
        clear_device_cache(garbage_collection=True)


def was_ended_for_memory(error: str) -> bool:
    """Whether Ray says that it ended a worker since its node ran out of memory."""
    return any(words in error for words in ("OutOfMemoryError", "OUT_OF_MEMORY", "running low on memory"))
