"""Reads a recipe from YAML, applies overrides, resolves its paths and reports errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.recipe.errors import InputError, nearest
from orchestrator.recipe.healing import HalvingSection, HealingText
from orchestrator.recipe.recipe import Recipe
from orchestrator.recipe.sections import (
    AdaptiveSection,
    AffineSection,
    LabelsSection,
    LengthsSection,
    RaceSection,
    RefineSection,
)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies `section.field=value` overrides, and resolves its local paths.

    Relative paths are looked up in the recipe's folder first, then in the current directory.

    Raises:
        InputError: the file, an override or a value is wrong.
    """
    return recipe_from_dict(_read_overridden(path, overrides), folder=Path(path).resolve().parent)


@dataclass(frozen=True)
class NamedPath:
    """Describes a field of a recipe that may name a local file or folder.

    Attributes:
        field: the name of the field in errors.
        written: the text in the recipe or in an override.
        found: the local file or folder that it means, without following links; None where there is none.
    """

    field: str
    written: str
    found: Path | None


def named_paths(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[NamedPath, ...]:
    """Returns the files, folders and hub names of a recipe that `load_recipe` accepts, in the recipe's order."""
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
    """Checks a recipe that is given as a mapping; its relative paths are looked up in `folder` first.

    Raises:
        InputError: a value is wrong; it names the first fault.
    """
    try:
        recipe = Recipe.model_validate(data)
        return Recipe.model_validate(_with_local_paths(recipe.model_dump(mode="json"), folder or Path.cwd()))
    except ValidationError as error:
        raise _input_error(error) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, because YAML would silently keep the last one."""

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
    """Yields every value that may be a local path, as (name in errors, its container, its key there)."""
    healing = data["healing"]
    places: list[tuple[str, Any, Any]] = [
        ("model.path", data["model"], "path"),
        ("quality.text", data["quality"], "text"),
        ("search.affine.text", data["search"]["affine"], "text"),
        ("healing.teacher", healing, "teacher"),
        ("throughput.environment", data["throughput"], "environment"),
        *((f"healing.text[{index}].path", text, "path") for index, text in enumerate(healing["text"])),
    ]
    for section, name in (("sensitivity", "texts"), ("quality", "tasks"), ("quality", "final_tasks")):
        entries = data[section][name]
        for index, entry in enumerate(entries):
            # A bare task name is never a path, even if the current directory holds a file of that name.
            if name == "texts" or entry.endswith((".yaml", ".yml")) or looks_local(entry):
                places.append((f"{section}.{name}[{index}]", entries, index))
    yield from ((field, place, key) for field, place, key in places if place[key] is not None)


def looks_local(name: str) -> bool:
    """Returns True if `name` can only be a local path and never a hub name."""
    return name.startswith(("./", "../", "/", "~")) or name in (".", "..")


def _local_path(name: str, folder: Path) -> str:
    if (found := _find_local(name, folder)) is not None:
        # The file's own name stays, also if it is a link, because its suffix says what it holds.
        return str(found.parent.resolve() / found.name) if found.is_file() else str(found.resolve())
    return os.path.normpath(folder / Path(name).expanduser()) if looks_local(name) else name


def _find_local(name: str, folder: Path) -> Path | None:
    if "://" in name:
        return None
    expanded = Path(name).expanduser()
    return next((path for path in (folder / expanded, Path.cwd() / expanded) if path.exists()), None)


def _input_error(error: ValidationError) -> InputError:
    """Turns the first problem that pydantic found into field, value and remedy."""
    problems = error.errors()
    # A misspelt key often makes another one missing, so an unknown key is reported first: it is the cause.
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
        ("search", "affine"): AffineSection,
        ("search", "race"): RaceSection,
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
