"""Starts Ray's workers in tests from a process that has imported torch and the other libraries already.

Tests put this folder on PYTHONPATH, so every Python process that they start imports this file before anything else. A
process that is to become a worker of Ray, and would import for five seconds of processor time, asks `import_server.py`
to fork itself instead and waits for the forked process, which is a worker in every other way. All other processes start
as usual, and so do workers whose environment or namespaces differ from those that a server knows.
"""

from __future__ import annotations

import sys

_SCRIPTS = ("/ray/_private/workers/default_worker.py", "/ray/_private/workers/setup_worker.py")
"""The scripts that become workers. The second one prepares the environment and replaces itself by the first one."""


def _script_and_arguments() -> list[str]:
    """Returns the script and the arguments of this process if it is to become a worker of Ray, else an empty list."""
    arguments = list(sys.orig_argv[1:])
    while arguments and arguments[0].startswith("-"):
        arguments.pop(0)
    return arguments if arguments and arguments[0].endswith(_SCRIPTS) else []


if _arguments := _script_and_arguments():
    from worker_start import start_from_server

    start_from_server(_arguments)
