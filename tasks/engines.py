"""The engines that decoding can be timed with: which there are, what times with each, and what each asks for.

Descriptions only, with references to the code: the command line reads them without torch or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerboost.registry import Registry


@dataclass(frozen=True)
class Engine:
    """One engine. References are the thing itself or where it is (`module:name`).

    Attributes:
        name: as recipes, tables and `bench --engine` have it.
        summary: one line for messages and help.
        worker: class whose actors time groups of `tasks.timing.ThroughputUnit`: made of a `ModelSource` (and `threads`,
            unless it serves), with `info()` and `run(group)`, which gives a mapping for each unit, or its error under
            the key `tasks.timing.ERROR`. The mapping has the columns of pareto.csv that the engine measures, at least
            `engine`, `hardware` and `output_throughput_tok_per_s`.
        measurement: class of those mappings, with `from_dict`, `to_dict` and `scaled(factor)`.
        serves: whether a group is one model under all conditions, for a server that takes long to start, and is not
            several models side by side under one condition.
        find_environment: from the folder of a virtual environment, or None, what the engine runs in: hashable, with
            `versions` (part of a timing's identity) and `hardware`. None: it runs in the worker's own Python.
        check_model: raises a ValueError, or a `ServingError`, for a `model_type` that the engine does not run.
        prompt_slack_tokens: by so many tokens at most its prompts come out longer than asked for.
        start_s: seconds that it takes to start for each model, on the reference machine of the estimate.
        max_attempts: how often a group is tried.
    """

    name: str
    summary: str
    worker: Any
    measurement: Any
    serves: bool = False
    find_environment: Any = None
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
            check_model="layerboost.speed.vllm_environment:check_served",
            prompt_slack_tokens=16,
            start_s=100.0,  # vLLM's imports, its weights, what it compiles
            max_attempts=2,  # a server may take minutes to fail
        ),
    ),
)
"""What decoding can be timed with; plug-ins add theirs."""
