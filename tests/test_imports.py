"""Tests the import rules: between the three packages, between their folders, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("layerboost", "tasks", "orchestrator")

FOLDERS = {
    "layerboost": (
        ("", "storage", "text"),
        ("kernels", "search", "serving"),
        ("sweep", "speed"),
        ("evaluation",),
        ("sensitivity", "healing"),
        ("costs", "smallworld"),
    ),
    "tasks": (("cluster",), ("pool",), ("",), ("healing",)),
    "orchestrator": (
        ("recipe", "report"),
        ("run",),
        ("checks", "results"),
        ("stages",),
        ("costs",),
        ("",),
        ("commands", "submit"),
    ),
}
"""Folders of each package, lowest level first; a folder may import only from its own level and lower ones.

The empty name stands for the package's own files.
"""

LOWER_FILES = {
    "orchestrator.text_tables": 0,
    "orchestrator.exit_codes": 0,
    "orchestrator.cli": 7,
    "orchestrator.__main__": 8,
}
"""Levels of a package's own files that differ from the level of the other own files."""

STAGES = {"evaluate", "sensitivity", "search", "heal", "measure"}
"""Files of `orchestrator/stages` that the pipeline calls; no other stage imports them."""

PARTS_OF_STAGES = {"adaptive": "sensitivity", "refine": "search", "baselines": "heal", "halving": "heal"}
"""Files that are part of one stage and that only this stage imports; the other files there are shared."""


def modules() -> dict[str, Path]:
    """Returns every module of the three packages by its dotted name; a package has the name of its folder."""
    found = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            if "model" in parts:  # code that travels with the embedded checkpoint
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Returns the project's modules that each module imports, at its top or inside a function."""
    known = modules()
    return {name: frozenset(set(_imported(name, path, known)) - {name}) for name, path in known.items()}


def _imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(name, path, node)
            for alias in node.names:
                if f"{source}.{alias.name}" in known:
                    yield f"{source}.{alias.name}"
                elif source in known:
                    yield source


def _absolute(name: str, path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    base = folder[: len(folder) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def folder_of(module: str) -> str:
    """Returns a module's folder inside its package; empty for the package's own files."""
    parts = module.split(".")
    is_folder = modules()[module].name == "__init__.py"
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and is_folder) else ""


def level_of(module: str) -> int:
    if module in LOWER_FILES:
        return LOWER_FILES[module]
    levels = FOLDERS[module.split(".")[0]]
    return next(level for level, folders in enumerate(levels) if folder_of(module) in folders)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Returns the sets of modules that reach each other (Tarjan's strongly connected components of at least two)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == [["b", "c"]]


def test_no_module_imports_another_in_a_circle():
    assert circles(imports()) == []


def test_every_folder_has_a_level():
    named = {(package, folder) for package, levels in FOLDERS.items() for level in levels for folder in level}
    assert {(name.split(".")[0], folder_of(name)) for name in modules()} == named


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_from_those_before_it(package: str):
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if name.split(".")[0] == package and other.split(".")[0] in later
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_imports_only_from_its_own_level_and_those_below(package: str):
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if name.split(".")[0] == other.split(".")[0] == package and name != package
        if other != package and level_of(other) > level_of(name)
    ]
    assert wrong == []


def test_layerboost_imports_itself_by_relative_names():
    """A checkpoint carries copies of some files, and the whole package may be vendored under another name."""
    absolute = [
        f"{path.relative_to(PROJECT)}:{node.lineno}"
        for name, path in modules().items()
        if name.split(".")[0] == "layerboost" and folder_of(name) != "smallworld"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "layerboost"
    ]
    assert absolute == []


def test_a_stage_takes_nothing_from_another_stage():
    wrong = []
    for name, others in imports().items():
        for other in others:
            if name.startswith("orchestrator.stages.") and other.startswith("orchestrator.stages."):
                stage, part = name.rpartition(".")[2], other.rpartition(".")[2]
                if part in STAGES or PARTS_OF_STAGES.get(part, stage) != stage:
                    wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_files_that_travel_with_a_checkpoint_import_nothing_but_each_other():
    from layerboost.modeling import CODE_FILES

    travelling = {f"layerboost.{Path(name).stem}" for name in CODE_FILES}
    wrong = {name: sorted(imports()[name] - travelling) for name in travelling if imports()[name] - travelling}
    assert wrong == {}


def test_private_names_stay_in_their_file():
    wrong = [
        f"{path.relative_to(PROJECT)}:{node.lineno} {alias.name}"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in PACKAGES)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert wrong == []
