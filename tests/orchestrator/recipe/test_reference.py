"""Tests that docs/recipe.md and the JSON Schema say what the code checks, and that every field is described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import load_recipe, recipe_from_dict
from orchestrator.recipe.reference import SCHEMA_FILE, descriptions, files, main, recipe_schema, sections

PROJECT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path for path in (PROJECT / "recipes").glob("*.y*ml"))
MINIMAL = {"model": {"path": "a"}, "quality": {"text": "b"}}


def validator() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


def as_json(data: Any) -> Any:
    """Returns the data as an editor sees it, with strings as keys."""
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("name", sorted(files()))
def test_the_files_are_what_the_code_says(name: str):
    assert (PROJECT / name).read_text(encoding="utf-8") == files()[name], (
        f"{name} is old; write it again with: python -m orchestrator.recipe.reference"
    )


def test_the_command_writes_both_files(tmp_path: Path):
    for name in files():
        (tmp_path / name).parent.mkdir(parents=True)
    main([str(tmp_path)])
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in files()} == files()


@pytest.mark.parametrize(("name", "section"), list(sections()), ids=[name or "recipe" for name, _ in sections()])
def test_every_field_is_described_and_nothing_else(name: str, section: Any):
    assert set(descriptions(section)) == set(section.model_fields)
    assert all(text.endswith(".") for text in descriptions(section).values())


def test_the_sections_are_found_at_every_depth():
    names = [name for name, _ in sections()]
    assert {"healing", "healing.text", "healing.halving", "sensitivity.adaptive", "placement.labels"} <= set(names)
    assert len(names) == len(set(names))


def test_the_schema_is_one():
    Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_schema_takes_every_recipe(path: Path):
    text = path.read_text(encoding="utf-8")
    assert f"# yaml-language-server: $schema={Path(SCHEMA_FILE).name}" in text
    assert [error.message for error in validator().iter_errors(as_json(yaml.safe_load(text)))] == []
    resolved = as_json(load_recipe(path).model_dump(mode="json"))
    assert [error.message for error in validator().iter_errors(resolved)] == []


@pytest.mark.parametrize(
    "section",
    [
        {"healing": {"tokens": "120_000", "text": "c.txt"}},
        {"healing": {"tokens": "1e5", "text": [{"path": "c.txt"}, {"format": "sampled", "weight": 1}]}},
        {"healing": {"text": None}},
        {"placement": {"workers": 2, "gpus_per_worker": 0.5, "unit_timeout_s": "auto"}},
        {"constraints": {"pin": {0: "softmax"}, "at_most": {"n_softmax": 4}}},
        {"search": {"remove_below": [0.1, 0.2], "refine": None}},
    ],
)
def test_schema_and_reader_take_the_same(section: dict[str, Any]):
    recipe_from_dict(MINIMAL | section)
    assert [error.message for error in validator().iter_errors(as_json(MINIMAL | section))] == []


@pytest.mark.parametrize(
    "section",
    [
        {"serch": {}},
        {"search": {"trails": 3}},
        {"search": {"trials": -1}},
        {"search": {"method": "swap"}},
        {"search": {"remove_below": [0.1]}},
        {"search": {"refine": {"plans": 0}}},
        {"quality": {}, "model": {}},
        {"quality": {"text": "b", "tasks": ["arc_easy", "arc_easy"]}},
        {"healing": {"text": [{"path": "c", "weight": 0}]}},
        {"healing": {"curve": [0.5, 1.5]}},
        {"placement": {"workers": 0}},
        {"placement": {"workers": "many"}},
        {"placement": {"unit_timeout_s": 0.5}},
        {"constraints": {"pin": {"first": "none"}}},
        {"constraints": {"at_least": {"qualty": 1}}},
    ],
)
def test_schema_and_reader_refuse_the_same(section: dict[str, Any]):
    with pytest.raises(InputError):
        recipe_from_dict(MINIMAL | section)
    assert not validator().is_valid(as_json(MINIMAL | section))
