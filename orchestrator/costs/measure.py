"""What the units of a run cost where it runs: a few seconds of timing before the run, kept as one record."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from layerboost.costs.costs import Costs
from layerboost.costs.probe import decode_costs, evaluation_costs, healing_costs, sample_token_s, slowness, threads
from layerboost.evaluation.shares import MIN_AUTO_SHARES
from layerboost.plan import Treatment
from layerboost.speed.hardware import hardware_name
from orchestrator.checks.placement import find_nodes
from orchestrator.run.context import RunContext
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import CALIBRATION
from orchestrator.stages.healing_jobs import healing_placement
from tasks.cluster.connection import addable, resolve_workers
from tasks.cluster.resources import NodeResources, WorkerResources, with_node_to_come
from tasks.timing import exclusive_worker, measuring_threads


def calibrate(inputs: RunInputs, nodes: tuple[NodeResources, ...]) -> Costs:
    """Measures in this process, with as many threads as each kind of worker has. Loads the model and lets it go."""

    recipe, spec, middle = inputs.recipe, inputs.full_spec, Treatment(inputs.recipe.search.middle)
    shares = recipe.sensitivity.shares
    window = recipe.search.window
    n_threads, healing = evaluation_workers(inputs, nodes).threads, healing_workers(inputs, nodes)
    inputs.source.load()  # from the disk, so that the next one is timed as workers that start later find it
    start = time.perf_counter()
    model, tokenizer = inputs.source.load(), inputs.source.load_tokenizer()
    load_s = time.perf_counter() - start
    every = tuple(dict.fromkeys((Treatment.SOFTMAX, Treatment.NONE, middle, *Treatment)))
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
    with threads(measuring_threads(exclusive_worker(nodes, recipe.placement.labels.time))):
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
    """The nodes that there are, and those that an idle cluster will start for the run."""
    nodes = find_nodes(run.address)
    growth = () if run.address is None else addable()
    for _, labels in run.inputs.recipe.placement.labels:
        nodes = with_node_to_come(nodes, growth, labels)
    return nodes


def costs_of(run: RunContext, *, record: bool) -> Costs:
    """The recorded costs; else measured now: in this process, or to be recorded, by a worker of the run's cluster."""
    nodes = nodes_of(run)
    recorded = run.recorded(calibration_identity(run.inputs, nodes, _device_name()), (CALIBRATION,))
    run.progress.start_stage(CALIBRATION, 1, recorded=int(recorded is not None))
    start = time.monotonic()
    if recorded is not None:
        costs = Costs.from_dict(recorded["costs"])
    elif not record:
        costs = calibrate(run.inputs, nodes)
    else:
        import ray

        run.connect()
        options = exclusive_worker(nodes, run.inputs.recipe.placement.labels.time).actor_options()
        costs = ray.get(ray.remote(calibrate).options(**options, max_retries=0).remote(run.inputs, nodes))
        identity = calibration_identity(run.inputs, nodes, _device_name())
        run.record(CALIBRATION, identity, {"costs": costs.to_dict()})
    if recorded is None:
        run.progress.finish_unit(time.monotonic() - start)
    run.progress.end_stage()
    return costs


def calibration_identity(inputs: RunInputs, nodes: tuple[NodeResources, ...], hardware: str) -> dict[str, Any]:
    """What the costs depend on: the model, the machine, and the sizes that the recipe asks for."""
    recipe, spec = inputs.recipe, inputs.full_spec
    healing, evaluating = healing_workers(inputs, nodes), evaluation_workers(inputs, nodes)
    return {
        "unit": "calibration",
        "model": inputs.model,
        "hardware": hardware,
        "workers": [evaluating.cpus, evaluating.gpus, healing.n_workers, healing.cpus, healing.gpus],
        "quality": inputs._fingerprint(spec),
        "plans": [recipe.search.middle, recipe.search.window, list(recipe.sensitivity.treatments)],
        "shares": recipe.sensitivity.shares,
        "healing": inputs.healing_spec.to_dict() if recipe.healing.tokens else None,
        "teacher": recipe.healing.teacher,
        "sampled": inputs.sampling is not None,
        "decode": [list(condition) for condition in _conditions(inputs)],
    }


def evaluation_workers(inputs: RunInputs, nodes: tuple[NodeResources, ...]) -> WorkerResources:
    """Workers that judge."""
    placement = inputs.recipe.placement
    wanted = placement.workers, placement.cpus_per_worker, placement.gpus_per_worker
    return resolve_workers(*wanted, nodes=nodes, labels=placement.labels.evaluate)


def healing_workers(inputs: RunInputs, nodes: tuple[NodeResources, ...], n_jobs: int = 1) -> WorkerResources:
    """Workers that heal one plan, of `n_jobs` side by side; those that judge where nothing is healed."""
    if not inputs.recipe.healing.tokens:
        return evaluation_workers(inputs, nodes)
    labels = inputs.recipe.placement.labels.heal
    return resolve_workers(*healing_placement(inputs, nodes, n_jobs), nodes=nodes, labels=labels)


def _conditions(inputs: RunInputs) -> list[tuple[int, int]]:
    """Pairs of concurrency and prompt tokens: the ends of the serving conditions, and the longest prompts."""
    recipe = inputs.recipe.throughput
    found = [(n, recipe.prompt_tokens) for n in (min(recipe.concurrency), max(recipe.concurrency))]
    if recipe.lengths is not None:
        found.append((recipe.lengths.concurrency, max(recipe.lengths.prompt_tokens)))
    return list(dict.fromkeys(found))


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")
