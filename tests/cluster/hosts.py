"""Gives tests access to the simulated hosts on this machine that hosts.sh sets up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS_SH = Path(__file__).with_name("hosts.sh")
ADDRESSES = ["10.77.0.10", "10.77.0.11", "10.77.0.12"]


def why_not() -> str | None:
    """Returns what this machine lacks for simulated hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [
        name for name in ("ip", "sshd", "ssh", "rsync", "unshare", "nsenter") if not shutil.which(name, path=path)
    ]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install openssh-server openssh-client rsync iproute2"
    probe = subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if probe.returncode == 0 else f"needs namespaces: {probe.stderr.strip()}"


@dataclass
class Hosts:
    """Represents the hosts `drv`, h0, h1 and h2, which all see `shared` as /shared."""

    folder: Path
    prefix: str

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def command(self, *arguments: str) -> list[str]:
        return [str(HOSTS_SH), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOSTS_DIR": str(self.folder),
            "HOSTS_PREFIX": self.prefix,
            "VENV": sys.prefix,
            "OWNER": str(os.getpid()),
        }

    def call(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), env=self.environment, check=True)

    def on(self, host: str, *command: str, env: dict[str, str] | None = None) -> list[str]:
        """Returns the command line that runs a command on a host."""
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        return self.command("x", host, "env", *settings, *command)

    def run(self, host: str, *command: str, env: dict[str, str] | None = None, expect: int | None = 0) -> str:
        """Runs a command on a host and returns its stdout; the test fails unless it exits with `expect` (None: any)."""
        result = subprocess.run(
            self.on(host, *command, env=env), env=self.environment, capture_output=True, text=True, check=False
        )
        if expect is not None:
            assert result.returncode == expect, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
        return result.stdout

    def start(self, host: str, *command: str, env: dict[str, str], log: Path) -> subprocess.Popen:
        with open(log, "w") as file:
            return subprocess.Popen(self.on(host, *command, env=env), env=self.environment, stdout=file, stderr=file)

    def leftovers(self) -> list[str]:
        """Lists the namespaces, interfaces, mounts and processes of the hosts."""
        found = [
            line
            for command in (["ip", "netns", "list"], ["ip", "-o", "link"])
            for line in subprocess.run(
                command, env=self.environment, capture_output=True, text=True
            ).stdout.splitlines()
            if f"{self.prefix}-" in line
        ]
        found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.folder) in line]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                mounts, words = (process / "mounts").read_text(), (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(self.folder) in mounts or (str(self.folder).encode() in words and process.name != str(os.getpid())):
                found.append(f"process {process.name} {words!r}")
        return found


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float) -> float:
    """Waits for a condition and returns the seconds it took; after `timeout_s` it fails the test and reports `what`."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            pytest.fail(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.5)
    return time.monotonic() - start
