"""Makes the rows of speed tables: predicted and measured speed, and speed over prompt lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from layerboost.plan import Plan
from orchestrator.results.reading import RecordReader
from orchestrator.run.entries import Finalist, SpeedFit
from orchestrator.run.kinds import TIMINGS
from orchestrator.run.state import RunState

Prediction = Callable[[Plan, int], tuple[float, float] | None]
"""Predicts a plan's tokens per second at a concurrency and their standard error; None without a fitted model."""

_LENGTH_VALUES = (
    "engine",
    "hardware",
    "output_throughput_tok_per_s",
    "output_throughput_stderr",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "peak_memory_mib",
    "kv_bytes_per_token",
)


def predictions(state: RunState) -> Prediction:
    """Returns the function that predicts the output throughput of plans."""
    of_concurrency = {model.concurrency: model for model in (state.speed or SpeedFit()).models}

    def predict(plan: Plan, concurrency: int) -> tuple[float, float] | None:
        model = of_concurrency.get(concurrency)
        return None if model is None else model.predict(plan)

    return predict


def speed_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of speed.csv: each measured model under each condition with a fit, and its prediction."""
    predict, fitted = predictions(state), (state.speed or SpeedFit()).measured
    in_fit = {entry.key for entry in fitted}
    timed = {entry.key: (entry.plan, entry.concurrency, False) for entry in fitted}
    for entry in state.throughput:
        timed[entry.key] = entry.finalist.plan, entry.concurrency, entry.finalist.healed_key is not None
    for key, (plan, concurrency, healed) in timed.items():
        predicted, record = predict(plan, concurrency), records.result(key, TIMINGS)
        if predicted is None or record is None:
            continue
        throughput = record["output_throughput_tok_per_s"]
        yield {
            "plan_id": plan.plan_id,
            **plan.to_dict(),
            "healed": healed,
            "concurrency": concurrency,
            "in_fit": key in in_fit,
            "predicted_throughput_tok_per_s": predicted[0],
            "predicted_throughput_stderr": predicted[1],
            "output_throughput_tok_per_s": throughput,
            "relative_error": predicted[0] / throughput - 1,
        }


def length_rows(records: RecordReader, state: RunState) -> Iterator[dict[str, Any]]:
    """Yields the rows of lengths.csv: each finalist at each prompt length; a failed one stays, with its error."""
    for entry in state.lengths:
        finalist, record = entry.finalist, records.result(entry.key, TIMINGS)
        condition = {name: getattr(entry, name) for name in ("concurrency", "prompt_tokens", "new_tokens")}
        yield {
            "plan_id": finalist.plan.plan_id,
            **finalist.plan.to_dict(),
            "origin": finalist.origin,
            "healed": finalist.healed_key is not None,
            **condition,
            **({} if record is None else {name: record[name] for name in _LENGTH_VALUES}),
            "status": "failed" if record is None else "ok",
            "error": _error(state, finalist, condition) if record is None else None,
        }


def _error(state: RunState, finalist: Finalist, condition: dict[str, int]) -> str:
    name = {"plan": str(finalist.plan), "healed": "yes" if finalist.healed_key else "no"} | condition
    name.pop("new_tokens")
    errors = [
        failure.error
        for failure in state.failures
        if failure.stage == "lengths" and name.items() <= failure.name.items()
    ]
    return errors[0] if errors else "no record of throughput"
