"""Lets work that runs out of memory go on with half as much at a time; this changes its speed but not its result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that the memory of a GPU or of the host ran out."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def in_memory(call: Callable[[], Result], shrink: Callable[[], bool]) -> Result:
    """Returns what a call gives; the call is repeated while memory runs out and `shrink` can reduce its work.

    Args:
        call: the work.
        shrink: halves what the next call does at a time; it returns False if that is the least already.
    """
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error) or not shrink():
                raise
            logger.warning("out of memory, going on with half at a time: %s", str(error).splitlines()[0])
        # This must follow the handler, because the traceback keeps alive what the call had allocated.
        clear_device_cache(garbage_collection=True)


def was_ended_for_memory(error: str) -> bool:
    """Says whether Ray reports that it ended a worker because its node ran out of memory."""
    return any(words in error for words in ("OutOfMemoryError", "OUT_OF_MEMORY", "running low on memory"))
