"""Starts other programs and gives them a scratch folder; both are removed however this process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

STOP_S = 20.0
"""Time that a program gets to end when asked, before it is killed."""


class Scratch:
    """Owns a folder and the process groups that work in it; all are removed when its block or this process ends."""

    def __init__(self, folder: Path, watchdog: subprocess.Popen):
        self.folder, self._watchdog = folder, watchdog
        self._running: list[subprocess.Popen] = []

    def start(self, command: Sequence[Any], log: Path, variables: Mapping[str, str]) -> subprocess.Popen:
        """Starts a command in a process group of its own, so that Ctrl-C in the terminal does not reach it."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=variables,
                start_new_session=True,
            )
        self._running.append(process)
        self._tell(f"+{process.pid}")
        return process

    def end(self, process: subprocess.Popen, *, ask: bool = True) -> None:
        """Ends a process and its whole group: asks it first (if `ask`), then kills what is left, and waits."""
        if process.poll() is None and ask:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        while members := _group(process.pid):
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.poll()
            psutil.wait_procs(members, timeout=1)
        process.wait()
        self._running.remove(process)
        self._tell(f"-{process.pid}")

    def close(self) -> None:
        try:
            for process in reversed(self._running[:]):
                self.end(process)
        finally:
            # The watchdog ends or deletes what could not be ended or deleted here.
            shutil.rmtree(self.folder, ignore_errors=True)
            self._pipe.close()
            self._watchdog.wait()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._watchdog.stdin is not None
        return self._watchdog.stdin

    def _tell(self, word: str) -> None:
        self._pipe.write(f"{word}\n".encode())
        self._pipe.flush()


_WATCHDOG = """
import contextlib, os, shutil, signal, sys
if os.fork():
    os._exit(0)  # the watchdog must be no child of a Ray worker: Ray kills the children of a worker that dies
running = set()
for word in sys.stdin:
    (running.add if word[0] == "+" else running.discard)(int(word[1:]))
for group in running:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Scratch]:
    """Makes a scratch folder with a watchdog; the pipe to the watchdog closes however this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="layerboost-scratch-"))
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHDOG, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    scratch = Scratch(folder, watchdog)
    try:
        yield scratch
    finally:
        scratch.close()


def _group(leader: int) -> list[psutil.Process]:
    """Returns the living processes of a group, given its leader's id."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
