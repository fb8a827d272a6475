"""Stage `report`: the finalists judged by everything and timed under every serving condition."""

from __future__ import annotations

from typing import Any

import torch

from layerboost.decoding import hardware_name
from layerboost.plan import Plan, Treatment
from orchestrator.context import RunContext
from orchestrator.results import REFINED, Finalist
from orchestrator.run_folder import unit_key
from orchestrator.stages.heal import healed_folder, healed_unit
from tasks import cluster
from tasks.ablation import EvaluationUnit, base_unit
from tasks.measurement import ThroughputUnit, exclusive_worker, measure_units

THROUGHPUT = "throughput"
"""Stage of the records that hold timings."""


def measure(run: RunContext) -> bool:
    """Judges, then times. Failed finalists stay as rows; the rest goes on."""
    found = finalists(run)
    units = {finalist: evaluation_unit(run, finalist) for finalist in found}
    spec = run.inputs.full_spec
    names: dict[EvaluationUnit, dict[str, Any]] = {unit: _name(finalist) for finalist, unit in units.items()}
    healed_keys = {units[finalist]: finalist.healed_key for finalist in found if finalist.healed_key is not None}
    run.state.finalists = [
        {**finalist.to_dict(), "quality_key": unit_key(run.inputs.scores(unit, spec, finalist.healed_key))}
        for finalist, unit in units.items()
    ]
    branches = branch_units(run)
    names |= {unit: {**_name(finalist), "kind": "branches"} for unit, finalist in branches.items()}
    healed_keys |= {unit: finalist.healed_key for unit, finalist in branches.items() if finalist.healed_key is not None}
    run.state.branches = [
        {**finalist.to_dict(), "key": unit_key(run.inputs.scores(unit, spec, finalist.healed_key))}
        for unit, finalist in branches.items()
    ]
    run.evaluate("measure", spec, names, healed_keys)
    run.save()
    _time(run, found)
    return True


def finalists(run: RunContext) -> list[Finalist]:
    """The rows of pareto.csv: the base, the fixed points of the search, the healed candidates."""
    origins = {Plan.from_dict(trial): trial["origin"] for trial in reversed(run.state.trials)}
    unhealed = [Finalist(plan, origin) for plan, origin in origins.items() if origin not in ("search", REFINED)]
    order = [trial["origin"] for trial in run.state.trials]
    unhealed.sort(key=lambda finalist: order.index(finalist.origin))
    return unhealed + _healed(run)


def branch_units(run: RunContext) -> dict[EvaluationUnit, Finalist]:
    """What asks healed plans for the worth of their branches, where a text reaches the linear one."""
    spec = run.inputs.full_spec
    return {
        EvaluationUnit("branches", checkpoint=healed_folder(run, finalist.plan)): finalist
        for finalist in _healed(run)
        # Sequences that a window covers never reach the linear branch.
        if finalist.plan.count(Treatment.LINEAR_WINDOW)
        and spec.text is not None
        and spec.sequence_tokens > (finalist.plan.window or 0)
    }


def _healed(run: RunContext) -> list[Finalist]:
    return [Finalist(Plan.from_dict(entry), entry["origin"], entry["key"]) for entry in run.state.healed]


def evaluation_unit(run: RunContext, finalist: Finalist) -> EvaluationUnit:
    """What judges a finalist."""
    if finalist.healed_key is not None:
        return healed_unit(run, finalist.plan)
    return base_unit() if finalist.origin == "base" else EvaluationUnit(plan=finalist.plan)


def _name(finalist: Finalist) -> dict[str, str]:
    return {"plan": str(finalist.plan), "origin": finalist.origin, "healed": "yes" if finalist.healed_key else "no"}


def _time(run: RunContext, found: list[Finalist]) -> None:
    recipe, hardware = run.inputs.recipe.throughput, _hardware(run)
    units = {}
    for finalist in found:
        judged = evaluation_unit(run, finalist)
        for concurrency in recipe.concurrency:
            unit = ThroughputUnit(
                concurrency=concurrency,
                prompt_tokens=recipe.prompt_tokens,
                new_tokens=recipe.new_tokens,
                plan=judged.plan,
                checkpoint=judged.checkpoint,
                repeats=recipe.repeats,
            )
            units[unit] = finalist
    identities = {unit: run.inputs.throughput(unit, hardware, finalist.healed_key) for unit, finalist in units.items()}
    run.state.throughput = [
        {**finalist.to_dict(), "concurrency": unit.concurrency, "key": unit_key(identities[unit])}
        for unit, finalist in units.items()
    ]
    todo = [unit for unit in units if run.recorded(identities[unit], (THROUGHPUT,)) is None]
    run.progress.start_stage(THROUGHPUT, len(units), recorded=len(units) - len(todo))

    def on_result(unit: ThroughputUnit, result: dict, duration_s: float, info: dict) -> None:
        run.record(THROUGHPUT, identities[unit], {**result, "duration_s": duration_s, "worker": info})
        tok_per_s = round(result["output_throughput_tok_per_s"], 1)
        run.progress.finish_unit(duration_s, **_name(units[unit]), concurrency=unit.concurrency, tok_per_s=tok_per_s)

    if todo:
        run.connect()
        for failure in measure_units(todo, run.inputs.source, on_result=on_result):
            name = {**_name(units[failure.unit]), "concurrency": failure.unit.concurrency}
            run.failed(THROUGHPUT, name, failure.error)
    run.progress.end_stage()


def _hardware(run: RunContext) -> str:
    """What the measuring worker runs on: this machine, or what a cluster says."""
    if run.address is None:
        return _device_name()
    run.connect()
    import ray

    worker = exclusive_worker(cluster.resources())
    return ray.get(ray.remote(_device_name).options(**worker.actor_options()).remote())


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")
