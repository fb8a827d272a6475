"""The sections of a recipe but for `healing` and `constraints`: their fields, defaults, and what a value may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import (
    AUTO,
    AutoCount,
    Count,
    CountOrZero,
    Name,
    Number,
    Section,
    as_number,
    auto_or,
    resolve_sequence_tokens,
    unique_entries,
)

if TYPE_CHECKING:
    from layerboost.evaluation.scores import QualitySpec

MIDDLE_TREATMENTS = ("linear_window", "window")
TEXT_SCORES = ("nll", "kl", "cosine")
TASK_SCORES = ("benchmark", "margin")
DEVICE_PATTERN = r"auto|cpu|mps|(cuda|xpu)(:\d+)?"
TREATMENT_OF_LETTER = {"S": "softmax", "L": "linear_window", "W": "window", "N": "none"}


def _ordered_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("must be [low, high] with low <= high; swap the two")
    return value


def _one_gpu_at_most(value: Any) -> Any:
    """A second GPU would stand idle."""
    if value != AUTO and value > 1:
        raise ValueError(
            "must be 1 or a fraction of it, since a worker computes on one GPU; "
            "for a model that has no room in healing set healing.zero_stage: 3 and more healing_workers"
        )
    return value


def _plan_letters(value: str) -> str:
    value = value.strip().upper()
    if not re.fullmatch("[SLWN]+", value):
        raise ValueError("must be letters S (softmax), L (linear_window), W (window), N (none), one for each layer")
    return value


def environment_folder(value: str) -> str:
    """The folder of a virtual environment, of which the Python may be given: a link that must not be followed."""
    path = Path(value)
    return str(path.parent.parent) if path.parent.name == "bin" and path.name.startswith("python") else value


Range = Annotated[tuple[Number, Number], AfterValidator(_ordered_range)]
PlanLetters = Annotated[str, AfterValidator(_plan_letters)]


class ModelSection(Section):
    """The pretrained model: a hub name or a local folder."""

    path: Name
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    device: Name = "auto"

    @model_validator(mode="after")
    def _known_device(self) -> ModelSection:
        if not re.fullmatch(DEVICE_PATTERN, self.device):
            raise InputError("model.device", self.device, "must be auto, cpu, mps, cuda or cuda:N")
        return self


class QualitySection(Section):
    """What the model is judged by: lm-eval tasks (names or task files), a text, or both.

    Attributes:
        final_tasks: further tasks, of finalists alone: having the model generate is too slow for each layer and plan.
        retrieval: distances in tokens over which finalists must find again what the text said.
    """

    tasks: Annotated[tuple[Name, ...], AfterValidator(unique_entries)] = ()
    final_tasks: Annotated[tuple[Name, ...], AfterValidator(unique_entries)] = ()
    limit: Count | None = None
    num_fewshot: CountOrZero | None = None
    text: Name | None = None
    sequences: Count = 64
    sequence_tokens: Annotated[int, BeforeValidator(as_number), Field(ge=2)] | None = None
    retrieval: Annotated[tuple[Count, ...], AfterValidator(unique_entries)] = ()
    batch_size: Count = 8

    def spec(self, context_tokens: int | None) -> QualitySpec:
        """The section as `layerboost.evaluation.evaluate` takes it, for a model of so long a context."""
        from layerboost.evaluation.scores import QualitySpec

        return QualitySpec(
            tasks=(*self.tasks, *self.final_tasks),
            limit=self.limit,
            text=self.text,
            n_sequences=self.sequences,
            sequence_tokens=resolve_sequence_tokens(self.sequence_tokens, context_tokens),
            batch_size=self.batch_size,
            num_fewshot=self.num_fewshot,
            retrieval=self.retrieval,
        )

    @model_validator(mode="after")
    def _something_to_judge_by(self) -> QualitySection:
        if not self.tasks and self.text is None:
            raise InputError("quality", None, "give quality.tasks, quality.text, or both")
        if twice := [task for task in self.final_tasks if task in self.tasks]:
            raise InputError("quality.final_tasks", twice[0], "is in quality.tasks too; keep one")
        if self.retrieval and self.text is None:
            raise InputError("quality.retrieval", list(self.retrieval), "is asked over quality.text; give one")
        return self


class AdaptiveSection(Section):
    """Items only where they matter: tiers by their sizes (layers) or by thresholds, and how often they may be wrong."""

    removed: CountOrZero | None = None
    middle: CountOrZero | None = None
    remove_below: Number | None = None
    keep_above: Number | None = None
    error: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    first_items: Annotated[int, BeforeValidator(as_number), Field(ge=2)] = 16
    seed: CountOrZero = 0

    @model_validator(mode="after")
    def _one_rule(self) -> AdaptiveSection:
        sizes, thresholds = (self.removed, self.middle), (self.remove_below, self.keep_above)
        given = [None not in pair for pair in (sizes, thresholds)]
        if sum(given) != 1 or any(value is not None for value in (thresholds if given[0] else sizes)):
            raise InputError(
                "sensitivity.adaptive",
                self.model_dump(exclude_none=True),
                "give either removed and middle (numbers of layers) or remove_below and keep_above (drops)",
            )
        if self.remove_below is not None and self.keep_above is not None and self.remove_below > self.keep_above:
            raise InputError(
                "sensitivity.adaptive.remove_below",
                self.remove_below,
                f"is above keep_above {self.keep_above}; layers below the first are removed, those at or above the "
                "second kept, so lower the first or raise the second",
            )
        return self


class SensitivitySection(Section):
    """Which single-layer changes are scored, by what, and what else their ranking is compared with.

    Attributes:
        score: what the plans are made from. By default `nll` where there is a text, else `margin`.
        compare: measure every score that the quality allows, not only the chosen one.
        texts: further texts to rank the layers by.
        context_tokens: further lengths of the sequences of the quality's text to rank the layers by.
        shares: how many parts the items are cut into: what a lost worker can lose, and how many can work at once.
            `auto` goes by the tokens that the items hold, not by the workers (`layerboost.evaluation.shares`).
        adaptive: score layers by the chosen score until their tier is certain, instead of on all items.
    """

    treatments: Annotated[
        tuple[Literal["none", "window", "linear_window"], ...], Field(min_length=1), AfterValidator(unique_entries)
    ] = ("none",)
    score: Literal["benchmark", "margin", "nll", "kl", "cosine"] = "nll"
    compare: bool = True
    texts: Annotated[tuple[Name, ...], AfterValidator(unique_entries)] = ()
    context_tokens: Annotated[
        tuple[Annotated[int, BeforeValidator(as_number), Field(ge=2)], ...], AfterValidator(unique_entries)
    ] = ()
    shares: AutoCount = "auto"
    adaptive: AdaptiveSection | None = None


class RefineSection(Section):
    """Plans with other layers treated but the same speed: how they are found, and how many are evaluated in all."""

    method: Literal["greedy", "pairwise"] = "greedy"
    plans: Count = 48


class SearchSection(Section):
    """The search for plans; `plans` are tried in any case, and `refine` improves those to be healed.

    Attributes:
        method: `thresholds` moves the paper's two thresholds (by `sampler`), `knapsack` takes the exact optimum of the
            single layers' costs at each speed, `evolution` goes on from these over whole plans, `swaps` improves their
            front by exchanging layers.
        trials: how many plans (of `thresholds`: pairs of thresholds) are tried.
        objective: what is to be kept: the `score` that layers are judged by, or the `quality` of pareto.csv.
        speed: `measured` fits the speed of all plans to the measured speed of `speed_plans` of them; `bytes` predicts
            it from the bytes that a decode step reads, the same on every machine.
    """

    method: Literal["thresholds", "knapsack", "evolution", "swaps"] = "thresholds"
    trials: CountOrZero = 40
    objective: Literal["score", "quality"] = "score"
    speed: Literal["measured", "bytes"] = "measured"
    speed_plans: Count = 8
    middle: Literal["linear_window", "window"] = "linear_window"
    window: Count = 64
    seed: CountOrZero = 0
    sampler: Literal["tpe", "nsga2"] = "tpe"
    remove_below: Range | None = None
    keep_above: Range | None = None
    plans: Annotated[tuple[PlanLetters, ...], AfterValidator(unique_entries)] = ()
    refine: RefineSection | None = None

    @model_validator(mode="after")
    def _thresholds_do_not_cross(self) -> SearchSection:
        if self.remove_below and self.keep_above and self.remove_below[0] > self.keep_above[1]:
            raise InputError(
                "search.remove_below",
                list(self.remove_below),
                f"lies wholly above search.keep_above {list(self.keep_above)}; layers below the first are removed, "
                "those at or above the second kept, so lower the first or raise the second",
            )
        return self


class LengthsSection(Section):
    """Prompt lengths over which decode latency and memory are measured, beside the serving conditions."""

    prompt_tokens: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique_entries)]
    concurrency: Count = 16


class ThroughputSection(Section):
    """The serving conditions under which decoding is timed.

    Attributes:
        engine: `transformers` times one batch, decoding apart from prefill. `vllm` serves each model and has vLLM's own
            client ask it, all in; a server takes about a minute to start, so `search.speed: bytes` is the cheap way
            to search with it, and `measured` starts one for each of `search.speed_plans`.
        environment: folder of the virtual environment that has vllm, or its Python; by default the one that runs.
            Where it is changes no result.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    environment: Annotated[Name, AfterValidator(environment_folder)] | None = None
    concurrency: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique_entries)] = (1, 8)
    prompt_tokens: Count = 128
    new_tokens: Annotated[int, BeforeValidator(as_number), Field(ge=2)] = 32
    repeats: Annotated[int, BeforeValidator(as_number), Field(ge=3)] = 3
    lengths: LengthsSection | None = None

    @model_validator(mode="after")
    def _environment_of_vllm(self) -> ThroughputSection:
        if self.environment is not None and self.engine != "vllm":
            raise InputError(
                "throughput.environment", self.environment, "is where vllm is; set throughput.engine: vllm, or leave it"
            )
        return self


def _ray_labels(labels: dict[str, str]) -> dict[str, str]:
    """Names and values as Ray takes them; its operators (`!`, `in(...)`) are not among them."""
    for name, value in labels.items():
        is_name, is_value = re.fullmatch(r"([\w.-]+/)?[\w.-]+", name), re.fullmatch(r"\w([\w.-]*\w)?", value)
        if not (is_name and is_value):
            raise ValueError(f"'{name}: {value}' must be a name and a value of letters, digits, - _ and .")
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_ray_labels)]


class LabelsSection(Section):
    """Ray's labels of the nodes that a kind of work goes to; any node where none are given.

    Attributes:
        evaluate: what judges plans and writes text: sweeps, the search, finalists.
        heal: what trains.
        time: throughput and latency.
    """

    evaluate: NodeLabels = Field(default_factory=dict)
    heal: NodeLabels = Field(default_factory=dict)
    time: NodeLabels = Field(default_factory=dict)


class PlacementSection(Section):
    """Where the work runs. Changes no number and no identity.

    `activations_gib` bounds what a pass holds beside the weights; `auto` takes half of a GPU's free memory, 1 GiB of a
    CPU's. A unit of work, or a step of healing, that takes longer than `unit_timeout_s` is taken for hung and tried
    again; `auto` takes twenty times what the run's estimate expects of it, ten minutes at least. `labels` choose among
    the nodes of a cluster; without one they say nothing.
    """

    workers: AutoCount = "auto"
    cpus_per_worker: Annotated[
        float | Literal["auto"], BeforeValidator(auto_or(float, 0, "a number of CPUs of at least 0"))
    ] = "auto"
    gpus_per_worker: Annotated[
        float | Literal["auto"],
        BeforeValidator(auto_or(float, 0, "a number of GPUs of at least 0")),
        AfterValidator(_one_gpu_at_most),
    ] = "auto"
    healing_workers: AutoCount = "auto"
    activations_gib: Annotated[
        float | Literal["auto"], BeforeValidator(auto_or(float, 0.001, "a number of GiB of at least 0.001"))
    ] = "auto"
    unit_timeout_s: Annotated[
        float | Literal["auto"], BeforeValidator(auto_or(float, 1, "a number of seconds of at least 1"))
    ] = "auto"
    labels: LabelsSection = LabelsSection()
