"""`layerboost submit`: runs a recipe as a job of a Ray cluster elsewhere, using only HTTP.

The working directory is uploaded and the driver runs on the head. This process follows its log and returns its exit
code. A lost connection loses nothing: the job goes on, and the log continues where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerboost.environ import environment
from layerboost.evaluation.task_files import TaskFileError, files_of_task, is_task_file
from orchestrator.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from orchestrator.recipe.errors import InputError, without_prefix
from orchestrator.recipe.load import NamedPath, load_recipe, looks_local, named_paths
from orchestrator.run.kinds import STAGE_NAMES
from orchestrator.submit.job_log import JobServer, JobServerError, exit_code, follow
from orchestrator.submit.working_directory import Package, max_package_bytes, pack
from tasks.cluster.connection import OUR_PACKAGES, use_token_if_at_hand

_JOB_SERVER_FIELD = "--address"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIB = 1024**2


@dataclass(frozen=True)
class Job:
    """Describes a run that is ready to be submitted.

    Attributes:
        submission_id: the name of the job on the cluster.
        entrypoint: the command that the head runs in the working directory.
        package: the files to upload.
        variables: environment variables of driver and workers. Their values are secrets.
        brings_layerboost: whether the working directory holds LayerBoost's own packages.
        notes: hints that the user should read before the job runs.
    """

    submission_id: str
    entrypoint: str
    package: Package
    variables: Mapping[str, str] = field(repr=False)
    brings_layerboost: bool
    notes: tuple[str, ...]

    def runtime_env(self) -> dict[str, Any]:
        """Returns the environment that Ray sets up for the job, before anything is uploaded."""
        wanted: dict[str, Any] = {"working_dir": str(self.package.folder), "excludes": list(self.package.excludes)}
        return wanted | ({"env_vars": dict(self.variables)} if self.variables else {})


def submit(arguments: argparse.Namespace) -> int:
    """`layerboost submit`: returns the job's exit code, or 0 with `--no-wait`."""
    with contextlib.nullcontext() if arguments.verbose else _only_errors_of_ray():
        return _submit(arguments)


@contextlib.contextmanager
def _only_errors_of_ray() -> Iterator[None]:
    """Silences Ray's log except for errors, because Ray logs each ignore file and each step of the upload.

    The level is set on the handlers, because some of Ray's loggers set levels of their own.
    """
    levels = {handler: handler.level for handler in logging.getLogger("ray").handlers}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def _submit(arguments: argparse.Namespace) -> int:
    address = check_address(arguments.address)
    job = prepare(arguments)
    by_itself = not os.environ.get("RAY_AUTH_MODE")
    use_token_if_at_hand()
    # Ray's own commands do not look for the token, so the printed commands must name the mode.
    token = "RAY_AUTH_MODE=token " if by_itself and os.environ.get("RAY_AUTH_MODE") else ""
    server = _connect(address)
    for note in job.notes:
        _say(f"note: {note}")
    _say(f"sending {len(job.package.sizes)} files, {job.package.n_bytes / _MIB:.1f} MiB, to {address}")
    _start(server, job, address)
    what_to_type = f"{job.submission_id} --address {shlex.quote(address)}"
    again = f"{token}ray job logs {what_to_type} --follow"
    _say(f"log:    {again}\nstatus: {token}ray job status {what_to_type}\nstop:   {token}ray job stop {what_to_type}")
    if arguments.no_wait:
        print(job.submission_id)
        return EXIT_DONE
    try:
        return _follow(server, job)
    except KeyboardInterrupt:
        _say(f"following has stopped, but {job.submission_id} goes on. To follow it again: {again}")
        return EXIT_INTERRUPTED


def prepare(arguments: argparse.Namespace) -> Job:
    """Checks everything that can be checked from here and decides what is uploaded.

    Raises:
        InputError: an input is wrong; it names the first fault.
    """
    out = check_out(arguments.out)
    load_recipe(arguments.recipe, arguments.overrides)
    folder = Path.cwd()
    recipe = Path(arguments.recipe).resolve()
    if not recipe.is_relative_to(folder):
        raise InputError(
            "recipe",
            arguments.recipe,
            f"lies outside the working directory {folder}, which is what travels; change to a folder that holds it",
        )
    named = named_paths(arguments.recipe, arguments.overrides)
    task_files = _task_files(named)
    # A virtual environment works only on the machine where it was made, so it is not uploaded.
    needed = [path.found for path in named if path.found and path.field != "throughput.environment"]
    package = pack(folder, _inside([recipe, *needed, *task_files], folder))
    _check_travels("recipe", arguments.recipe, recipe, package)
    notes = [*check_paths(named, package), *_check_task_files(task_files, package)]
    if stays := package.worth_saying():
        notes.append(f"stays here: {', '.join(stays[:8])}{f' and {len(stays) - 8} more' if len(stays) > 8 else ''}")
    check_size(package, max_package_bytes())
    command = [arguments.python, "-m", "orchestrator", "run", recipe.relative_to(folder).as_posix(), "--out", out]
    command += [part for override in arguments.overrides for part in ("--set", override)]
    command += ["--until", arguments.until] if arguments.until != STAGE_NAMES[-1] else []
    command += ["--verbose"] if arguments.verbose else []
    return Job(
        submission_id=check_submission_id(arguments.submission_id) or new_submission_id(recipe.stem),
        entrypoint=shlex.join(command),
        package=package,
        variables=check_variables(arguments.variables, os.environ),
        brings_layerboost=all((folder / name / "__init__.py").is_file() for name in OUR_PACKAGES),
        notes=tuple(notes),
    )


def check_address(address: str | None) -> str:
    """Returns the URL of a job server without a slash at its end.

    Raises:
        InputError: the address is missing or is no HTTP URL.
    """
    remedy = "the head's job server is needed, for example http://HEAD:8265"
    if address is None:
        raise InputError(_JOB_SERVER_FIELD, None, remedy)
    if not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", address):
        raise InputError(_JOB_SERVER_FIELD, address, f"is no URL of HTTP; {remedy}")
    return address.rstrip("/")


def check_out(out: str | None) -> str:
    """Returns the run folder after checking that every node can reach it.

    Raises:
        InputError: it is missing, relative, or exists in one process only.
    """
    remedy = "give an absolute path that every node has, or a URL such as s3://bucket/run"
    if out is None:
        raise InputError("--out", None, f"has no default, which would be deleted with the job's folder; {remedy}")
    protocol, separator, _ = out.partition("://")
    if separator:
        from fsspec import available_protocols

        if protocol not in available_protocols():
            raise InputError("--out", out, f"no file system is called {protocol}; {remedy}")
        if protocol == "memory":
            raise InputError("--out", out, f"is of one process only; {remedy}")
        if protocol not in ("file", "local"):
            return out
        out_path = out.partition("://")[2]
    else:
        out_path = out
    if not out_path.startswith("/"):
        raise InputError("--out", out, f"is relative, and a job's folder is deleted with the job; {remedy}")
    return out


def check_variables(names: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables of these names.

    Raises:
        InputError: a name is invalid or not set. The message never holds a value.
    """
    for name in names:
        bare = name.partition("=")[0]
        if bare != name:
            raise InputError(
                "--env", f"{bare}=...", "give the name alone: the value is read from this environment and not printed"
            )
        if not _VARIABLE.fullmatch(name):
            raise InputError("--env", name, "is no name of an environment variable; give one, such as HF_TOKEN")
        if name not in here:
            raise InputError("--env", name, f"is not set here; export {name} first, or leave it out")
    return {name: here[name] for name in names}


def check_submission_id(submission_id: str | None) -> str | None:
    """Returns the requested submission id after checking that it is valid."""
    if submission_id is not None and not _ID.fullmatch(submission_id):
        raise InputError(
            "--submission-id", submission_id, "must be up to 100 letters, digits, '-', '_' and '.', a letter first"
        )
    return submission_id


def new_submission_id(recipe_name: str) -> str:
    """Makes a readable, unique id from the recipe's name, the time and a few random digits."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe_name).strip("-_") or "run"
    return f"{name[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def check_paths(named: Iterable[NamedPath], package: Package) -> list[str]:
    """Checks that the nodes will find the paths of the recipe; returns notes on paths that they must have themselves.

    Raises:
        InputError: a relative path would not be uploaded.
    """
    notes = []
    for path in named:
        if "://" in path.written:
            continue
        if Path(path.written).expanduser().is_absolute():
            notes.append(f"{path.field}: {path.written} does not travel; every node must have it")
        elif path.found is not None:
            _check_travels(path.field, path.written, path.found, package)
        elif looks_local(path.written):
            raise InputError(
                path.field,
                path.written,
                "no such file or folder here, and a relative path travels from here; correct it, or give an absolute "
                "path that every node has",
            )
    return notes


def check_size(package: Package, most_bytes: int) -> None:
    """Raises InputError if the package is larger than the job server accepts."""
    if package.n_bytes > most_bytes:
        raise InputError(
            "working directory",
            package.folder,
            f"{package.n_bytes / _MIB:.0f} MiB would travel, and the job server takes {most_bytes / _MIB:.0f} MiB. The "
            f"largest: {package.largest()}. Name what is not needed in a .rayignore, and put models and texts where "
            "every node reaches them (an absolute path, a URL or the hub)",
        )


def _check_travels(name: str, written: object, found: Path, package: Package) -> None:
    if not found.is_relative_to(package.folder):
        raise InputError(
            name,
            written,
            f"lies outside the working directory {package.folder}, so the nodes would not have it; change to a folder "
            "that holds both, or give an absolute path that every node has",
        )
    if (lacking := package.lacking(found)) is not None:
        raise InputError(
            name,
            written,
            f"{lacking.relative_to(package.folder)} does not travel (see .gitignore and .rayignore; environments, "
            "caches and links stay here too); remove it from these files, or give an absolute path that every node has",
        )


def _task_files(named: Iterable[NamedPath]) -> list[Path]:
    """Returns the local task files, with the files that they include and read."""
    files: list[Path] = []
    for path in named:
        if (
            path.field.startswith(("quality.tasks", "quality.final_tasks"))
            and path.found
            and is_task_file(path.written)
        ):
            try:
                files += files_of_task(path.found)
            except TaskFileError as error:
                raise InputError(path.field, path.written, without_prefix(error, "quality.tasks")) from None
    return files


def _check_task_files(files: Iterable[Path], package: Package) -> list[str]:
    notes = []
    for file in files:
        if not file.is_relative_to(package.folder):
            notes.append(f"quality.tasks: {file}, which a task reads, does not travel; every node must have it")
        else:
            _check_travels("quality.tasks", file, file, package)
    return notes


def _inside(paths: Iterable[Path], folder: Path) -> list[Path]:
    return [path for path in paths if path.is_relative_to(folder)]


def _connect(address: str) -> JobServer:
    # Ray prefers this variable, and RAY_ADDRESS, to the address argument.
    with environment({"RAY_API_SERVER_ADDRESS": address}):
        try:
            return JobServer(address)
        except JobServerError as error:
            raise InputError(_JOB_SERVER_FIELD, address, str(error)) from error


def _start(server: JobServer, job: Job, address: str) -> None:
    try:
        wanted = job.runtime_env()
        if not job.brings_layerboost:
            wanted["py_modules"] = server.send_our_packages()
        server.start(job.submission_id, job.entrypoint, wanted)
    except JobServerError as error:
        reason = hide(str(error), job.variables)
        at_fault = ("--submission-id", job.submission_id) if error.id_is_taken else (_JOB_SERVER_FIELD, address)
        raise InputError(*at_fault, reason) from None


def _follow(server: JobServer, job: Job) -> int:
    def write(text: str) -> None:
        sys.stdout.write(hide(text, job.variables))
        sys.stdout.flush()

    try:
        details = follow(server, job.submission_id, write, _say)
    except JobServerError as error:
        _say(f"error: {hide(str(error), job.variables)}")
        return EXIT_FAILED
    code = exit_code(details)
    if details.driver_exit_code is None and details.message and details.status != "STOPPED":
        _say(hide(details.message.strip(), job.variables))
    remedy = "; the head has no such Python, give --python" if details.driver_exit_code == 127 else ""
    _say(f"{job.submission_id} {details.status.lower()}, exit code {code}{remedy}")
    return code


def hide(text: str, variables: Mapping[str, str]) -> str:
    """Replaces the values of these variables in a text by their names; values too short to be secrets stay."""
    for name, value in variables.items():
        if len(value) >= 6:
            text = text.replace(value, f"${name}")
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
