"""What goes wrong with storage: what passes by and is tried again, and a full disk, which stops the run."""

from __future__ import annotations

import errno
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits between tries, half a minute in all."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FOR_GOOD = {
    *_FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOTEMPTY, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EXDEV, errno.EMFILE),
}
_FOR_GOOD_KINDS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_NETWORK_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "requests", "urllib3"}
_FULL_TEXT = re.compile(r"no space left on device|disk quota exceeded|os error (28|122)\b|\[errno (28|122)\]", re.I)
_OS_ERROR_TEXT = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust, safetensors among them, hand over an errno."""


class DiskFullError(OSError):
    """There is no room for what has to be written; nothing is half written, and with more room the run goes on."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it in this process or in a worker, is that of a full disk.

    Libraries wrap it: safetensors gives its text alone, Ray the text of the worker's traceback.
    """
    return any(
        isinstance(cause, DiskFullError) or getattr(cause, "errno", None) in _FULL or _FULL_TEXT.search(str(cause))
        for cause in _causes(error)
    )


def is_passing(error: BaseException) -> bool:
    """Whether to try again may help: what networks and file servers do, not what a disk says for good."""
    if is_disk_full(error) or isinstance(error, _FOR_GOOD_KINDS):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FOR_GOOD
    if said := _OS_ERROR_TEXT.search(str(error)):
        return int(said[1]) not in _FOR_GOOD
    return type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES


def retried(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a function that may be called again after it failed wait and do so, where the storage's error may pass.

    The first Ctrl-C lets it go on, as everything that is in flight; the second ends it.
    """

    @functools.wraps(call)
    def with_retries(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for delay_s in RETRY_DELAYS_S:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if not is_passing(error):
                    raise
                logger.warning("storage: %s: %s; trying again in %g s", type(error).__name__, error, delay_s)
            time.sleep(delay_s)
        return call(*args, **kwargs)

    return with_retries


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "cause", None)]
