"""Measures the cost of a run's units on its machine: a short timing before the run, kept as one record."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from layerboost.costs.costs import Costs
from layerboost.costs.probe import decode_costs, evaluation_costs, healing_costs, sample_token_s, slowness, threads
from layerboost.evaluation.shares import MIN_AUTO_SHARES
from layerboost.plan import TREATMENTS, Treatment
from layerboost.speed.hardware import hardware_name
from orchestrator.checks.placement import find_nodes
from orchestrator.run.context import RunContext
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import CALIBRATION, COSTS
from orchestrator.run.placement import Placement
from tasks.cluster.connection import addable
from tasks.cluster.resources import NodeResources, WorkerResources, with_node_to_come
from tasks.timing import measuring_threads


def calibrate(inputs: RunInputs, nodes: tuple[NodeResources, ...]) -> Costs:
    """Loads the model and measures the costs in this process, with as many threads as each kind of worker has."""

    recipe, spec, middle = inputs.recipe, inputs.full_spec, Treatment(inputs.recipe.search.middle)
    shares = recipe.sensitivity.shares
    window = recipe.search.window
    placement = Placement(recipe, nodes)
    n_threads, healing = placement.evaluating().threads, healing_workers(placement)
    inputs.source.load()  # warms the disk cache, so that the timed load below is as fast as that of later workers
    start = time.perf_counter()
    model, tokenizer = inputs.source.load(), inputs.source.load_tokenizer()
    load_s = time.perf_counter() - start
    built_in = (Treatment(entry.name) for entry in TREATMENTS.built_in())
    every = tuple(dict.fromkeys((Treatment.SOFTMAX, Treatment.NONE, middle, *built_in, *inputs.treatments)))
    with threads(n_threads):
        evaluation = evaluation_costs(
            model,
            tokenizer,
            spec,
            treatments=every,
            swept=[Treatment(name) for name in recipe.sensitivity.treatments],
            window=window,
            shares=MIN_AUTO_SHARES if isinstance(shares, str) else shares,
        )
        sampled_s = None if inputs.sampling is None else sample_token_s(model, tokenizer, inputs.sampling)
    with threads(measuring_threads(placement.measuring())):
        decode = tuple(
            decode_costs(model, concurrency=n, prompt_tokens=tokens, treatments=every, window=window)
            for n, tokens in _conditions(inputs)
        )
    healed = None
    if recipe.healing.tokens:
        teacher = inputs.facts.teacher
        with threads(healing.threads):
            healed = healing_costs(
                model,
                inputs.healing_spec,
                middle=middle,
                window=window,
                n_workers=healing.n_workers,
                teacher=None if teacher is None else replace(inputs.source, revision=teacher.commit).load(teacher.path),
            )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Costs(slowness(), load_s, n_parameters, model.dtype.itemsize, evaluation, healed, decode, sampled_s)


def nodes_of(run: RunContext) -> tuple[NodeResources, ...]:
    """Returns the existing nodes, and those that an autoscaler will add for the labels of the run's placement."""
    nodes = find_nodes(run.address)
    growth = () if run.address is None else addable()
    for _, labels in run.inputs.recipe.placement.labels:
        nodes = with_node_to_come(nodes, growth, labels)
    return nodes


def costs_of(run: RunContext, *, record: bool) -> Costs:
    """Returns the recorded costs, or measures them now.

    Args:
        run: The run.
        record: Whether a worker of the run's cluster measures and the result is recorded; otherwise this process does.
    """
    nodes = nodes_of(run)
    recorded = run.recorded(calibration_identity(run.inputs, nodes, _device_name()), COSTS)
    run.progress.start_stage(CALIBRATION, 1, recorded=int(recorded is not None))
    start = time.monotonic()
    if recorded is not None:
        costs = Costs.from_dict(recorded["costs"])
    elif not record:
        costs = calibrate(run.inputs, nodes)
    else:
        import ray

        run.connect()
        options = Placement(run.inputs.recipe, nodes).measuring().actor_options()
        costs = ray.get(ray.remote(calibrate).options(**options, max_retries=0).remote(run.inputs, nodes))
        identity = calibration_identity(run.inputs, nodes, _device_name())
        run.record(CALIBRATION, identity, {"costs": costs.to_dict()})
    if recorded is None:
        run.progress.finish_unit(time.monotonic() - start)
    run.progress.end_stage()
    return costs


def _plugin_treatments(inputs: RunInputs) -> dict[str, Any]:
    """Returns the plug-in of each timed treatment that comes from one; it is empty if the recipe uses none."""
    plugins = {treatment.value: TREATMENTS.plugin_of(treatment.value) for treatment in inputs.treatments}
    found = {name: str(plugin) for name, plugin in plugins.items() if plugin is not None}
    return {"treatments": found} if found else {}


def calibration_identity(inputs: RunInputs, nodes: tuple[NodeResources, ...], hardware: str) -> dict[str, Any]:
    """Returns everything that the costs depend on: the model, the machine, and the sizes in the recipe."""
    recipe, spec = inputs.recipe, inputs.full_spec
    placement = Placement(recipe, nodes)
    healing, evaluating = healing_workers(placement), placement.evaluating()
    return {
        "unit": "calibration",
        "model": inputs.model,
        "hardware": hardware,
        "workers": [evaluating.cpus, evaluating.gpus, healing.n_workers, healing.cpus, healing.gpus],
        "quality": inputs._fingerprint(spec),
        **_plugin_treatments(inputs),
        "plans": [recipe.search.middle, recipe.search.window, list(recipe.sensitivity.treatments)],
        "shares": recipe.sensitivity.shares,
        "healing": inputs.healing_spec.to_dict() if recipe.healing.tokens else None,
        "teacher": recipe.healing.teacher,
        "sampled": inputs.sampling is not None,
        "decode": [list(condition) for condition in _conditions(inputs)],
    }


def healing_workers(placement: Placement, n_jobs: int = 1) -> WorkerResources:
    """Returns the workers that heal one of `n_jobs` plans side by side; the judging workers if nothing is healed."""
    return placement.healing(n_jobs) if placement.recipe.healing.tokens else placement.evaluating()


def _conditions(inputs: RunInputs) -> list[tuple[int, int]]:
    """Returns pairs of concurrency and prompt tokens: the lowest and highest concurrency, and the longest prompts."""
    recipe = inputs.recipe.throughput
    found = [(n, recipe.prompt_tokens) for n in (min(recipe.concurrency), max(recipe.concurrency))]
    if recipe.lengths is not None:
        found.append((recipe.lengths.concurrency, max(recipe.lengths.prompt_tokens)))
    return list(dict.fromkeys(found))


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")
