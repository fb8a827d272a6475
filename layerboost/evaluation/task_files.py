"""Reads names and files of lm-eval tasks without importing lm-eval, so that bad input is refused within a second.

lm-eval takes many seconds to build its own index of its 14,000 task files. Here the names in those files are found by
regular expressions, and a user's task file is read as plain YAML without resolving its functions.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

RESERVED_NAMES = ("text", "mean")
"""Names that scores and tables use beside the tasks' names, so that no task may have them."""

_LOCAL_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")
_NO_TASKS_IN = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".sh", ".csv", ".tsv", ".jpg", ".png", ".lark")
_NAME = re.compile(r"""^["']?(task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'#\[\]{}:,][^\s"'#\[\]{},]*)""", re.M)
_TAG_BLOCK = re.compile(
    r"""^["']?tag["']?[ \t]*:[ \t]*(?:#.*)?\n((?:[ \t]*-[ \t].*(?:\n|\Z)|[ \t]*(?:#.*)?\n)+)""", re.M
)
_TAG_ITEM = re.compile(r"""^[ \t]*-[ \t]+["']?([^\s"'#]+)""", re.M)
_TAG_LIST = re.compile(r"""^["']?tag["']?[ \t]*:[ \t]*\[([^\]]*)\]""", re.M)
_FUNCTION = re.compile(r"!function\s+[\"']?([\w.]+)\.\w+")


class UnknownTaskError(ValueError):
    """A benchmark's name or file could not be run by lm-eval."""


class TaskFileError(UnknownTaskError):
    """A task file is missing or does not define a task."""


@dataclass
class PackagedName:
    """Says where a name occurs in lm-eval's package: as which kinds (`task`, `group`, `tag`) and in which files."""

    kinds: set[str] = field(default_factory=set)
    files: list[Path] = field(default_factory=list)

    @property
    def own_file(self) -> Path | None:
        """The one YAML file that defines the task; None for a group, a tag or an ambiguous name."""
        alone = self.kinds == {"task"} and len(self.files) == 1 and self.files[0].suffix == ".yaml"
        return self.files[0] if alone else None


def is_task_file(name: str) -> bool:
    """Returns whether a benchmark is given as a YAML file instead of a name."""
    return Path(name).suffix in (".yaml", ".yml")


def check_tasks(names: Sequence[str]) -> None:
    """Refuses benchmarks that lm-eval would not find, without importing it.

    Args:
        names: lm-eval's names of tasks, groups and tags, and paths of task files.

    Raises:
        UnknownTaskError: If a name is unknown, with the nearest known ones, or is given twice.
        TaskFileError: If a task file is missing, is not a single task, or names data that is missing.
    """
    unknown = []
    seen: set[str] = set()
    for name in names:
        if is_task_file(name):
            called = str(read_task_file(name)["task"])
            if called in RESERVED_NAMES:
                raise TaskFileError(
                    f"quality.tasks: {name} calls its task {called!r}, a reserved name; rename the task"
                )
        else:
            called = name
            if name not in packaged_names():
                unknown.append(name)
        if called in seen:
            raise UnknownTaskError(f"quality.tasks: {called!r} is given twice; name each task once")
        seen.add(called)
    if unknown:
        reasons = "; ".join(_unknown(name) for name in unknown)
        raise UnknownTaskError(f"quality.tasks: {reasons} (the name of a task file ends in .yaml)")


@lru_cache(maxsize=1)
def packaged_names() -> dict[str, PackagedName]:
    """Returns every task, group and tag that lm-eval brings, by name."""
    names: dict[str, PackagedName] = {}
    for folder, _, files in os.walk(_lm_eval_folder() / "tasks"):
        for file in files:
            if file.endswith(_NO_TASKS_IN):
                continue
            path = Path(folder, file)
            for kind, name in _names_in(path.read_text(encoding="utf-8", errors="replace")):
                entry = names.setdefault(name, PackagedName())
                entry.kinds.add(kind)
                entry.files.append(path)
    return names


def read_task_file(path: str | Path) -> dict[str, Any]:
    """Reads a task file with what it includes; data files become absolute, functions stay names.

    The paths of data files are relative to the folder of the YAML that names them.

    Raises:
        TaskFileError: If the file is missing, is not a single task, has a field that lm-eval does not know, or names
            a data file that is missing.
    """
    path = Path(path)
    config, origins, _ = _merged(path, ())
    if not isinstance(config.get("task"), str):
        raise TaskFileError(
            f"quality.tasks: {path} is no task (it has no `task: NAME`); give a file that defines one task"
        )
    known = _task_fields()
    for key in config:
        if known and "class" not in config and key not in known:
            raise TaskFileError(f"quality.tasks: {path} has the unknown field {key!r}{_did_you_mean(key, known)}")
    _resolve_data(config, origins)
    for file in _data_files(config):
        if not file.exists():
            raise TaskFileError(
                f"quality.tasks: {path} reads {file}, which is missing; correct its dataset_kwargs.data_files"
            )
    return config


def task_identity(name: str) -> str:
    """Returns what identifies a benchmark's content.

    A task file is identified by a hash of it, the files it includes, its functions' modules and its data. A packaged
    task is identified by its name and lm-eval's version, since its data is not on this machine.
    """
    if not is_task_file(name):
        return f"{name}@lm_eval-{version('lm_eval')}"
    digest = hashlib.sha256()
    for part in files_of_task(name):
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if file.is_file():
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def files_of_task(path: str | Path) -> list[Path]:
    """Returns a task file, the files it includes, its functions' modules, and its data (files and folders).

    Raises:
        TaskFileError: As `read_task_file`.
    """
    config = read_task_file(path)
    _, _, files = _merged(Path(path), ())
    modules = {
        module
        for file in files
        for spec in _FUNCTION.findall(file.read_text(encoding="utf-8"))
        if (module := file.parent / f"{spec.replace('.', '/')}.py").is_file()
    }
    return [*files, *sorted(modules), *_data_files(config)]


def _lm_eval_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("quality.tasks: lm_eval is not installed; pip install lm_eval")
    return Path(next(iter(spec.submodule_search_locations)))


def _names_in(text: str) -> Iterable[tuple[str, str]]:
    yield from _NAME.findall(text)
    for block in _TAG_BLOCK.findall(text):
        yield from (("tag", name) for name in _TAG_ITEM.findall(block))
    for listed in _TAG_LIST.findall(text):
        yield from (("tag", name.strip().strip("\"'")) for name in listed.split(","))


def _unknown(name: str) -> str:
    return f"{name!r} is no task of lm-eval{_did_you_mean(name, packaged_names())}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(nearest)}?" if nearest else "; no known name is near it"


@lru_cache(maxsize=1)
def _task_fields() -> frozenset[str]:
    source = _lm_eval_folder() / "config" / "task.py"
    if not source.is_file():
        return frozenset()
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = {
        item.target.id
        for node in classes
        if node.name == "TaskConfig"
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    return frozenset(fields | {"group", "task_list"}) if fields else frozenset()


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads `!function module.name` as text."""


_PlainLoader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


def _merged(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Path], list[Path]]:
    """Returns a YAML merged with its includes, the folder that each key comes from, and the files read."""
    path = path.expanduser().resolve()
    if path in parents:
        raise TaskFileError(f"quality.tasks: {path} includes itself; remove the include")
    if not path.is_file():
        whose = f" (included by {parents[-1]})" if parents else ""
        raise TaskFileError(f"quality.tasks: no file {path}{whose}; give the path of an lm-eval task file")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise TaskFileError(f"quality.tasks: {path} is not YAML ({reason}); correct it") from error
    if not isinstance(own, dict):
        raise TaskFileError(f"quality.tasks: {path} holds no fields; give a file that defines one task")
    includes = own.pop("include", [])
    config: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    files = [path]
    for include in includes if isinstance(includes, list) else [includes]:
        inherited, inherited_origins, inherited_files = _merged(path.parent / include, (*parents, path))
        inherited.pop("task_list", None)
        config.update(inherited)
        origins.update(inherited_origins)
        files += inherited_files
    return config | own, origins | dict.fromkeys(own, path.parent), files


def _resolve_data(config: dict[str, Any], origins: dict[str, Path]) -> None:
    dataset_path = config.get("dataset_path")
    if isinstance(dataset_path, str) and dataset_path.startswith(("./", "../")):
        config["dataset_path"] = str(origins["dataset_path"] / dataset_path)
    kwargs = config.get("dataset_kwargs")
    if dataset_path in _LOCAL_BUILDERS and isinstance(kwargs, dict):
        folder = origins["dataset_kwargs"]
        resolved = {key: _absolute(kwargs[key], folder) for key in ("data_files", "data_dir") if key in kwargs}
        config["dataset_kwargs"] = kwargs | resolved


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    return files if "://" in str(files) else str(folder / Path(files).expanduser())


def _data_files(config: dict[str, Any]) -> list[Path]:
    """Returns the local files and folders that a resolved task reads, with patterns expanded."""
    kwargs = config.get("dataset_kwargs")
    found: list[Path] = []

    def collect(files: Any) -> None:
        if isinstance(files, dict | list):
            for value in files.values() if isinstance(files, dict) else files:
                collect(value)
        elif "://" not in str(files):
            path = Path(files)
            matches = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
            found.extend(matches or [path])

    if config.get("dataset_path") in _LOCAL_BUILDERS and isinstance(kwargs, dict):
        collect([kwargs[key] for key in ("data_files", "data_dir") if key in kwargs])
    elif Path(str(config.get("dataset_path"))).is_absolute():
        found.append(Path(config["dataset_path"]))
    return found
