"""Measures how a run scales from one to two workers, and simulates hundreds of them.

    python benchmarks/scaling.py stages --recipe RECIPE --work DIR --out stages.csv
    python benchmarks/scaling.py driver --workers 1 8 64 512 --out driver.csv
    python benchmarks/scaling.py simulate --run DIR/one --driver driver.csv --out simulated.csv

`stages` runs a recipe with one worker and with two, one thread each, and compares the seconds of each stage. `driver`
measures what one unit of a sweep costs the driver: the real loop hands out units that sleep, over real Ray calls, and
writes a real record for each treatment; its processor time counts, whatever the workers do. `simulate` plays the sweep
of larger models. The spread of the shares' times is read from a run, and the driver is modelled as one server with the
costs that `driver` measured: it gives the finished workers their next units, then writes the records of all results in
parallel. The table has makespan, efficiency, idle share, how busy the driver is, and what is stored.

A share of a real model takes as long as its layers: `--layer-us` is the time of one layer for one token of one plan,
by default what the run took; 0.5 is close to that of a model of 4 B parameters on a current data-centre GPU.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_csv import write_rows

from layerboost.evaluation.shares import auto_shares, shares
from layerboost.speed.hardware import hardware_name
from orchestrator.run.folder import SIDE_BY_SIDE
from tasks.pool.finished import Finished, WorkerInfo

ANSWERS = ("log_p", "greedy")
REQUESTS_PER_ITEM = 4  # the choices of a multiple-choice item

OPERATIONS_OF_A_RECORD = 3
"""Storage operations per record: a check whether it exists, a write, and a read when scores are computed."""


@dataclass(frozen=True)
class SweepShape:
    """Describes a sweep: layers x treatments over the items of some tasks, with a number of tokens per item."""

    name: str
    n_layers: int
    n_treatments: int
    n_tasks: int
    n_items: int
    item_tokens: int

    @property
    def n_plans(self) -> int:
        return 1 + self.n_layers * self.n_treatments

    @property
    def layer_calls(self) -> int:
        """Layers that a token of all plans passes; a plan shares the base's path up to the layer that it treats."""
        return self.n_layers + self.n_treatments * self.n_layers * (self.n_layers + 1) // 2

    def shares_tokens(self) -> list[int]:
        """Returns the tokens of each share, cut as in the stage, with item lengths that scatter as in benchmarks."""
        draw = random.Random(self.name)
        costs = [
            max(8, round(draw.lognormvariate(0, 0.5) * self.item_tokens)) for _ in range(self.n_tasks * self.n_items)
        ]
        return [sum(costs[share.start : share.stop]) for share in shares(costs, auto_shares(costs))]


SHAPES = (
    SweepShape("36 layers x 1 treatment x 12 tasks", 36, 1, 12, 500, 100),
    SweepShape("80 layers x 3 treatments x 12 tasks", 80, 3, 12, 500, 100),
)


# Measurement of one worker against two


def stages(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each stage: its seconds with one worker and with two."""
    seconds: dict[str, dict[int, float]] = {}
    for n in (1, 2):
        folder = args.work / ("one" if n == 1 else "two")
        placement = [f"placement.{name}={n}" for name in ("workers", "healing_workers")]
        overrides = [*placement, "placement.cpus_per_worker=1", *args.set]
        command = [sys.executable, "-m", "orchestrator", "run", str(args.recipe), "--out", str(folder)]
        command += [part for value in overrides for part in ("--set", value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with (folder / "estimates.csv").open() as file:
            for row in csv.DictReader(file):
                if row["actual_s"]:
                    seconds.setdefault(row["stage"], {})[n] = float(row["actual_s"])
    for stage, taken in seconds.items():
        if len(taken) == 2:
            yield {
                "stage": stage,
                "one_worker_s": taken[1],
                "two_workers_s": taken[2],
                "speedup": taken[1] / taken[2],
                "hardware": hardware_name("cpu"),
            }


# Measurement of the driver


class Sleeper:
    """Looks like a worker to the driver: its units take a while and give answers."""

    def __init__(self, n_plans: int, n_requests: int):
        self._answers = {name: [[0.123456789] * n_requests for _ in range(n_plans)] for name in ANSWERS}

    def info(self) -> WorkerInfo:
        return WorkerInfo("here", "node", 0)

    def run(self, unit: tuple[int, float]) -> dict[str, Any]:
        time.sleep(unit[1])
        return self._answers


def driver(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields what a unit costs the driver, for each number of concurrent workers."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    for shape in SHAPES:
        for n in args.workers:
            yield {"shape": shape.name, "workers": n, **driver_costs(shape, n), "hardware": hardware_name("cpu")}
    ray.shutdown()


def driver_costs(shape: SweepShape, n_workers: int) -> dict[str, float]:
    """Returns the driver's processor time for the units of a sweep, with one record per unit and treatment."""
    import ray

    from orchestrator.run.folder import RunFolder
    from tasks.pool.pool import run_units

    n_requests = round(shape.n_tasks * shape.n_items / len(shape.shares_tokens()) * REQUESTS_PER_ITEM)
    n_units, record_s = max(64, 2 * n_workers), 0.0
    sleeper = ray.remote(Sleeper).options(max_concurrency=n_workers, num_cpus=0).remote(shape.n_plans, n_requests)
    with tempfile.TemporaryDirectory() as work:
        folder = RunFolder(work)

        records = []

        def on_result(done: Finished[tuple[int, float], dict[str, list[object]]]) -> None:
            for first, last in itertools.pairwise((0, *range(1, shape.n_plans + 1, shape.n_layers))):
                said = {name: values[first:last] for name, values in done.result.items()}
                records.append(({"unit": "sweep", "share": done.unit[0], "plans": [first, last]}, said))

        def write() -> None:
            nonlocal record_s
            start = time.process_time()
            folder.write_records("sweep", records)
            records.clear()
            record_s += time.process_time() - start

        units = [(i, 0.5) for i in range(n_units)]
        start = time.process_time()
        run_units(units, lambda: sleeper, n_workers=n_workers, on_result=on_result, on_results_end=write)
        busy_s = time.process_time() - start
        n_bytes = sum(file.stat().st_size for file in Path(work).rglob("*.json"))
    return {
        "units": n_units,
        "driver_ms_per_unit": 1e3 * busy_s / n_units,
        "of_it_records_ms": 1e3 * record_s / n_units,
        "record_kib_per_unit": n_bytes / n_units / 1024,
    }


# Simulation


@dataclass(frozen=True)
class MeasuredSweep:
    """Holds what a run says of its sweep over tasks: the spread of its shares, and the seconds of a layer per token."""

    relative_times: list[float]
    layer_call_s: float


def measured_sweep(run: Path) -> MeasuredSweep:
    """Reads the records of a run with one worker."""
    records = [json.loads(file.read_text()) for file in sorted((run / "records" / "sweep").glob("*.json"))]
    seconds: dict[tuple[str, int], float] = {}
    n_layers, treatments = 0, set()
    for record in records:
        result, identity = record["result"], record["identity"]
        if "log_p" in result:
            key = identity["quality"], identity["share"][0]
            seconds[key] = seconds.get(key, 0.0) + result["duration_s"]
            n_layers = max(n_layers, len(result["log_p"]))
            treatments.add(len(result["log_p"]) > 1 and json.dumps(identity["plans"]))
    if len(seconds) < 4:
        raise SystemExit(f"--run: {run} holds {len(seconds)} shares of tasks; give a run with a sweep of tasks")
    qualities = {quality for quality, _ in seconds}
    counts = [r["result"]["costs"] for r in records if "costs" in r["result"] and r["identity"]["quality"] in qualities]
    swept = SweepShape("", n_layers, len(treatments - {False}), 0, 0, 0)
    mean = statistics.mean(seconds.values())
    tokens = sum(sum(costs) for costs in counts)
    return MeasuredSweep([s / mean for s in seconds.values()], sum(seconds.values()) / tokens / swept.layer_calls)


def simulate(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each shape, time of a layer and number of workers."""
    measured = measured_sweep(args.run)
    with args.driver.open() as file:
        cost = {(row["shape"], int(row["workers"])): row for row in csv.DictReader(file)}
    for shape in SHAPES:
        tokens = shape.shares_tokens()
        draw = random.Random(0)
        for layer_us, put_ms in itertools.product([1e6 * measured.layer_call_s, *args.layer_us], args.put_ms):
            durations = [n * shape.layer_calls * layer_us / 1e6 * draw.choice(measured.relative_times) for n in tokens]
            n_records = len(durations) * (shape.n_treatments + 1) + shape.n_plans
            one_s = 0.0
            for n in args.workers:
                row = cost[_nearest(cost, shape, n)]
                record_s, kib = float(row["of_it_records_ms"]) / 1e3, float(row["record_kib_per_unit"])
                seconds, idle, busy = simulate_sweep(
                    durations,
                    n,
                    start_s=args.start_s,
                    hand_out_s=float(row["driver_ms_per_unit"]) / 1e3 - record_s,
                    record_s=record_s,
                    n_records=shape.n_treatments + 1,
                    put_s=put_ms / 1e3,
                )
                one_s = one_s or seconds  # the other rows are compared with the first number of workers
                yield {
                    "shape": shape.name,
                    "layer_us": layer_us,
                    "put_ms": put_ms,
                    "workers": n,
                    "shares": len(durations),
                    "share_s": statistics.mean(durations),
                    "makespan_s": seconds,
                    "efficiency": sum(durations) / n / (seconds - args.start_s),
                    "efficiency_with_start": args.workers[0] * one_s / n / seconds,
                    "idle_share": idle,
                    "driver_busy": busy,
                    "storage_operations": n_records * OPERATIONS_OF_A_RECORD,
                    "storage_mib": len(durations) * kib / 1024,
                    "object_store_mib": n * kib / 1024,
                    "start_s": args.start_s,
                }


def _nearest(cost: dict[tuple[str, int], Any], shape: SweepShape, n_workers: int) -> tuple[str, int]:
    """Returns the next larger measured number of workers, or the largest if there is none."""
    measured = sorted(n for name, n in cost if name == shape.name)
    return shape.name, next((n for n in measured if n >= n_workers), measured[-1])


def simulate_sweep(
    durations_s: Sequence[float],
    n_workers: int,
    *,
    start_s: float,
    hand_out_s: float,
    record_s: float,
    n_records: int,
    put_s: float,
) -> tuple[float, float, float]:
    """Simulates units on workers that ask one driver for the next one.

    Args:
        durations_s: Durations of the units, in the order in which they are handed out.
        n_workers: Number of workers.
        start_s: Time until a worker is ready for its first unit.
        hand_out_s: Time of the driver's processor to collect a result and give its worker the next unit.
        record_s: Time of the driver's processor to write a unit's records.
        n_records: Records of a unit.
        put_s: Time of the storage for a record; as many are written in parallel as the run folder does.

    Returns:
        Makespan in seconds, idle share of the workers, busy share of the driver.
    """
    n_workers = min(n_workers, len(durations_s))
    waiting = list(reversed(durations_s))
    ends_s = [start_s + waiting.pop() for _ in range(n_workers)]  # end times of the units in flight
    heapq.heapify(ends_s)
    now_s = driver_busy_s = 0.0
    while ends_s:
        now_s = begun_s = max(now_s, ends_s[0])
        n_taken = 0
        while ends_s and ends_s[0] <= begun_s:
            heapq.heappop(ends_s)
            n_taken += 1
        for _ in range(n_taken):
            now_s += hand_out_s
            if waiting:
                heapq.heappush(ends_s, now_s + waiting.pop())
        now_s += n_taken * record_s + math.ceil(n_taken * n_records / SIDE_BY_SIDE) * put_s
        driver_busy_s += now_s - begun_s
    return now_s, 1 - sum(durations_s) / (n_workers * now_s), driver_busy_s / now_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stages", "driver", "simulate"])
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "default.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="changes a value of the recipe")
    parser.add_argument("--work", type=Path, help="folder of the two runs")
    parser.add_argument("--run", type=Path, help="run folder of a sweep with one worker")
    parser.add_argument("--driver", type=Path, help="CSV that `driver` wrote")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--layer-us", type=float, nargs="+", default=[0.5, 5.0])
    parser.add_argument("--put-ms", type=float, nargs="+", default=[1.0, 30.0], help="milliseconds to store one record")
    parser.add_argument("--start-s", type=float, default=60.0, help="seconds until a worker has loaded its model")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    rows = []
    for row in {"stages": stages, "driver": driver, "simulate": simulate}[args.what](args):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
