"""Tells passing storage errors, which are retried, from lasting ones such as a full disk, which stops the run."""

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
"""Waits between tries; they add up to half a minute."""

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
"""Form in which libraries written in Rust, such as safetensors, pass on an errno."""


class DiskFullError(OSError):
    """There is no space for what has to be written. No file is half written; with more space the run can continue."""


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it in this process or in a worker, is due to a full disk.

    The text is searched, too, since libraries wrap the error: safetensors passes on only its text, and Ray the text of
    the worker's traceback.
    """
    return any(
        isinstance(cause, DiskFullError) or getattr(cause, "errno", None) in _FULL or _FULL_TEXT.search(str(cause))
        for cause in _causes(error)
    )


def is_passing(error: BaseException) -> bool:
    """Returns whether a retry may help: true for network and file server failures, false for lasting disk errors."""
    if is_disk_full(error) or isinstance(error, _FOR_GOOD_KINDS):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FOR_GOOD
    if said := _OS_ERROR_TEXT.search(str(error)):
        return int(said[1]) not in _FOR_GOOD
    return type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES


def retried(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a function wait and try again if a storage error may pass; the function must be safe to call again.

    The first Ctrl-C does not interrupt the retries, as with all work in flight; the second one does.
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
    """Yields an error and those that led to it, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "cause", None)]
