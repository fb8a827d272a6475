"""Measures the cost of a run's units on its machine: a short timing before the run, kept as one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from layerboost.costs.costs import Costs, DecodeCosts, EvaluationCosts, HealingCosts
from layerboost.costs.probe import decode_costs, evaluation_costs, healing_costs, sample_token_s, slowness, threads
from layerboost.costs.twins import Twins
from layerboost.plan import TREATMENTS, Treatment
from layerboost.search.baselines import baseline_plans, is_of_same_budget
from layerboost.search.loop import fixed_points
from layerboost.speed.hardware import hardware_name
from orchestrator.checks.placement import find_nodes
from orchestrator.recipe.errors import first_line
from orchestrator.run.context import RunContext
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import CALIBRATION, COSTS
from orchestrator.run.lock import RunFolderLockedError
from orchestrator.run.placement import Placement
from orchestrator.run.units import Identity
from tasks.cluster.connection import addable
from tasks.cluster.resources import NodeResources, WorkerResources, with_node_to_come
from tasks.timing import measuring_threads


def calibrate(inputs: RunInputs, nodes: tuple[NodeResources, ...]) -> Iterator[tuple[str, Costs]]:
    """Loads the model and measures the costs in this process, with as many threads as each kind of worker has.

    Healing, which takes most of a run, is timed first, so that an estimate can be given early.

    Yields:
        The name of each of `calibration_parts` when it is done, and the costs that are known by then, the others 0.
    """
    recipe, spec, every = inputs.recipe, inputs.full_spec, timed_treatments(inputs)
    placement = Placement(recipe, nodes)
    n_threads, healing = placement.evaluating().threads, healing_workers(placement)
    inputs.source.load()  # warms the disk cache, so that the timed load below is as fast as that of later workers
    start = time.perf_counter()
    model, tokenizer = inputs.source.load(), inputs.source.load_tokenizer()
    load_s = time.perf_counter() - start
    twins = Twins(model, recipe.search.window, recipe.search.sinks)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    zero = dict.fromkeys((treatment.value for treatment in every), 0.0)
    costs = Costs(
        slowness(),
        load_s,
        n_parameters,
        model.dtype.itemsize,
        EvaluationCosts(0.0, 0.0, zero, zero, 0.0, {"tasks": 0.0, "text": 0.0}, zero),
        HealingCosts(zero, 0.0, 0, 0.0) if recipe.healing.tokens else None,
        tuple(DecodeCosts(n, tokens, zero, zero) for n, tokens in _conditions(inputs)),
        None,
    )
    yield LOADING, costs
    if recipe.healing.tokens:
        teacher = inputs.facts.teacher
        with threads(healing.threads):
            healed = healing_costs(
                twins,
                inputs.healing_spec,
                treatments=healed_treatments(inputs),
                n_workers=healing.n_workers,
                teacher=None if teacher is None else replace(inputs.source, revision=teacher.commit).load(teacher.path),
            )
        costs = replace(costs, healing=healed)
        yield HEALING, costs
    with threads(n_threads):
        swept = [Treatment(name) for name in recipe.sensitivity.treatments]
        evaluation = evaluation_costs(twins, tokenizer, spec, treatments=every, swept=swept)
        sampled_s = None if inputs.sampling is None else sample_token_s(twins, tokenizer, inputs.sampling)
    costs = replace(costs, evaluation=evaluation, sample_token_s=sampled_s)
    yield JUDGING, costs
    with threads(measuring_threads(placement.measuring())):
        decode = tuple(
            decode_costs(twins, concurrency=n, prompt_tokens=tokens, treatments=every)
            for n, tokens in _conditions(inputs)
        )
    yield DECODING, replace(costs, decode=decode)


LOADING, HEALING, JUDGING, DECODING = "load", "heal", "judge", "decode"


def calibration_parts(inputs: RunInputs) -> list[str]:
    """Returns the names of the parts of a calibration, in order; they are the units of its progress."""
    return [LOADING, *([HEALING] if inputs.recipe.healing.tokens else []), JUDGING, DECODING]


def healed_treatments(inputs: RunInputs) -> tuple[Treatment, ...]:
    """Returns every treatment that a healed plan can have: softmax, none, those that are searched, and baselines'."""
    search, healing = inputs.recipe.search, inputs.recipe.healing
    of_baselines = [
        treatment
        for name in healing.baselines
        if healing.tokens and not is_of_same_budget(name)
        for plan in baseline_plans(
            name, inputs.n_layers, middle=Treatment(search.middle), window=search.window, sinks=search.sinks
        ).values()
        for treatment in plan.treatments
    ]
    return tuple(dict.fromkeys((*inputs.treatments, *of_baselines)))


def timed_treatments(inputs: RunInputs) -> tuple[Treatment, ...]:
    """Returns every treatment that a plan of the run can have, also those that each search tries in all layers."""
    of_points = [t for _, plan in fixed_points(inputs.search_spec, inputs.n_layers) for t in plan.treatments]
    return tuple(dict.fromkeys((*healed_treatments(inputs), *of_points)))


def nodes_of(run: RunContext) -> tuple[NodeResources, ...]:
    """Returns the existing nodes, and those that an autoscaler will add for the labels of the run's placement."""
    nodes = find_nodes(run.address)
    growth = () if run.address is None else addable()
    for _, labels in run.inputs.recipe.placement.labels:
        nodes = with_node_to_come(nodes, growth, labels)
    return nodes


def costs_of(run: RunContext, *, on_cluster: bool, on_part: Callable[[str, Costs], None] | None = None) -> Costs:
    """Returns the recorded costs, or measures and records them now.

    Args:
        run: The run.
        on_cluster: Whether a worker of the run's cluster measures, while the run holds its folder. Otherwise this
            process does, ahead of a run, and says so where the folder cannot be written.
        on_part: Called with the name of each part that is measured, and the costs that are known by then.
    """
    nodes = nodes_of(run)
    identity = calibration_identity(run.inputs, nodes, _hardware(run))
    recorded, parts = run.recorded(identity, COSTS), calibration_parts(run.inputs)
    run.progress.start_stage(CALIBRATION, len(parts), recorded=len(parts) if recorded is not None else 0)
    if recorded is not None:
        costs = Costs.from_dict(recorded["costs"])
    else:
        costs = _measured(run, nodes, on_cluster, on_part or (lambda part, costs: None))
        result = {"costs": costs.to_dict()}
        if on_cluster:
            run.record(CALIBRATION, identity, result)
        else:
            _record_ahead(run, identity, result)
    run.progress.end_stage()
    return costs


def _record_ahead(run: RunContext, identity: Identity, result: dict[str, Any]) -> None:
    """Records costs in a folder that no run holds yet; where that cannot be, the next call measures again."""
    try:
        with run.folder.lock():
            run.record(CALIBRATION, identity, result)
    except (RunFolderLockedError, OSError) as error:
        run.progress.note("the calibration is not recorded", because=first_line(error))


def _measured(
    run: RunContext, nodes: tuple[NodeResources, ...], on_cluster: bool, on_part: Callable[[str, Costs], None]
) -> Costs:
    """Measures the costs and reports each part that is done."""
    parts: Iterator[tuple[str, Costs]] = calibrate(run.inputs, nodes)
    if on_cluster:
        import ray

        run.connect()
        options = Placement(run.inputs.recipe, nodes).measuring().actor_options()
        work = ray.remote(calibrate).options(**options, max_retries=0, num_returns="streaming")
        stream: Any = work.remote(run.inputs, nodes)
        parts = (ray.get(part) for part in stream)
    start, costs = time.monotonic(), None
    for part, costs in parts:
        run.progress.finish_unit(time.monotonic() - start, part=part)
        on_part(part, costs)
        start = time.monotonic()
    if costs is None:
        raise RuntimeError("calibration: it ended without a result; run the same command again")
    return costs


def _plugin_treatments(inputs: RunInputs) -> dict[str, Any]:
    """Returns the plug-in of each timed treatment that comes from one; it is empty if the recipe uses none."""
    plugins = {treatment.value: TREATMENTS.plugin_of(treatment.value) for treatment in timed_treatments(inputs)}
    found = {name: str(plugin) for name, plugin in plugins.items() if plugin is not None}
    return {"treatments": found} if found else {}


def calibration_identity(inputs: RunInputs, nodes: tuple[NodeResources, ...], hardware: str) -> dict[str, Any]:
    """Returns everything that the costs depend on: the model, the machine, and the sizes in the recipe."""
    recipe, spec = inputs.recipe, inputs.full_spec
    placement = Placement(recipe, nodes)
    healing, evaluating = healing_workers(placement), placement.evaluating()
    return {
        "unit": "calibration",
        "version": 2,  # of what is timed, and of the fields of `Costs`
        "model": inputs.model,
        "hardware": hardware,
        "workers": [evaluating.cpus, evaluating.gpus, healing.n_workers, healing.cpus, healing.gpus],
        "quality": inputs._fingerprint(spec),
        **_plugin_treatments(inputs),
        "plans": [recipe.search.middle, recipe.search.window, list(recipe.sensitivity.treatments)],
        **({"sinks": recipe.search.sinks} if recipe.search.sinks else {}),
        "timed": [[t.value for t in found] for found in (timed_treatments(inputs), healed_treatments(inputs))],
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


def _hardware(run: RunContext) -> str:
    """Returns what the costs are measured on; a cluster's workers may be other machines than this one."""
    return _device_name() if run.address is None else f"{_device_name()}, a cluster"


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")
