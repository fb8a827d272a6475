"""Defines the sections of a recipe, except `healing` and `constraints`: their fields, defaults and allowed values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from layerboost.evaluation.scores import SCORES
from layerboost.plan import TREATMENTS, letters_help
from layerboost.search.methods import METHODS
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import (
    AUTO,
    AutoCount,
    AutoOr,
    Count,
    CountOrZero,
    Name,
    Number,
    OneOf,
    Section,
    as_number,
    resolve_sequence_tokens,
    unique_entries,
)
from tasks.engines import ENGINES, TRANSFORMERS

if TYPE_CHECKING:
    from layerboost.evaluation.scores import QualitySpec

DEVICE_PATTERN = r"auto|cpu|mps|(cuda|xpu)(:\d+)?"


def _ordered_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("must be [low, high] with low <= high; swap the two")
    return value


def _one_gpu_at_most(value: Any) -> Any:
    """Refuses more than one GPU per worker, because a second one would stand idle."""
    if value != AUTO and value > 1:
        raise ValueError(
            "must be 1 or a fraction of it, since a worker computes on one GPU; "
            "for a model that has no room in healing set healing.zero_stage: 3 and more healing_workers"
        )
    return value


def _plan_letters(value: str) -> str:
    value = value.strip().upper()
    if not value or not set(value) <= {entry.letter for entry in TREATMENTS}:
        raise ValueError(f"must be letters {letters_help()}, one for each layer")
    return value


def environment_folder(value: str) -> str:
    """Returns the folder of a virtual environment, given the folder or its Python.

    That Python is a link, which is not followed because its target lies outside the environment.
    """
    path = Path(value)
    return str(path.parent.parent) if path.parent.name == "bin" and path.name.startswith("python") else value


def ablations() -> list[str]:
    """Returns the treatments whose cost in a single layer can be measured: all that change it, the deepest first."""
    changing = (entry for entry in TREATMENTS if entry.depth > 0)
    return [entry.name for entry in sorted(changing, key=lambda entry: -entry.depth)]


def middles() -> list[str]:
    """Returns the treatments that may be used between removal and softmax."""
    return [entry.name for entry in TREATMENTS if entry.is_middle]


Range = Annotated[tuple[Number, Number], AfterValidator(_ordered_range)]
PlanLetters = Annotated[str, AfterValidator(_plan_letters)]


class ModelSection(Section):
    """Names the pretrained model.

    Attributes:
        path: a hub name, a local folder with safetensors weights, or a GGUF file (which needs the extra `gguf`).
        revision: a branch, tag or commit of a hub model.
        dtype: the type of the weights in memory; `auto` keeps the type that they were saved in.
        trust_remote_code: run the code that comes with the model. Leave it off unless you trust its author.
        device: `auto`, `cpu`, `mps`, `xpu`, `cuda` or `cuda:N`; `auto` takes a worker's GPU if it has one.
    """

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
    """Says what the model is judged by: lm-eval tasks, a text, or both.

    Attributes:
        tasks: names of lm-eval tasks, or paths of task files.
        final_tasks: further tasks for the finalists only. Tasks that let the model generate text belong here, because
            they are too slow to ask for every layer and plan.
        limit: number of items of each task, counted from its first; without a value all items are used.
        num_fewshot: number of examples in each prompt; without a value each task uses its own number.
        text: a local `.txt`, `.jsonl` or `.parquet` file or a hub dataset, for likelihood and divergence.
        sequences: number of sequences of the text that are read.
        sequence_tokens: tokens in a sequence; without a value 512, or the model's context if that is shorter.
        retrieval: distances in tokens over which finalists must recall what the text said. It needs `text`.
        batch_size: sequences or requests in one forward pass.
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
        """Returns the section as `layerboost.evaluation.evaluate` takes it, for a model with this context length."""
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
    """Scores layers only until their tier is certain, instead of on all items.

    Tiers are given by their sizes (`removed` and `middle`) or by thresholds (`remove_below` and `keep_above`).

    Attributes:
        removed: number of the least sensitive layers, which lose attention.
        middle: number of the next layers, which get the middle treatment.
        remove_below: layers that drop less than this lose attention.
        keep_above: layers that drop at least this much keep softmax attention.
        error: bound on the probability that any layer gets a different tier than all items would give it.
        first_items: number of items that every layer is scored on first.
        seed: seed for the order of the items.
    """

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
    """Says which single-layer changes are scored, by which score, and what else their ranking is compared with.

    Attributes:
        treatments: the treatments that each layer is tried with, one layer at a time. `none` must be among them.
        score: the score that plans are made from. Without a value and without a text, it is `margin`.
        compare: measure every score that the quality section allows, of single layers and of searched plans, and not
            only the chosen one. It tells whether rankings agree, and may take several times as long.
        texts: further texts to rank the layers by.
        context_tokens: further sequence lengths of the quality's text to rank the layers by.
        shares: number of parts into which the items are cut. A lost worker loses at most one part, and at most this
            many workers can help. `auto` depends on the tokens of the items, not on the workers
            (`layerboost.evaluation.shares`).
        stable_at: read no more of the text once every treatment's ranking of the layers is this reliable: the
            estimated rank correlation with the ranking by as many other sequences
            (`layerboost.sensitivity.ranking.reliability`). Without a value all sequences are read.
        adaptive: score layers by the chosen score until their tier is certain.
    """

    treatments: Annotated[
        tuple[Annotated[str, OneOf(ablations)], ...], Field(min_length=1), AfterValidator(unique_entries)
    ] = ("none",)
    score: Annotated[str, OneOf(SCORES.names)] = "nll"
    compare: bool = False
    texts: Annotated[tuple[Name, ...], AfterValidator(unique_entries)] = ()
    context_tokens: Annotated[
        tuple[Annotated[int, BeforeValidator(as_number), Field(ge=2)], ...], AfterValidator(unique_entries)
    ] = ()
    shares: AutoCount = "auto"
    stable_at: Annotated[Number, Field(gt=0, lt=1)] | None = None
    adaptive: AdaptiveSection | None = None


class RefineSection(Section):
    """Looks for better plans of the same speed, which treat other layers in equal numbers.

    Attributes:
        method: `greedy` evaluates the most promising swaps of two layers; `pairwise` measures pairs of layers first and
            searches a quadratic model.
        plans: total number of plans that are evaluated.
    """

    method: Literal["greedy", "pairwise"] = "greedy"
    plans: Count = 48


class RaceSection(Section):
    """Has the search judge its plans on the first items alone, and only those that may be healed on all of them.

    Attributes:
        first: share of the text's sequences, and of each benchmark's `limit`, that are the first items; at least 4
            sequences and 16 documents. Benchmarks without a limit are not cut.
        confidence: a plan drops out if another one that is at least as fast is better with this confidence.
        leaders: number of plans that are judged on all items, for each candidate; as many as halving tries at least.
    """

    first: Annotated[Number, Field(gt=0, lt=1)] = 0.25
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95
    leaders: Count = 4


class AffineSection(Section):
    """Says what the maps of affine layers are fitted on, before a search and again for each plan that is healed.

    Attributes:
        text: a text file or a hub dataset; without a value the first plain text that is healed on.
        tokens: number of its tokens; a quarter of them judges the maps that are fitted to the rest.
        rank: `full`, a number, or `auto` for the smallest rank whose error is within 1 % of the least.
    """

    text: str | None = None
    tokens: Count = 16_384
    rank: Literal["full", "auto"] | Count = "full"


LEAST_SEQUENCES, LEAST_DOCUMENTS = 4, 16
"""Least numbers of items with which a race begins; fewer say little of the differences between plans."""


class SearchSection(Section):
    """Configures the search for plans.

    Attributes:
        method: `thresholds` moves the paper's two thresholds (by `sampler`), `knapsack` takes the exact optimum of the
            single layers' costs at each speed, `evolution` continues from these plans by varying whole plans, `swaps`
            improves their front by exchanging layers.
        trials: number of plans that are tried; with `thresholds`, number of pairs of thresholds.
        objective: the value that the search keeps high: the `score` that layers are judged by, or the `quality` of
            pareto.csv. With the cosine score it is `quality`.
        speed: `measured` fits the speed of all plans to the measured speed of `speed_plans` of them; `bytes` predicts
            it from the bytes that a decode step reads, which are the same on every machine.
        speed_plans: number of plans that are timed before a search by measured speed.
        middle: the treatment of layers between the two thresholds.
        removed: the treatment of layers below the lower threshold: `none`, the paper's, or `affine`.
        window: the window of windowed layers, in tokens.
        sinks: how many of the window's tokens are the first ones of the sequence, which stay visible; the others are
            the newest ones. Language models that were trained on long texts lose far less with 1 to 4 of them.
        seed: seed of the search.
        sampler: the sampler that moves the thresholds, Optuna's TPE or NSGA-II.
        remove_below: range `[low, high]` of the lower threshold; without a value it spans all drops and a margin around
            them.
        keep_above: range `[low, high]` of the upper threshold; without a value it is chosen in the same way.
        plans: plans that are always tried, with one letter per layer: S softmax, L linear_window, W window, N none,
            A affine.
        affine: what the maps of affine layers are fitted on.
        refine: improve the plans that would be healed; without a value this is off.
        race: judge only the most promising plans on all items; without a value all plans are.
    """

    method: Annotated[str, OneOf(METHODS.names)] = "thresholds"
    trials: CountOrZero = 40
    objective: Literal["score", "quality"] = "score"
    speed: Literal["measured", "bytes"] = "measured"
    speed_plans: Count = 8
    middle: Annotated[str, OneOf(middles)] = "linear_window"
    removed: Literal["none", "affine"] = "none"
    window: Count = 64
    sinks: CountOrZero = 0
    seed: CountOrZero = 0
    sampler: Literal["tpe", "nsga2"] = "tpe"
    remove_below: Range | None = None
    keep_above: Range | None = None
    plans: Annotated[tuple[PlanLetters, ...], AfterValidator(unique_entries)] = ()
    affine: AffineSection = AffineSection()
    refine: RefineSection | None = None
    race: RaceSection | None = None

    @model_validator(mode="after")
    def _sinks_leave_room_in_the_window(self) -> SearchSection:
        if self.sinks >= self.window:
            raise InputError(
                "search.sinks",
                self.sinks,
                f"fills the window of {self.window}, which needs room for the newest token; give at most "
                f"{self.window - 1}, or a larger search.window",
            )
        return self

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
    """Lists prompt lengths at which latency and memory of decoding are measured, besides the serving conditions.

    Attributes:
        prompt_tokens: the lengths of the prompts.
        concurrency: number of requests that are decoded at once.
    """

    prompt_tokens: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique_entries)]
    concurrency: Count = 16


class ThroughputSection(Section):
    """Sets the serving conditions under which decoding is timed.

    Attributes:
        engine: `transformers` times one batch, and times decoding separately from prefill. `vllm` serves each model,
            and vLLM's own client sends the requests. A server takes about a minute to start, so `search.speed: bytes`
            is the cheap way to search with it; `measured` starts one server for each of `search.speed_plans`.
        environment: folder of the virtual environment that has vllm, or its Python; without a value the running one is
            used. Its location changes no result.
        concurrency: numbers of requests that are decoded at once, one serving condition for each number.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that are decoded after each prompt.
        repeats: number of times that each condition is timed.
        lengths: measure latency and memory over prompt lengths too; without a value this is off.
    """

    engine: Annotated[str, OneOf(ENGINES.names)] = TRANSFORMERS
    environment: Annotated[Name, AfterValidator(environment_folder)] | None = None
    concurrency: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique_entries)] = (1, 8)
    prompt_tokens: Count = 128
    new_tokens: Annotated[int, BeforeValidator(as_number), Field(ge=2)] = 32
    repeats: Annotated[int, BeforeValidator(as_number), Field(ge=3)] = 3
    lengths: LengthsSection | None = None

    @model_validator(mode="after")
    def _environment_of_vllm(self) -> ThroughputSection:
        if self.environment is not None and ENGINES[self.engine].find_environment is None:
            raise InputError(
                "throughput.environment", self.environment, "is for vllm only; set throughput.engine: vllm, or leave it"
            )
        return self


def _ray_labels(labels: dict[str, str]) -> dict[str, str]:
    """Checks that names and values are plain Ray labels; Ray's operators (`!`, `in(...)`) are refused."""
    for name, value in labels.items():
        is_name, is_value = re.fullmatch(r"([\w.-]+/)?[\w.-]+", name), re.fullmatch(r"\w([\w.-]*\w)?", value)
        if not (is_name and is_value):
            raise ValueError(f"'{name}: {value}' must be a name and a value of letters, digits, - _ and .")
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_ray_labels)]


class LabelsSection(Section):
    """Selects the nodes for each kind of work by Ray labels; without labels any node is used.

    Attributes:
        evaluate: labels for work that judges plans and writes text: sweeps, the search, finalists.
        heal: labels for training.
        time: labels for throughput and latency.
    """

    evaluate: NodeLabels = Field(default_factory=dict)
    heal: NodeLabels = Field(default_factory=dict)
    time: NodeLabels = Field(default_factory=dict)


class PlacementSection(Section):
    """Says where the work runs. It changes speeds, but no plan's quality, and no identity but that of timings.

    Attributes:
        workers: number of workers that judge plans; `auto` takes as many as fit on the cluster.
        cpus_per_worker: CPUs of each worker; `auto` takes one beside a GPU, else it divides the CPUs of a node.
        gpus_per_worker: GPUs of each worker, at most 1; `auto` takes one if a node has one.
        healing_workers: number of workers that heal one plan; `auto` takes every GPU that gets a sequence in each step,
            or one worker with a node's CPUs.
        activations_gib: bound on the memory of a pass besides the weights, in GiB; `auto` takes half of a GPU's free
            memory, or 1 GiB on a CPU.
        unit_timeout_s: seconds after which a unit of work, or a step of healing, counts as hung and is tried again;
            `auto` takes twenty times the time in the run's estimate, and at least ten minutes.
        labels: labels that choose among the nodes of a cluster. Without a cluster they have no effect.
    """

    workers: AutoCount = "auto"
    cpus_per_worker: Annotated[
        float | Literal["auto"], BeforeValidator(AutoOr(float, 0, "a number of CPUs of at least 0"))
    ] = "auto"
    gpus_per_worker: Annotated[
        float | Literal["auto"],
        BeforeValidator(AutoOr(float, 0, "a number of GPUs of at least 0")),
        AfterValidator(_one_gpu_at_most),
    ] = "auto"
    healing_workers: AutoCount = "auto"
    activations_gib: Annotated[
        float | Literal["auto"], BeforeValidator(AutoOr(float, 0.001, "a number of GiB of at least 0.001"))
    ] = "auto"
    unit_timeout_s: Annotated[
        float | Literal["auto"], BeforeValidator(AutoOr(float, 1, "a number of seconds of at least 1"))
    ] = "auto"
    labels: LabelsSection = LabelsSection()
