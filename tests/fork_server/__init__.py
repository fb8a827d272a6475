"""Starts the workers of Ray in tests by forking a process that has imported torch and the other libraries already.

The import takes five seconds of processor time, and the suite starts hundreds of workers.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.fork_server.worker_start import SERVERS, namespaces

_FOLDER = Path(__file__).parent


def fork_workers() -> None:
    """Has all processes that this one starts fork their workers, unless SERVERS is set already."""
    if SERVERS in os.environ or shutil.which("setsid") is None:
        return
    sockets = tempfile.mkdtemp(prefix="fork-")
    atexit.register(shutil.rmtree, sockets, ignore_errors=True)
    os.environ[SERVERS] = f"{sockets}:{os.getpid()}:{namespaces()}"
    os.environ["PYTHONPATH"] = python_path(_FOLDER)


def python_path(*folders: Path) -> str:
    """Returns a PYTHONPATH that has some folders before those of this process, which forking needs."""
    return os.pathsep.join(filter(None, (*map(str, folders), os.environ.get("PYTHONPATH"))))
