"""Writes the recipe's reference from its fields: `docs/recipe.md` and, for editors, `recipes/recipe.schema.json`.

    python -m orchestrator.recipe.reference [FOLDER]

writes both into a checkout. Types, defaults and bounds are those that a recipe is checked against, and descriptions are
the `Attributes` of the sections' docstrings, so that neither file can say anything else than the code does.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from layerboost.evaluation.scores import SCORES
from layerboost.healing.divergences import DIVERGENCES
from layerboost.plan import TREATMENTS
from layerboost.registry import Registry
from layerboost.search.methods import METHODS
from orchestrator.recipe.fields import AutoOr, unique_entries
from orchestrator.recipe.recipe import Recipe
from tasks.engines import ENGINES

REFERENCE_FILE, SCHEMA_FILE = "docs/recipe.md", "recipes/recipe.schema.json"

Schema = dict[str, Any]

_JSON_NAMES = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_NUMBER_TEXT = "NumberText"
_NUMBER_TEXT_SCHEMA = {
    "type": "string",
    "pattern": r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?$",
    "description": "A number such as 10_000_000 or 1e7, which some versions of YAML read as a text.",
}

_INTRODUCTION = """# Recipe reference

A recipe is a YAML file that says what to run. It has the sections below; only `model` and `quality` must be there. This
page is written by `python -m orchestrator.recipe.reference` from the code that checks recipes, and so is the schema
[recipe.schema.json](../recipes/recipe.schema.json). An editor with the YAML language server completes and checks fields
by it if this line stands at the top of a recipe, with the path of the schema relative to the recipe:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```

Some rules hold everywhere. An unknown key is an error that names the nearest known one. A path is looked for beside
the recipe first, then in the current directory. Where a field takes a hub name or a path, what exists on this machine
is taken for a path, and so is all that begins with `./`, `../`, `/` or `~`. Numbers may be written as `10_000_000` or
`1e7`. `layerboost run RECIPE --set section.field=value` overrides a field for one run. Everything in a recipe can
change results and is therefore part of what identifies a unit of work, except `placement`, `model.device`,
`throughput.environment` and the fields of `healing` that only memory depends on.
"""


VOCABULARIES: dict[str, Registry[Any]] = {
    "Treatments": TREATMENTS,
    "Scores": SCORES,
    "Search methods": METHODS,
    "Divergences": DIVERGENCES,
    "Engines": ENGINES,
}
"""The registries that plug-ins may extend, by their heading in the reference."""


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Returns the description of each field from the docstring's `Attributes`, on one line."""
    attributes = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def introduction(section: type[BaseModel]) -> str:
    """Returns the docstring's text before its `Attributes`, with one line for each paragraph."""
    text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:")[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())


def sections(section: type[BaseModel] = Recipe, name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yields every section with its dotted name, each before its inner ones; the recipe's own name is empty."""
    yield name, section
    for field_name, field in section.model_fields.items():
        for inner in _sections_of(field.annotation):
            yield from sections(inner, f"{name}.{field_name}".lstrip("."))


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_of(argument)


def recipe_schema() -> Schema:
    """Returns the JSON Schema (draft 2020-12) of recipes, which checks each field by itself.

    Rules between fields are checked only when a recipe is read.
    """
    schema = _plain_schema()
    for part in (schema, *schema["$defs"].values()):
        part["properties"] = {name: _with_number_texts(field) for name, field in part["properties"].items()}
    schema["$defs"][_NUMBER_TEXT] = _NUMBER_TEXT_SCHEMA
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LayerBoost recipe"}
    return about | schema


def _plain_schema() -> Schema:
    """Returns pydantic's schema with descriptions, the checks of validators, and JSON Schema's names."""
    schema = _named(Recipe.model_json_schema())
    for _, section in sections():
        part = schema if section is Recipe else schema["$defs"][section.__name__]
        part.pop("title", None)
        part["description"] = introduction(section)
        described = descriptions(section)
        for name, field in section.model_fields.items():
            entry = part["properties"][name]
            entry.pop("title", None)
            if "$ref" in entry:
                entry.pop("default", None)  # each inner field has its own default
            for check in (getattr(data, "func", None) for data in field.metadata):
                if isinstance(check, AutoOr):
                    number = next(kind for kind in entry["anyOf"] if "const" not in kind)
                    number["minimum"] = check.minimum
                elif check is unique_entries:
                    entry["uniqueItems"] = True
            if name in described:
                entry["description"] = described[name]
    return schema


def _named(schema: Any) -> Any:
    """Returns the schema with JSON Schema's names for bounds."""
    if isinstance(schema, dict):
        return {_JSON_NAMES.get(name, name): _named(value) for name, value in schema.items()}
    return [_named(value) for value in schema] if isinstance(schema, list) else schema


def _with_number_texts(schema: Any) -> Any:
    """Also allows each number as a text with `_` or an exponent."""
    if isinstance(schema, list):
        return [_with_number_texts(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") not in ("integer", "number"):
        return {name: value if name == "default" else _with_number_texts(value) for name, value in schema.items()}
    about = {name: schema[name] for name in ("default", "description") if name in schema}
    number = {name: value for name, value in schema.items() if name not in about}
    return {"anyOf": [number, {"$ref": f"#/$defs/{_NUMBER_TEXT}"}], **about}


def reference() -> str:
    """Returns the reference as Markdown, with one table for each section."""
    schema = _plain_schema()
    parts = [_INTRODUCTION]
    for name, section in sections():
        part = schema if section is Recipe else schema["$defs"][section.__name__]
        if not name:
            continue
        parts.append(f"{'##' if '.' not in name else '###'} `{name}`\n\n{part['description']}\n\n{_table(part, name)}")
    return "\n".join((*parts, _names()))


def _names() -> str:
    """Returns the part of the reference that explains the names in the registries."""
    parts = ["## Names\n\nThese names are built in; plug-ins may add more.\n"]
    for heading, registry in VOCABULARIES.items():
        rows = [_row(_name(entry), _sentence(entry.summary)) for entry in registry]
        parts.append("\n".join((f"### {heading}\n", "| name | |", "|---|---|", *rows)) + "\n")
    return "\n".join(parts)


def _name(entry: Any) -> str:
    letter = getattr(entry, "letter", None)
    return f"`{entry.name}`" + (f", {letter} in plans" if letter else "")


def _row(*cells: str) -> str:
    """Formats a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _table(part: Schema, section: str) -> str:
    rows = ["| field | value | default | |", "|---|---|---|---|"]
    for name, field in part["properties"].items():
        value = words(field) or f"[{section}.{name}](#{section.replace('.', '')}{name})"
        default = "needed" if name in part.get("required", ()) else _shown(field.get("default"))
        rows.append(_row(f"`{name}`", value, default, _sentence(field["description"])))
    return "\n".join(rows) + "\n"


def _shown(default: Any) -> str:
    return "" if default is None or default == {} else f"`{json.dumps(default).strip(chr(34))}`"


def words(schema: Mapping[str, Any]) -> str:
    """Describes the values that a schema allows; for a nested section the text is empty."""
    if alternatives := schema.get("anyOf"):
        return " or ".join(filter(None, (words(kind) for kind in alternatives if kind.get("type") != "null")))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "prefixItems" in schema:
        return "`[low, high]`"
    kind = schema.get("type")
    if kind == "array":
        items = words(schema["items"]) or "mapping"
        return "list of " + re.sub("^(whole number|number|text|mapping)", r"\1s", items)
    if kind == "object" and "additionalProperties" in schema:
        names = schema.get("propertyNames", {})
        keys = words(names) if "enum" in names else "layer" if "pattern" in names else "name"
        return f"mapping of {keys} to {words(schema['additionalProperties'])}"
    if kind in ("integer", "number"):
        return " ".join(filter(None, ("whole number" if kind == "integer" else "number", _bounds(schema))))
    return {"string": "text", "boolean": "`true` or `false`"}.get(str(kind), "")


def _bounds(schema: Mapping[str, Any]) -> str:
    said = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " and ".join(f"{word} {schema[name]:g}" for name, word in said.items() if name in schema)


def files() -> dict[str, str]:
    """Returns the contents of both files by their path in a checkout."""
    return {
        REFERENCE_FILE: reference(),
        SCHEMA_FILE: json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both files into a checkout."""
    parser = argparse.ArgumentParser(description="Writes the recipe's reference and its JSON Schema.")
    parser.add_argument("folder", nargs="?", default=".", help="the checkout to write into (default: %(default)s)")
    folder = Path(parser.parse_args(argv).folder)
    for name, content in files().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
