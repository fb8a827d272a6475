"""Describes the engines that can time decoding: their workers, conditions and checks.

An entry only refers to the code, so that the command line can read it without importing torch or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerboost.registry import Registry
from layerboost.serving.families import SERVED_TREATMENTS


@dataclass(frozen=True)
class Engine:
    """Describes one engine. A reference is the object itself or its place (`module:name`).

    Attributes:
        name: its name in recipes, tables and `bench --engine`.
        summary: one line for messages and help.
        worker: the class whose actors time groups of `tasks.timing.ThroughputUnit`. It is made of a `ModelSource` (and
            `threads`, unless it serves) and has `info()`, which returns a `tasks.pool.finished.WorkerInfo`, and
            `run(group)`, which gives for each unit a mapping, or its error under the key `tasks.timing.ERROR`. The
            mapping has the columns of pareto.csv that the engine measures, at least `engine`, `hardware` and
            `output_throughput_tok_per_s`.
        measurement: the class of those mappings, with `from_dict`, `to_dict` and `scaled(factor)`.
        serves: whether a group is one model under all conditions, because the server takes long to start. Otherwise a
            group is several models side by side under one condition.
        find_environment: takes the folder of a virtual environment, or None, and returns what the engine runs in. The
            value is hashable and has `versions` (part of a timing's identity) and `hardware`. An engine without this
            function runs in the worker's own Python.
        treatments: names of the treatments that it can run; None for all.
        check_model: raises a ValueError, or a `ServingError`, for a `model_type` that the engine cannot run.
        prompt_slack_tokens: the most tokens by which its prompts may come out longer than asked for.
        start_s: seconds to start for each model, on the reference machine of the estimate.
        max_attempts: the number of attempts for each group.
    """

    name: str
    summary: str
    worker: Any
    measurement: Any
    serves: bool = False
    find_environment: Any = None
    treatments: tuple[str, ...] | None = None
    check_model: Any = None
    prompt_slack_tokens: int = 0
    start_s: float = 0.0
    max_attempts: int = 3


TRANSFORMERS = "transformers"

ENGINES: Registry[Engine] = Registry(
    "engine",
    (
        Engine(
            TRANSFORMERS,
            "times one batch, decoding apart from prefill",
            "tasks.timing:MeasurementWorker",
            "layerboost.speed.decoding:DecodeMeasurement",
        ),
        Engine(
            "vllm",
            "serves each model and has vLLM's own client ask it",
            "tasks.timing:ServingWorker",
            "layerboost.speed.vllm_bench:ServingMeasurement",
            serves=True,
            find_environment="layerboost.speed.vllm_environment:find_environment",
            treatments=SERVED_TREATMENTS,
            check_model="layerboost.speed.vllm_environment:check_served",
            prompt_slack_tokens=16,
            start_s=100.0,  # vLLM's imports, loading weights and compiling
            max_attempts=2,  # a server may take minutes to fail
        ),
    ),
)
"""The engines that can time decoding; plug-ins add theirs."""
