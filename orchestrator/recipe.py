"""What to run: the recipe, read once at the door, checked, and frozen after.

A recipe is a YAML file of eight sections. Everything in it changes results, except `placement`, which says where the
work runs, and what in `healing` only memory depends on; neither is part of an identity. Every mistake becomes one
`InputError` with field, value and remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from orchestrator.constraints import ConstraintsSection
from orchestrator.healing_recipe import HalvingSection, HealingSection, HealingText
from orchestrator.recipe_fields import (
    AUTO,
    AutoCount,
    Count,
    CountOrZero,
    InputError,
    Name,
    Number,
    Section,
    as_number,
    auto_or,
    nearest,
    resolve_sequence_tokens,
    unique_entries,
)

if TYPE_CHECKING:
    from layerboost.scores import QualitySpec

__all__ = [
    "DEVICE_PATTERN",
    "TEXT_SCORES",
    "HealingSection",
    "InputError",
    "ModelSection",
    "NamedPath",
    "QualitySection",
    "Recipe",
    "load_recipe",
    "looks_local",
    "named_paths",
    "nearest",
    "recipe_from_dict",
    "resolve_sequence_tokens",
]

MIDDLE_TREATMENTS = ("linear_window", "window")
TEXT_SCORES = ("nll", "kl", "cosine")
TASK_SCORES = ("benchmark", "margin")
DEVICE_PATTERN = r"auto|cpu|mps|(cuda|xpu)(:\d+)?"
_TREATMENT_OF_LETTER = {"S": "softmax", "L": "linear_window", "W": "window", "N": "none"}


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
        """The section as `layerboost.evaluation` takes it, for a model of so long a context."""
        from layerboost.scores import QualitySpec

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
            `auto` goes by the tokens that the items hold (`tasks.sweeping.auto_shares`), not by the workers.
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


class Recipe(Section):
    """A whole recipe, checked and frozen. `load_recipe` reads one from a file."""

    model: ModelSection
    quality: QualitySection
    sensitivity: SensitivitySection = SensitivitySection()
    search: SearchSection = SearchSection()
    constraints: ConstraintsSection = ConstraintsSection()
    healing: HealingSection = HealingSection()
    throughput: ThroughputSection = ThroughputSection()
    placement: PlacementSection = PlacementSection()

    @model_validator(mode="before")
    @classmethod
    def _objective_from_score(cls, data: Any) -> Any:
        """Plans have no cosine score, so the search has to go by the quality."""
        if not isinstance(data, dict):
            return data
        sensitivity, search = data.get("sensitivity") or {}, data.get("search") or {}
        is_cosine = isinstance(sensitivity, dict) and sensitivity.get("score") == "cosine"
        if is_cosine and isinstance(search, dict) and search.get("objective") is None:
            return {**data, "search": {**search, "objective": "quality"}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _score_from_quality(cls, data: Any) -> Any:
        """Without a text the default score cannot be the text's likelihood."""
        if not isinstance(data, dict):
            return data
        quality, sensitivity = data.get("quality"), data.get("sensitivity") or {}
        has_no_text = isinstance(quality, dict) and quality.get("text") is None
        if has_no_text and isinstance(sensitivity, dict) and sensitivity.get("score") is None:
            return {**data, "sensitivity": {**sensitivity, "score": "margin"}}
        return data

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        score = self.sensitivity.score
        if score in TEXT_SCORES and self.quality.text is None:
            raise InputError("sensitivity.score", score, "needs quality.text; give one, or use benchmark or margin")
        if score in TASK_SCORES and not self.quality.tasks:
            raise InputError("sensitivity.score", score, "needs quality.tasks; give some, or use nll, kl or cosine")
        if "none" not in self.sensitivity.treatments:
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "lacks none; the search sorts layers by what removal costs, so add it",
            )
        if score == "cosine" and self.sensitivity.treatments != ("none",):
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "the cosine score only says what removal costs; use [none], or the score nll or kl",
            )
        if score == "cosine" and self.sensitivity.adaptive is not None:
            raise InputError(
                "sensitivity.adaptive", score, "the cosine score needs no ablation to save; leave adaptive out"
            )
        if score == "cosine" and self.search.objective == "score":
            raise InputError("search.objective", "score", "plans have no cosine score; use quality")
        if self.search.refine is not None:
            if score == "cosine":
                raise InputError("search.refine", score, "plans have no cosine score; choose another sensitivity.score")
            if self.sensitivity.adaptive is not None:
                raise InputError(
                    "search.refine", "adaptive", "needs all layers on the same items; leave one of them out"
                )
            needed = {self.search.middle, *(_TREATMENT_OF_LETTER[x] for plan in self.search.plans for x in plan)}
            if lacking := sorted(needed - {"softmax", *self.sensitivity.treatments}):
                raise InputError(
                    "sensitivity.treatments",
                    list(self.sensitivity.treatments),
                    f"lacks {', '.join(lacking)}, whose costs search.refine needs; add it",
                )
        if self.sensitivity.adaptive is not None and self.sensitivity.treatments != ("none",):
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "adaptive sorts layers by what removal costs; use [none], or leave sensitivity.adaptive out",
            )
        if self.sensitivity.context_tokens and self.quality.text is None:
            raise InputError(
                "sensitivity.context_tokens", list(self.sensitivity.context_tokens), "needs quality.text; give one"
            )
        for name, source in self.healing.named_sources():
            # The quality text is read from the split that a hub dataset is read from when none is named.
            if self.healing.tokens > 0 and (source.path, source.split) == (self.quality.text, "train"):
                raise InputError(
                    name,
                    source.path,
                    "is what quality.text judges by, so the score would be of text seen; give another text or split",
                )
        if self.healing.tokens and "cosine" in self.healing.baselines and self.quality.text is None:
            raise InputError(
                "healing.baselines",
                "cosine",
                "ranks layers over quality.text; give one, or leave cosine out",
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that can change a result, as plain JSON values: all but where the work runs."""
        return self.model_dump(mode="json", exclude={"placement": True, "throughput": {"environment"}})

    def resolved_yaml(self) -> str:
        """The recipe with every default written out; loads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies `section.field=value` overrides, and resolves its local paths.

    Relative paths are looked for beside the recipe first, then in the current directory.

    Raises:
        InputError: for anything wrong with the file, an override or a value.
    """
    return recipe_from_dict(_read_overridden(path, overrides), folder=Path(path).resolve().parent)


@dataclass(frozen=True)
class NamedPath:
    """A field of a recipe that may name a local file or folder.

    Attributes:
        field: as errors call it.
        written: what the recipe or an override says.
        found: the file or folder of this machine that it means, links not followed; None where there is none.
    """

    field: str
    written: str
    found: Path | None


def named_paths(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[NamedPath, ...]:
    """What a recipe that `load_recipe` accepts names of files, folders and hub names, in the recipe's order."""
    folder = Path(path).resolve().parent
    data = Recipe.model_validate(_read_overridden(path, overrides)).model_dump(mode="json")
    named = []
    for field, place, key in _path_places(data):
        found = _find_local(place[key], folder)
        named.append(NamedPath(field, place[key], None if found is None else Path(os.path.abspath(found))))
    return tuple(named)


def _read_overridden(path: str | os.PathLike[str], overrides: Sequence[str]) -> dict[str, Any]:
    data = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(data, override)
    return data


def recipe_from_dict(data: dict[str, Any], *, folder: Path | None = None) -> Recipe:
    """Checks a recipe given as a mapping; `folder` is where its relative paths are looked for first.

    Raises:
        InputError: for the first thing that is wrong.
    """
    try:
        recipe = Recipe.model_validate(data)
        return Recipe.model_validate(_with_local_paths(recipe.model_dump(mode="json"), folder or Path.cwd()))
    except ValidationError as error:
        raise _input_error(error) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} stands twice; keep one", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings) or "give the path of a YAML recipe"
        raise InputError("recipe", path, f"no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("recipe", path, f"cannot be read ({error}); give the path of a YAML recipe") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else path
        raise InputError("recipe", where, f"not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise InputError("recipe", path, f"must hold the sections {', '.join(Recipe.model_fields)}")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, field = name.strip().partition(".")
    if not equals or not dot or not section or not field or "." in field:
        raise InputError("--set", override, "write it as section.field=value, for example search.trials=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {name.strip()}", text, "not a YAML value; quote it") from None
    values = data.setdefault(section, {})
    if values is None:
        values = data[section] = {}
    if isinstance(values, dict):
        values[field] = value


def _with_local_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    for _, place, key in _path_places(data):
        place[key] = _local_path(place[key], folder)
    return data


def _path_places(data: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every value that may be a local path: what errors call it, what holds it, and under which key."""
    healing = data["healing"]
    places: list[tuple[str, Any, Any]] = [
        ("model.path", data["model"], "path"),
        ("quality.text", data["quality"], "text"),
        ("healing.teacher", healing, "teacher"),
        ("throughput.environment", data["throughput"], "environment"),
        *((f"healing.text[{index}].path", text, "path") for index, text in enumerate(healing["text"])),
    ]
    for section, name in (("sensitivity", "texts"), ("quality", "tasks"), ("quality", "final_tasks")):
        entries = data[section][name]
        for index, entry in enumerate(entries):
            # A bare task name is never a path, whatever happens to lie in the current directory.
            if name == "texts" or entry.endswith((".yaml", ".yml")) or looks_local(entry):
                places.append((f"{section}.{name}[{index}]", entries, index))
    yield from ((field, place, key) for field, place, key in places if place[key] is not None)


def looks_local(name: str) -> bool:
    """True if `name` can only be a path of this machine, so never a hub name."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def _local_path(name: str, folder: Path) -> str:
    if (found := _find_local(name, folder)) is not None:
        return str(found.resolve())
    return os.path.normpath(folder / Path(name).expanduser()) if looks_local(name) else name


def _find_local(name: str, folder: Path) -> Path | None:
    if "://" in name:
        return None
    expanded = Path(name).expanduser()
    return next((path for path in (folder / expanded, Path.cwd() / expanded) if path.exists()), None)


def _input_error(error: ValidationError) -> InputError:
    """The first problem that pydantic found, as field, value and remedy."""
    problems = error.errors()
    # A misspelt key often makes another one missing: name the misspelling, it is the cause.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    location = tuple(part for part in problem["loc"] if isinstance(part, int) or part.isidentifier())
    field = _dotted(location)
    if problem["type"] == "extra_forbidden":
        return InputError(field, problem["input"], _unknown_key(problem["loc"]))
    if problem["type"] == "missing":
        missing_item = bool(problem["loc"]) and isinstance(problem["loc"][-1], int)
        return InputError(field, None, "must be [low, high]" if missing_item else "needed in every recipe")
    if problem["type"] == "model_type":
        section = _section_class(location)
        return InputError(
            field, problem["input"], f"must be a mapping with the fields {', '.join(section.model_fields)}"
        )
    remedy = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "tuple_type":
        remedy = f"must be a list, for example [{problem['input']}]"
    if problem["type"] == "too_long":
        remedy = f"must have {problem['ctx']['max_length']} entries"
    if problem["type"] == "too_short":
        remedy = f"must have at least {problem['ctx']['min_length']} entry"
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        expected = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        remedy = f"must be one of {', '.join(expected)}; {nearest(problem['input'], expected)}".rstrip("; ")
    return InputError(field, problem["input"], remedy)


def _dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _section_class(location: Sequence[int | str]) -> type[BaseModel]:
    if not location:
        return Recipe
    section = Recipe.model_fields[str(location[0])].annotation
    nested: dict[tuple[int | str, ...], type[BaseModel]] = {
        ("sensitivity", "adaptive"): AdaptiveSection,
        ("search", "refine"): RefineSection,
        ("throughput", "lengths"): LengthsSection,
        ("healing", "halving"): HalvingSection,
        ("healing", "text"): HealingText,
    }
    if tuple(location[:2]) in nested:
        return nested[tuple(location[:2])]
    return cast("type[BaseModel]", section)


def _unknown_key(location: Sequence[int | str]) -> str:
    key = str(location[-1])
    known = list(_section_class(location[:-1]).model_fields)
    elsewhere = [f"{name}.{key}" for name in Recipe.model_fields if key in _section_class((name,)).model_fields]
    if elsewhere:
        return f"unknown key here; did you mean {' or '.join(elsewhere)}?"
    if hint := nearest(key, known):
        return f"unknown key; {hint}"
    return f"unknown key; known are {', '.join(known)}"
