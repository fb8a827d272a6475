"""Samples text from the parent for stage `heal`: workers of the cluster write documents, kept in the run folder."""

from __future__ import annotations

import math

from layerboost.storage.errors import retried
from layerboost.text.sources import TOKENS_SUFFIX, write_token_rows
from orchestrator.run.context import RunContext
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import DOCUMENTS, SAMPLE
from orchestrator.run.records import time_and_worker
from orchestrator.run.units import StageUnits, Unit, recorded_seconds
from tasks.pool.finished import Finished
from tasks.sampling import SampleUnit, sample_units

_DOCUMENTS_OF_A_UNIT = 32


def sample_text(run: RunContext) -> bool:
    """Samples the documents that the recipe's share of sampled text still lacks; returns whether all of them exist."""
    if run.inputs.sampling is None:
        return True
    while not (listing := list_documents(run)).is_complete:
        todo, workers = [unit.work for unit in listing.todo], run.workers()
        run.begin(listing, workers=workers.n_workers)

        def on_result(done: Finished[SampleUnit, list[list[int]]]) -> None:
            unit, documents = done.unit, done.result
            retried(write_token_rows)(f"{sampled_folder(run)}/{_file_name(unit)}", documents)
            n_tokens = sum(map(len, documents))
            run.record(SAMPLE, run.inputs.sample(unit), {"tokens": n_tokens, **time_and_worker(done)})
            run.progress.finish_unit(done.seconds, **_name(unit))

        watch = run.watch(SAMPLE, _name, n_workers=workers.n_workers)
        failures = sample_units(todo, run.inputs.source, run.inputs.sampling, workers, on_result=on_result, watch=watch)
        for failure in failures:
            run.failed(SAMPLE, _name(failure.unit), failure.error)
        run.progress.end_stage()
        if failures:
            return False
    return True


def list_documents(run: RunContext, *, needed: bool = True) -> StageUnits:
    """Lists the existing documents and, if they are `needed` for a healing, those to sample next."""
    every, missing = _units(run)
    wanted = [unit for unit in every if needed or unit not in missing]
    named = [Unit(DOCUMENTS, (run.inputs.sample(unit),), _name(unit), unit) for unit in wanted]
    return run.list_units(SAMPLE, named, look=lambda units: [_took(run, unit) for unit in units])


def _took(run: RunContext, unit: Unit) -> float | None:
    """Returns the seconds that sampling a unit's documents took; None if their file does not exist."""
    if _recorded_tokens(run, unit.work) is None:
        return None
    (seconds,) = recorded_seconds(run.folder, [unit])
    return seconds


def _name(unit: SampleUnit) -> dict[str, str]:
    return {"documents": f"{unit.first}-{unit.first + unit.n_documents}"}


def sampled_folder(run: RunContext) -> str:
    """Returns the path or URL of the folder with the sampled text."""
    return run.folder.place(_folder_name(run))


def _units(run: RunContext) -> tuple[list[SampleUnit], list[SampleUnit]]:
    """Returns all units up to the next missing ones, and the missing ones; none once the budget's share is filled.

    The model decides where a document ends, so the number of documents needed is known only from those sampled so far.
    It depends on the documents alone, however often the run was interrupted.
    """
    sampling, wanted = run.inputs.sampling, run.inputs.sampled_tokens
    assert sampling is not None
    n_units = math.ceil(wanted / (sampling.max_tokens * _DOCUMENTS_OF_A_UNIT))
    while True:
        units = [SampleUnit(number * _DOCUMENTS_OF_A_UNIT, _DOCUMENTS_OF_A_UNIT) for number in range(n_units)]
        tokens = {unit: _recorded_tokens(run, unit) for unit in units}
        missing = [unit for unit in units if tokens[unit] is None]
        n_tokens = sum(n or 0 for n in tokens.values())
        if missing or n_tokens >= wanted:
            return units, missing
        n_units += math.ceil((wanted - n_tokens) * n_units / n_tokens)


def _recorded_tokens(run: RunContext, unit: SampleUnit) -> int | None:
    recorded = run.recorded(run.inputs.sample(unit), DOCUMENTS)
    if recorded is None or not run.folder.exists(f"{_folder_name(run)}/{_file_name(unit)}"):
        return None
    return recorded["tokens"]


def _folder_name(run: RunContext) -> str:
    return f"texts/{unit_key(run.inputs.sampled_text())}"


def _file_name(unit: SampleUnit) -> str:
    return f"{unit.first:09d}{TOKENS_SUFFIX}"
