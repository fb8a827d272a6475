"""Checks the placement: whether the devices, nodes and labels that a recipe asks for exist."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.checks.findings import WARN, Finding
from orchestrator.recipe.errors import InputError, without_prefix
from orchestrator.recipe.recipe import Recipe
from orchestrator.recipe.sections import DEVICE_PATTERN
from orchestrator.run.placement import Placement
from tasks.cluster.connection import ClusterError, connect
from tasks.cluster.resources import AUTO, NodeResources, ResourcesError, labelled, no_such_node


def check_device(device: str, field: str = "model.device") -> None:
    """Raises InputError if this machine does not have the device."""
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise InputError(field, device, "must be auto, cpu, mps, cuda or cuda:N")
    import torch

    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    if kind == "mps":
        count = int(torch.backends.mps.is_available())
    else:
        count = torch.xpu.device_count() if kind == "xpu" else torch.cuda.device_count()
    if count <= int(index or 0):
        raise InputError(field, device, f"this machine has {count} of {kind}; use auto or cpu")


def find_nodes(address: str | None) -> tuple[NodeResources, ...]:
    """Returns the CPUs and GPUs of this machine, or of each node of the Ray cluster at an address.

    The connection to a cluster stays open for the run that follows.

    Raises:
        InputError: the cluster does not answer or refuses the connection.
    """
    if address is None:
        import torch

        return (
            NodeResources(
                "here", "localhost", float(os.cpu_count() or 1), float(torch.cuda.device_count()), labels=None
            ),
        )
    try:
        return connect(address).nodes
    except ClusterError as error:
        raise InputError("--address", address, without_prefix(error, f"address: {address}")) from error


def check_placement(
    recipe: Recipe, nodes: Sequence[NodeResources], where: str, *, growth: Sequence[NodeResources] = ()
) -> list[Finding]:
    """Checks that the nodes can hold what the placement asks for; returns rows for what waits for an autoscaler.

    Args:
        recipe: the recipe of the run.
        nodes: the nodes that exist now.
        where: the place of the nodes, for the error.
        growth: the nodes that an autoscaler could add.

    Raises:
        InputError: the placement asks for more than there can ever be, so that Ray would wait for ever.
    """
    for kind, asked in recipe.placement.labels:
        if not growth and not labelled(nodes, asked):
            error = no_such_node(asked)
            raise InputError(f"placement.labels.{kind}", error.value, f"on {where} {error.remedy}")
    placement = Placement(recipe, nodes, growth)
    wanted = [placement.wanted_to_evaluate()]
    if recipe.healing.tokens and recipe.placement.healing_workers != AUTO:
        # Each healing worker takes a whole GPU, or at least one CPU; how many more CPUs follows from the nodes.
        wanted.append(replace(placement.wanted_to_heal(), cpus=1.0))
    pending = []
    for workers in wanted:
        field = workers.field
        try:
            workers.on(nodes)
        except ResourcesError as error:
            at_fault = f"placement.{field if error.field == 'workers' or field == 'healing_workers' else error.field}"
            try:
                workers.on(nodes, growth)
            except ResourcesError as never:
                raise InputError(at_fault, never.value, f"on {where} {never.remedy}") from None
            pending.append(
                Finding(
                    at_fault, f"{error.value}: {error.remedy}", WARN, "wait for the autoscaler, which can add nodes"
                )
            )
    return pending
