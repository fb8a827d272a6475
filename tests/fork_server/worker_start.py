"""Has a server fork the worker that this process was to become; see `sitecustomize.py`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SERVERS = "LAYERBOOST_TEST_IMPORT_SERVERS"
"""Names the variable that holds the folder of the servers, the process that they end with, and its namespaces.

An empty variable switches them off: each worker then starts and imports as it does for users.
"""

_WITHOUT_EFFECT = (
    *("RAY_", "PL_DISABLE_FORK", "PYTEST_CURRENT_TEST", "PYTHONPATH", "PYTHONBREAKPOINT"),
    *("PWD", "OLDPWD", "SHLVL", "SPT_NOENV"),
)
"""Beginnings of variables that no library of a server reads while it is imported. Workers that differ in others need a
server of their own."""


def namespaces() -> str:
    """Returns the network and mount namespaces of this process."""
    return " ".join(os.readlink(f"/proc/self/ns/{name}") for name in ("net", "mnt"))


def start_from_server(arguments: list[str]) -> None:
    """Runs the worker in a process forked by a server and ends with it; returns if there is no server yet."""
    if not (servers := os.environ.get(SERVERS)):
        return
    folder, owner, of_owner = servers.split(":", 2)
    if of_owner != namespaces():
        return
    path = Path(folder, _environment_key(arguments))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"{path}.socket")
    except OSError:
        _start_server(path, owner)
        return
    request = {"arguments": arguments, "environment": dict(os.environ), "path": sys.path, "folder": os.getcwd()}
    text = json.dumps(request).encode()
    answer = b""
    with contextlib.suppress(ConnectionError):  # The server ends with the tests.
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(text)
        answer = connection.recv(16)
    if not answer:
        return
    pid = int(answer)

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.recv(1)  # The worker holds the other end until it ends.
    os._exit(0)


def _environment_key(arguments: list[str]) -> str:
    """Returns a name that workers share if their environments give libraries the same settings."""
    environment = os.environ | new_variables(arguments)
    kept = sorted(item for item in environment.items() if not item[0].startswith(_WITHOUT_EFFECT))
    return hashlib.sha256(json.dumps([sys.executable, kept]).encode()).hexdigest()[:16]


def new_variables(arguments: list[str]) -> dict[str, str]:
    """Returns the variables that `setup_worker.py` will set, from its arguments."""
    option = "--serialized-runtime-env-context="
    contexts = [json.loads(argument.removeprefix(option)) for argument in arguments if argument.startswith(option)]
    return {name: value for context in contexts for name, value in (context.get("env_vars") or {}).items()}


def _start_server(path: Path, owner: str) -> None:
    """Starts a server when an environment is met for the second time; one that is met once is not worth it."""
    for suffix in ("first", "second"):
        try:
            os.close(os.open(f"{path}.{suffix}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if suffix == "second":
            server = [sys.executable, str(Path(__file__).with_name("import_server.py")), str(path), owner]
            with open(f"{path}.log", "w") as log:
                # It must be no child of this process, because a worker of Ray ends its children with itself.
                command = ["setsid", "--fork", *server]
                subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
        return
