"""Waits until a cluster has a given number of nodes or GPUs, and first asks its autoscaler for the GPUs.

Run it on the head or as part of a job before `layerboost run`, because a run uses only what the cluster has when it
starts: `wait_for.py nodes 3` or `wait_for.py gpus 4 --hardware small`. The request is withdrawn at the end, so that
workers leave after the cluster's own idle time. It needs only Ray.
"""

from __future__ import annotations

import argparse
import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

HARDWARE_LABEL = "layerboost/hardware"


def nodes_there() -> int:
    """Returns the number of living nodes, including the head."""
    return sum(node["Alive"] for node in ray.nodes())


def gpus_there(hardware: str | None) -> int:
    """Returns the number of GPUs of living nodes, or of those with the label `hardware` if it is given."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if hardware is not None:
        nodes = [node for node in nodes if node["Labels"].get(HARDWARE_LABEL) == hardware]
    return int(sum(node["Resources"].get("GPU", 0) for node in nodes))


def ask_for_gpus(n: int, hardware: str | None) -> None:
    """Asks the autoscaler, if there is one, to provide nodes for `n` GPUs; 0 withdraws the request."""
    selectors = [{HARDWARE_LABEL: hardware}] * n if hardware is not None else None
    request_resources(bundles=[{"GPU": 1}] * n, bundle_label_selectors=selectors)


def wait_for(what: str, n: int, hardware: str | None, timeout_s: float) -> bool:
    """Returns whether they came in time, and prints to stderr how many there are whenever that changes."""
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
    parser = argparse.ArgumentParser(description="Waits until a cluster has a given number of nodes or GPUs.")
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
