"""Runs a small recipe on a cluster of three hosts, disturbs each run at a random moment, and checks that it recovers.

    python -m tests.cluster.chaos --runs 20 --out chaos.csv

The hosts are namespaces on this machine (hosts.sh). `ray up` starts the cluster with the shipped clusters/local.yaml,
and the driver is a process of the head. Each run gets one disturbance: a worker is killed, a node's raylet is killed, a
node is cut off from the network for up to a minute, the driver is killed and started again, the storage fails for ten
seconds, or a record is cut in half. The command is repeated until it exits with 0. After a cut record it runs once
more, because only a run that reads the record can notice the damage. Then the tables must equal those of an undisturbed
run, and no more units may have run twice than were in flight.

It needs root on Linux and a C compiler, and takes about two minutes for each run. It exits with 1 if a run did
not recover.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from tests.cluster.hosts import ADDRESSES, Hosts, why_not
from tests.cluster.launched import (
    HEAD,
    LONG_TEXT,
    PYTHON,
    TOKEN,
    Launched,
    copy_project,
    launched,
    write_cluster_yaml,
)
from tests.conftest import repeatable_recipe, write_inputs
from tests.results import assert_equal_results

KINDS = ("worker killed", "node killed", "node cut off", "driver killed", "storage fails", "record truncated")
MAX_CALLS = 4
STORAGE_FAILS_S = 10.0
_NO_WORKERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of processes that do no work for a run, or that a node cannot live without; they are not killed."""
_MARK = "/shared/storage-fails"

RECIPE = repeatable_recipe(
    quality={"text": LONG_TEXT, "sequences": 1200, "batch_size": 4},
    sensitivity={"treatments": ["none", "window"], "shares": 12, "compare": False},
    healing={"tokens": 2048, "curve": [], "checkpoint_every_steps": 4},
)


@dataclass(frozen=True)
class Outcome:
    """Records the outcome of a run.

    Attributes:
        calls: the number of calls of the command.
        units: the number of units that were started.
        again: the number of starts of a unit that had been started before.
        in_flight: the number of units in flight when the run was disturbed.
        trouble: what is wrong with the run; empty for nothing.
    """

    seed: int
    disturbance: str
    moment_s: float
    run_s: float
    calls: int
    units: int
    again: int
    in_flight: int
    trouble: str


class Run:
    """Is one run of the recipe; its driver is a process of the head."""

    def __init__(self, cluster: Launched, name: str):
        self.hosts, self.cluster, self.name = cluster.hosts, cluster, name
        self.out = cluster.hosts.shared / "out" / name
        self.n_calls = 0
        self.start_s = time.monotonic()

    @property
    def log(self) -> Path:
        """Returns the file with the output of the last call."""
        return self.hosts.folder / f"{self.name}-{self.n_calls}.log"

    def call(self) -> subprocess.Popen:
        """Starts the command."""
        self.n_calls += 1
        run = f"{PYTHON} -m orchestrator run inputs/recipe.yaml --out /shared/out/{self.name} --address {HEAD}"
        preload = storage_environment() if self.name != "undisturbed" else {}
        return self.hosts.start(
            "h0", "sh", "-c", f"cd /shared/project && exec {run}", env={**TOKEN, **preload}, log=self.log
        )

    def finish(self, driver: subprocess.Popen) -> None:
        """Waits for the command and repeats it until it exits with 0."""
        while driver.wait(timeout=900) != 0:
            if self.n_calls == MAX_CALLS:
                raise AssertionError(f"exit {driver.returncode} of call {self.n_calls}: {self.log.read_text()[-3000:]}")
            driver = self.call()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_s

    def started(self) -> Counter[str]:
        """Counts how often each unit was started, by stage and name."""
        try:
            lines = (self.out / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return Counter()
        events = [json.loads(line) for line in lines]
        return Counter(f"{e['stage']} {json.dumps(e['name'])}" for e in events if e["what"] == "started")

    def in_flight(self) -> int:
        try:
            return len(json.loads((self.out / "progress.json").read_text())["in_flight"])
        except FileNotFoundError:
            return 0

    def kill_driver(self) -> None:
        self.hosts.run("h0", "pkill", "-KILL", "-f", f"orchestrator run .*{self.name}", expect=None)


def storage_environment() -> dict[str, str]:
    """Returns the variables that make a process's storage fail while the mark file exists (storage_fails.c)."""
    return {"STORAGE": "/shared/out", "STORAGE_FAILS": _MARK, "LD_PRELOAD": "/shared/storage_fails.so"}


def disturb(run: Run, kind: str, draw: random.Random) -> str:
    """Disturbs a run now and returns what was done.

    A temporary disturbance, such as a network cut or failing storage, is over on return.
    """
    hosts, node = run.hosts, draw.choice(["h1", "h2"])
    if kind == "worker killed":
        for host in draw.sample(["h0", "h1", "h2"], 3):
            listed = hosts.run(host, "pgrep", "-af", "^ray::", expect=None).splitlines()
            busy = [line for line in listed if not any(name in line for name in _NO_WORKERS)]
            if busy:
                pid, _, title = draw.choice(busy).partition(" ")
                hosts.run(host, "kill", "-KILL", pid, expect=None)
                return f"{title.split()[0]} on {host}"
        return "none was at work"
    if kind == "node killed":
        hosts.run(node, "sh", "-c", "kill -KILL $(pidof raylet)")
        return node
    if kind == "node cut off":
        seconds = draw.choice([5.0, 20.0, 60.0])
        hosts.call("cut", node)
        time.sleep(seconds)
        hosts.call("join", node)
        return f"{node} for {seconds:g} s"
    if kind == "driver killed":
        run.kill_driver()
        return "SIGKILL"
    if kind == "storage fails":
        mark = hosts.shared / Path(_MARK).name
        mark.touch()
        time.sleep(STORAGE_FAILS_S)
        mark.unlink()
        return f"EIO for {STORAGE_FAILS_S:g} s"
    records = sorted(run.out.glob("records/*/*.json"))
    if not records:
        return "there was none"
    record = draw.choice(records)
    record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    return str(record.relative_to(run.out))


def chaotic_run(cluster: Launched, seed: int, undisturbed: Run, undisturbed_s: float) -> Outcome:
    """Runs the recipe once, disturbed as the seed says, and returns the outcome."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    moment_s = draw.uniform(0.05, 0.95) * undisturbed_s
    cluster.wait_for_nodes()
    run = Run(cluster, f"seed-{seed}")
    what, in_flight, trouble = "not reached", 0, ""
    driver = run.call()
    try:
        try:
            driver.wait(timeout=moment_s)
        except subprocess.TimeoutExpired:
            in_flight = run.in_flight()
            what = disturb(run, kind, draw)
        run.finish(driver)
        if kind == "record truncated":
            run.finish(run.call())
        assert_equal_results(run.out, undisturbed.out)
        started = run.started()
        again = started.total() - len(started)
        usual = undisturbed.started()
        allowed = len(ADDRESSES) + (kind == "record truncated") + usual.total() - len(usual)
        if again > allowed:
            trouble = f"{again} units ran again: {[name for name, n in started.items() if n > 1]}"
    except Exception:
        trouble = traceback.format_exc()
        run.kill_driver()
    started = run.started()
    again = started.total() - len(started)
    return Outcome(
        seed, f"{kind}: {what}", moment_s, run.seconds, run.n_calls, started.total(), again, in_flight, trouble
    )


def outcomes(seeds: Sequence[int], folder: Path) -> Iterator[Outcome]:
    """Launches the cluster, does the undisturbed run, then the disturbed run of each seed; yields the outcomes."""
    hosts = Hosts(folder, f"c{os.getpid() % 100000}")
    hosts.call("up", str(len(ADDRESSES)))
    try:
        library = hosts.shared / "storage_fails.so"
        source = Path(__file__).with_name("storage_fails.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        copy_project(hosts, write_inputs(folder / "inputs"), RECIPE, long_text=40)
        with launched(hosts, write_cluster_yaml(hosts, storage_environment())) as cluster:
            undisturbed = Run(cluster, "undisturbed")
            undisturbed.finish(undisturbed.call())
            undisturbed_s = undisturbed.seconds
            print(f"undisturbed: {undisturbed_s:.0f} s, {undisturbed.started().total()} units", flush=True)
            for seed in seeds:
                yield chaotic_run(cluster, seed, undisturbed, undisturbed_s)
    finally:
        hosts.call("down")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="scratch folder, kept (default: a temporary one, removed)")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        parser.error(reason)
    rows: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for outcome in outcomes(range(args.first_seed, args.first_seed + args.runs), folder):
            rows.append(outcome)
            print(
                f"seed {outcome.seed}: {'ends right' if not outcome.trouble else 'WRONG'}; {outcome.disturbance} after "
                f"{outcome.moment_s:.0f} s; {outcome.run_s:.0f} s, {outcome.calls} calls, {outcome.again} units again"
                f"\n{outcome.trouble}".rstrip(),
                flush=True,
            )
            if args.out:
                pd.DataFrame(map(asdict, rows)).to_csv(args.out, index=False, float_format="%.1f")
    n_right = sum(not row.trouble for row in rows)
    print(f"{n_right} of {len(rows)} runs ended right")
    return n_right != len(rows)


if __name__ == "__main__":
    sys.exit(main())
