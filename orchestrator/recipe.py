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
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from orchestrator.constraints import ConstraintsSection
from orchestrator.healing_recipe import HalvingSection, HealingSection, HealingText
from orchestrator.recipe_fields import InputError, Section, nearest, resolve_sequence_tokens
from orchestrator.recipe_sections import (
    TASK_SCORES,
    TEXT_SCORES,
    TREATMENT_OF_LETTER,
    AdaptiveSection,
    LabelsSection,
    LengthsSection,
    ModelSection,
    PlacementSection,
    QualitySection,
    RefineSection,
    SearchSection,
    SensitivitySection,
    ThroughputSection,
)

__all__ = [
    "InputError",
    "NamedPath",
    "Recipe",
    "load_recipe",
    "looks_local",
    "named_paths",
    "nearest",
    "recipe_from_dict",
    "resolve_sequence_tokens",
]


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
            needed = {self.search.middle, *(TREATMENT_OF_LETTER[x] for plan in self.search.plans for x in plan)}
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
        ("placement", "labels"): LabelsSection,
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
