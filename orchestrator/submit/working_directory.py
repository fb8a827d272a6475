"""What of a working directory travels to a cluster with a job, and what is too heavy to.

Ray packs the folder less what `.gitignore` and `.rayignore` name, and holds the package in the head's memory. So what a
job does not need stays here: repositories, environments, caches, run folders, and large files that the recipe does not
name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LARGE_FILE_MIB = 5.0
"""A file above this travels only if the recipe names it, or the folder that it is in."""

_STAY = frozenset(
    (
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        "node_modules",
        ".tox",
        ".nox",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
    )
)
_SECRETS = (".env", ".netrc")
_MIB = 1024**2


@dataclass(frozen=True)
class Package:
    """What travels of a folder.

    Attributes:
        folder: the working directory.
        excludes: patterns for Ray's `excludes`, each of one path in the folder.
        stays: the paths of those patterns, relative to the folder.
        sizes: bytes of each file that travels, by its path relative to the folder.
    """

    folder: Path
    excludes: tuple[str, ...]
    stays: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """The size of the archive, which Ray does not compress: an entry costs its name twice and its headers."""
        return sum(size + 2 * len(name.encode()) + 128 for name, size in self.sizes.items())

    def lacking(self, path: Path) -> Path | None:
        """The first file of a path in the folder that does not travel; None if all do."""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        travelling = (file.relative_to(self.folder).as_posix() in self.sizes for file in files)
        return next(
            (file for file, travels in zip(files, travelling, strict=True) if not travels and not _is_cache(file)), None
        )

    def worth_saying(self) -> list[str]:
        """What stays, less what nobody would miss."""
        return [name for name in self.stays if name.rpartition("/")[2] not in _STAY]

    def largest(self, n: int = 5) -> str:
        """The heaviest folders (of two levels) and files, with their sizes."""
        totals: Counter[str] = Counter()
        for name, size in self.sizes.items():
            parts = name.split("/")
            totals["/".join(parts[:2]) + ("/" if len(parts) > 2 else "")] += size
        return ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in totals.most_common(n))


def pack(folder: Path, needed: Iterable[Path]) -> Package:
    """Looks what of a folder would travel. Writes nothing.

    Args:
        folder: the working directory.
        needed: files and folders in it that travel whatever their size.
    """
    folder = folder.absolute()
    stays = tuple(path.relative_to(folder).as_posix() for path in _staying(folder, frozenset(needed)))
    excludes = tuple(_pattern(name) for name in stays)
    return Package(folder, excludes, stays, _packed_sizes(folder, excludes))


def max_package_bytes() -> int:
    """What the job server accepts."""
    from ray._private import ray_constants

    return ray_constants.DASHBOARD_CLIENT_MAX_SIZE


def _staying(folder: Path, needed: frozenset[Path], *, only_needed: bool = False) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        if any(folder in path.parents for path in needed):
            raise
        yield folder
        return
    for entry in entries:
        path = Path(entry.path)
        if path in needed:
            continue
        if any(path in one.parents for one in needed):
            yield from _staying(path, needed, only_needed=only_needed or _is_heavy_folder(path))
        elif only_needed:
            yield path
        elif entry.is_dir():
            # Ray would follow links, also those that lead out of the folder or in a circle.
            if entry.is_symlink() or _is_heavy_folder(path):
                yield path
            else:
                yield from _staying(path, needed)
        elif entry.name in _SECRETS or (entry.is_file() and entry.stat().st_size > LARGE_FILE_MIB * _MIB):
            yield path


def _is_heavy_folder(path: Path) -> bool:
    is_environment = (path / "pyvenv.cfg").exists() or (path / "conda-meta").is_dir()
    is_run = (path / "records").is_dir() and ((path / "run.json").exists() or (path / "recipe.yaml").exists())
    return path.name in _STAY or is_environment or is_run


def _is_cache(file: Path) -> bool:
    return "__pycache__" in file.parts


def _pattern(name: str) -> str:
    """A pattern, as in a `.gitignore`, of one path and nothing else."""
    return "/" + re.sub(r" $", "[ ]", re.sub(r"([\\*?\[\]])", r"\\\1", name))


def _packed_sizes(folder: Path, excludes: Iterable[str]) -> dict[str, int]:
    """Bytes of each file that Ray packs, found by Ray's own walk."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    patterns = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    heeds_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, [packaging._get_excludes(folder, patterns)], note, include_gitignore=heeds_gitignore)
    return sizes
