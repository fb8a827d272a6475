"""Waits until a cluster has so many nodes or GPUs, and asks its autoscaler for the GPUs first.

Run on the head or as part of a job, before `layerboost run`, which starts on what a cluster has:
`wait_for.py nodes 3` or `wait_for.py gpus 4 --hardware small`. The request is taken back at the end, so that workers
leave when they have been idle for the cluster's own time. Needs Ray alone.
"""

from __future__ import annotations

import argparse
import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

HARDWARE_LABEL = "layerboost/hardware"


def nodes_there() -> int:
    """Living nodes, the head included."""
    return sum(node["Alive"] for node in ray.nodes())


def gpus_there(hardware: str | None) -> int:
    """GPUs of living nodes, of those with a label where one is asked for."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if hardware is not None:
        nodes = [node for node in nodes if node["Labels"].get(HARDWARE_LABEL) == hardware]
    return int(sum(node["Resources"].get("GPU", 0) for node in nodes))


def ask_for_gpus(n: int, hardware: str | None) -> None:
    """Asks the autoscaler, where there is one, to hold nodes for so many GPUs; 0 takes the request back."""
    selectors = [{HARDWARE_LABEL: hardware}] * n if hardware is not None else None
    request_resources(bundles=[{"GPU": 1}] * n, bundle_label_selectors=selectors)


def wait_for(what: str, n: int, hardware: str | None, timeout_s: float) -> bool:
    """Whether they came in time. Says on stderr how many are there whenever that changes."""
    deadline, before = time.monotonic() + timeout_s, None
    while True:
        there = nodes_there() if what == "nodes" else gpus_there(hardware)
        if there != before:
            print(f"{there} of {n} {what} there", file=sys.stderr, flush=True)
            before = there
        if there >= n:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Waits until a cluster has so many nodes or GPUs.")
    parser.add_argument("what", choices=("nodes", "gpus"))
    parser.add_argument("n", type=int)
    parser.add_argument("--hardware", help=f"value of the label {HARDWARE_LABEL} that the GPUs' nodes must have")
    parser.add_argument("--address", default="auto", help="host:port of the head (default: this machine's cluster)")
    parser.add_argument("--timeout-s", type=float, default=1800, help="default: %(default)s")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    ray.init(address=arguments.address, logging_level="ERROR", log_to_driver=False)
    if arguments.what == "gpus":
        ask_for_gpus(arguments.n, arguments.hardware)
    try:
        there = wait_for(arguments.what, arguments.n, arguments.hardware, arguments.timeout_s)
    finally:
        if arguments.what == "gpus":
            ask_for_gpus(0, None)
    if not there:
        print(f"not in {arguments.timeout_s:g} s; ray status on the head says why", file=sys.stderr)
    return 0 if there else 1


if __name__ == "__main__":
    sys.exit(main())
