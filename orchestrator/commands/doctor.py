"""`layerboost doctor`: lists what this machine or a cluster lacks, with the remedy."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checks.findings import MISSING, OK, WARN, Finding, findings_table
from orchestrator.exit_codes import EXIT_DONE, EXIT_FAILED
from orchestrator.recipe.errors import InputError

PYTHON_MINIMUM, PYTHON_BELOW = (3, 11), (3, 14)
SHM_MINIMUM_GIB = 2.0
FREE_DISK_MINIMUM_GIB = 10.0
_GIB = 1024**3


def doctor(arguments: argparse.Namespace) -> int:
    """Prints the table and returns EXIT_FAILED if something that every recipe needs is missing."""
    findings = [*check_machine(), *check_ray(arguments.address)]
    sys.stdout.write(findings_table(findings))
    return EXIT_FAILED if any(finding.state == MISSING for finding in findings) else EXIT_DONE


def check_machine() -> Iterator[Finding]:
    """Looks at this machine's Python, packages, devices, build tools, shared memory and disk."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _build_tools()
    yield _shared_memory()
    yield _disk()


def _python() -> Finding:
    found = platform.python_version()
    if PYTHON_MINIMUM <= sys.version_info[:2] < PYTHON_BELOW:
        return Finding("python", found)
    return Finding("python", found, MISSING, "create the environment again with Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Finding]:
    """Compares every package that this distribution requires with the installed version."""
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("layerboost") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("layerboost", "not installed", MISSING, "pip install -e . in the project's folder")
        return
    yield Finding("layerboost", importlib.metadata.version("layerboost"))
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", MISSING, remedy)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, version)
        else:
            yield Finding(requirement.name, version, WARN, remedy)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", str(error), MISSING, "install torch for this machine, see pytorch.org")
        return
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB")
    if torch.cuda.device_count() == 0:
        if shutil.which("nvidia-smi"):
            remedy = "install a CUDA build of torch that fits the driver (nvidia-smi shows it)"
            yield Finding("gpu", "a driver, but torch sees no GPU", WARN, remedy)
        else:
            yield Finding("gpu", "none", WARN, "models of more than a few hundred million parameters need one")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def _build_tools() -> Iterator[Finding]:
    """Looks for a compiler and ninja, because DeepSpeed and Triton compile C++ when they are first used."""
    # Tools may be on PATH, or in the environment's own bin, which is used even if the environment is not activated.
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    for what, names, remedy in (
        ("compiler", ("c++", "g++", "clang++"), "install g++ (apt-get install g++)"),
        ("ninja", ("ninja",), "pip install ninja"),
    ):
        path = next((found for name in names if (found := shutil.which(name, path=places))), None)
        yield Finding(what, path) if path else Finding(what, "not found", WARN, remedy)


def _shared_memory() -> Finding:
    try:
        size_gib = shutil.disk_usage("/dev/shm").total / _GIB
    except OSError:
        return Finding("/dev/shm", "not there, Ray uses files", OK)
    if size_gib >= SHM_MINIMUM_GIB:
        return Finding("/dev/shm", f"{size_gib:.1f} GiB")
    return Finding(
        "/dev/shm", f"{size_gib:.2f} GiB", WARN, f"give it {SHM_MINIMUM_GIB:g} GiB or more (docker run --shm-size=4g)"
    )


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / _GIB
    if free_gib >= FREE_DISK_MINIMUM_GIB:
        return Finding("free disk here", f"{free_gib:.0f} GiB")
    return Finding(
        "free disk here", f"{free_gib:.1f} GiB", WARN, "free some space: a healed checkpoint is as large as the model"
    )


def check_ray(address: str | None) -> Iterator[Finding]:
    """Looks whether the cluster at an address answers, which versions it runs, and which resources it has."""
    if address is None:
        yield Finding("ray cluster", "none asked for", OK)
        return
    from orchestrator.checks.placement import find_nodes

    try:
        with contextlib.redirect_stdout(sys.stderr):
            nodes = find_nodes(address)
    except InputError as error:
        reason, _, remedy = error.remedy.rpartition("; ")
        yield Finding("ray cluster", f"{address}: {reason}", MISSING, remedy)
        return
    yield Finding("ray cluster", f"{address}: {len(nodes)} nodes alive")
    from orchestrator.checks.cluster import PACKAGES, Needs, check_nodes
    from tasks.cluster.node_probe import ProbeRequest

    yield from check_nodes(Needs(ProbeRequest(packages=PACKAGES)), nodes)
