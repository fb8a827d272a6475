"""Decides which files of a working directory are uploaded to a cluster with a job.

Ray packs the folder without what `.gitignore` and `.rayignore` name, and keeps the package in the head's memory. A job
therefore leaves behind what it does not need: repositories, environments, caches, run folders, and large files that the
recipe does not name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LARGE_FILE_MIB = 5.0
"""A file larger than this is uploaded only if the recipe names it or its folder."""

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
    """Describes which files of a folder are uploaded.

    Attributes:
        folder: the working directory.
        excludes: patterns for Ray's `excludes`; each matches one path in the folder.
        stays: the paths of those patterns, relative to the folder.
        sizes: bytes of each uploaded file, by its path relative to the folder.
    """

    folder: Path
    excludes: tuple[str, ...]
    stays: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """Returns the size of the archive. Ray does not compress it; an entry adds its name twice and its headers."""
        return sum(size + 2 * len(name.encode()) + 128 for name, size in self.sizes.items())

    def lacking(self, path: Path) -> Path | None:
        """Returns the first file under a path of the folder that is not uploaded; None if all are."""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        travelling = (file.relative_to(self.folder).as_posix() in self.sizes for file in files)
        return next(
            (file for file, travels in zip(files, travelling, strict=True) if not travels and not _is_cache(file)), None
        )

    def worth_saying(self) -> list[str]:
        """Lists what stays here, without what no job needs, such as caches and environments."""
        return [name for name in self.stays if name.rpartition("/")[2] not in _STAY]

    def largest(self, n: int = 5) -> str:
        """Lists the largest folders (down to two levels) and files with their sizes."""
        totals: Counter[str] = Counter()
        for name, size in self.sizes.items():
            parts = name.split("/")
            totals["/".join(parts[:2]) + ("/" if len(parts) > 2 else "")] += size
        return ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in totals.most_common(n))


def pack(folder: Path, needed: Iterable[Path]) -> Package:
    """Finds which files of a folder would be uploaded; it writes nothing.

    Args:
        folder: the working directory.
        needed: files and folders in it that are uploaded whatever their size.
    """
    folder = folder.absolute()
    stays = tuple(path.relative_to(folder).as_posix() for path in _staying(folder, frozenset(needed)))
    excludes = tuple(_pattern(name) for name in stays)
    return Package(folder, excludes, stays, _packed_sizes(folder, excludes))


def max_package_bytes() -> int:
    """Returns the largest package that the job server accepts, in bytes."""
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
            # Links stay here: Ray would follow them, even out of the folder or in a circle.
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
    """Returns a `.gitignore` pattern that matches one path and nothing else."""
    return "/" + re.sub(r" $", "[ ]", re.sub(r"([\\*?\[\]])", r"\\\1", name))


def _packed_sizes(folder: Path, excludes: Iterable[str]) -> dict[str, int]:
    """Returns the bytes of each file that Ray packs, using Ray's own directory walk."""
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
