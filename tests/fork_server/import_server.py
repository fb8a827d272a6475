"""Imports the libraries that workers need, and forks itself for each worker that asks; see `sitecustomize.py`.

It ends with the process of the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from worker_start import new_variables

_LIBRARIES = (
    *("numpy", "pandas", "pyarrow", "scipy.stats", "torch", "torch.distributed.tensor", "safetensors.torch"),
    *("transformers.modeling_utils", "transformers.generation", "transformers.models.llama.modeling_llama"),
    *("accelerate", "datasets", "deepspeed", "lm_eval.evaluator", "lm_eval.tasks", "peft"),
)
"""Ray itself must not be among them, because it reads what is set for one worker while it is imported."""

_OWNER_POLL_S = 2.0


def serve(path: Path, owner: int) -> dict[str, Any] | None:
    """Forks a process for each request; returns the request in the new process, and None in the server at the end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.starting")
    listener.listen(64)
    listener.settimeout(_OWNER_POLL_S)
    os.rename(f"{path}.starting", f"{path}.socket")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel then removes ended children itself.
    while Path(f"/proc/{owner}").exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        request, files = _receive(connection)
        if request and os.fork() == 0:
            listener.close()
            connection.sendall(str(os.getpid()).encode())
            _become(request, files)
            request["connection"] = connection  # Its end tells the asking process that this one has ended.
            return request
        connection.close()
        for file in files:
            os.close(file)
    return None


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns a request and the files sent with it; the request is empty if the asking process ended meanwhile."""
    connection.settimeout(None)
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    text = b""
    while len(text) < int.from_bytes(head, "big") and (part := connection.recv(1 << 16)):
        text += part
    return (json.loads(text) if head and len(text) == int.from_bytes(head, "big") else {}), list(files)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Gives this process the environment, folder, files and signals of the one that asked."""
    import numpy as np

    os.setsid()  # When a worker ends, Ray ends what is left of its process group.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    np.random.seed()  # noqa: NPY002 - a forked process would go on with the server's state


class _ReplacedError(Exception):
    """Holds the command by which a script wants to be replaced."""


def _run(arguments: list[str], path: list[str]) -> None:
    sys.argv, sys.path[:] = arguments, [str(Path(arguments[0]).parent), *path]
    runpy.run_path(arguments[0], run_name="__main__")


def _run_worker(arguments: list[str], path: list[str]) -> None:
    """Runs a script that becomes a worker; what it replaces itself by runs in this process."""
    execvp = os.execvp

    def give_back(file: str, args: list[str]) -> NoReturn:
        raise _ReplacedError(*args)

    if arguments[0].endswith("/setup_worker.py"):
        # Ray reads its settings when the script imports it, here before the script sets them.
        os.environ.update({name: value for name, value in new_variables(arguments).items() if name.startswith("RAY_")})
        os.execvp = give_back  # type: ignore[assignment]
        try:
            _run(arguments, path)
        except _ReplacedError as replaced:
            command = replaced.args
        os.execvp = execvp
        exec_, *arguments = shlex.split(command[-1])
        if [exec_, arguments.pop(0)] != ["exec", sys.executable]:  # The worker runs in another Python.
            os.execvp(command[0], list(command))
        path = [*filter(None, os.environ.get("PYTHONPATH", "").split(":")), *path]
    _run(arguments, list(dict.fromkeys(path)))


if __name__ == "__main__":
    for name in _LIBRARIES:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "a library imports ray, whose settings would be those of this process"
    if (request := serve(Path(sys.argv[1]), int(sys.argv[2]))) is not None:
        _run_worker(request["arguments"], request["path"])
