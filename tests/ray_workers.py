"""Finds the workers of one Ray cluster of this machine; parents do not tell, as `tests/fork_server` forks workers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def session_of(pid: int | None = None) -> str:
    """Returns the name of the Ray session of a worker, by default of this one; empty if a process is no worker."""
    try:
        output = Path(os.readlink(f"/proc/{pid or os.getpid()}/fd/1"))
    except OSError:
        return ""
    return output.parents[1].name if output.name.startswith("worker-") else ""


def workers_of(session: str, title: str = "ray::") -> list[psutil.Process]:
    """Returns the workers of a Ray session whose title begins with `title`; a session's name may be left out in part.

    The name ends with the process id of the driver that started the cluster.
    """
    found = []
    for process in psutil.process_iter(["cmdline"]):
        is_worker = (process.info["cmdline"] or [""])[0].startswith(title)
        if is_worker and (name := session_of(process.pid)) and name.endswith(session):
            found.append(process)
    return found
