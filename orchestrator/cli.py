"""Parses the command line and calls the command; nothing heavy is imported before that, only the vocabularies."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from layerboost.plan import TREATMENTS
from layerboost.plugins import PluginError
from orchestrator.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from orchestrator.run.kinds import STAGE_NAMES
from tasks.engines import ENGINES, TRANSFORMERS


class _Parser(argparse.ArgumentParser):
    """Reports a fault of the arguments in one line, as for any other input."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


class _Version(argparse.Action):
    """Reads the version only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("layerboost")
        except PackageNotFoundError:
            # Ray jobs run from a source folder without metadata. This import is slower: it loads the whole package.
            from layerboost.version import __version__ as number
        print(f"layerboost {number}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = _Parser(
        prog="layerboost",
        description="Finds which layers of a language model need softmax attention, replaces the rest, heals the "
        "model, and reports speed against quality.",
        epilog="Exit 0: done. Exit 1: some units of work failed. Exit 2: bad input, nothing started.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    always = _Parser(add_help=False)
    always.add_argument("--verbose", action="store_true", help="show tracebacks and what the libraries log")

    def add(name: str, text: str, *parents: _Parser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[always, *parents]
        )

    model = _Parser(add_help=False)
    model.add_argument("--revision", help="branch, tag or commit of a hub model")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    model.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    device = _Parser(add_help=False)
    device.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: %(default)s)")
    table = _Parser(add_help=False)
    form = table.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="print JSON instead of a table")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print CSV instead of a table")

    run = add("run", "run a recipe, or resume it where it stopped")
    run.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    run.add_argument("--out", metavar="DIR", help="run folder, local or any fsspec URL (default: runs/<recipe's name>)")
    _add_overrides(run)
    run.add_argument(
        "--until", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="stop after this stage (default: %(default)s)"
    )
    run.add_argument("--dry-run", action="store_true", help="print the units, their cost and what is already recorded")
    _add_address(run)

    submit = add("submit", "run a recipe as a job of a Ray cluster elsewhere, and follow it")
    submit.add_argument("recipe", metavar="RECIPE", help="a YAML recipe in the working directory, which is uploaded")
    submit.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or None,
        help="the head's job server, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS)",
    )
    submit.add_argument("--out", metavar="DIR", help="run folder that every node reaches, an absolute path or a URL")
    _add_overrides(submit)
    submit.add_argument("--until", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="stop after this stage")
    submit.add_argument(
        "--env",
        dest="variables",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this environment variable on; anyone who can use the job server can read it",
    )
    submit.add_argument("--submission-id", metavar="ID", help="(default: recipe's name, time, random digits)")
    submit.add_argument("--python", default="python", help="the head's Python that runs the job (default: %(default)s)")
    submit.add_argument("--no-wait", action="store_true", help="print the submission id and exit")

    report = add("report", "write the CSVs, pictures and page of a run again from its records, or compare several runs")
    report.add_argument("folders", metavar="DIR", nargs="+", help="run folders, local or any fsspec URL")
    report.add_argument("--out", metavar="DIR", help="folder of the comparison of several runs (default: comparison)")

    status = add("status", "show the state of a run from its folder, in another terminal or on another machine")
    status.add_argument("folder", metavar="DIR", help="run folder, local or any fsspec URL")
    status.add_argument("--json", action="store_true", help="print JSON instead of lines")
    status.add_argument("--follow", action="store_true", help="repeat it every two seconds until the run ends")

    convert = add("convert", "apply a plan to a model by hand", model)
    convert.add_argument("model", metavar="MODEL", help="a local folder or a hub name")
    convert.add_argument(
        "--plan",
        required=True,
        help=f"a letter for each layer: {', '.join(f'{t.letter} {t.name}' for t in TREATMENTS)}",
    )
    windowed = " and ".join(entry.letter for entry in TREATMENTS if entry.needs_window)
    convert.add_argument(
        "--window", type=int, default=64, help=f"window in tokens of {windowed} layers (default: %(default)s)"
    )
    convert.add_argument(
        "--sinks",
        type=int,
        default=0,
        help="how many of the window's tokens are the first ones of the sequence, which stay visible "
        "(default: %(default)s)",
    )
    convert.add_argument("--text", metavar="FILE", help="text that the maps of A layers are fitted on, as in recipes")
    convert.add_argument(
        "--tokens", type=int, default=16_384, help="tokens of the text to fit them on (default: %(default)s)"
    )
    convert.add_argument(
        "--rank",
        default="full",
        help="rank of the maps: full, a number, or auto for the smallest that is as good (default: %(default)s)",
    )
    convert.add_argument("--out", required=True, metavar="DIR", help="folder of the new checkpoint")

    export = add("export", "save a converted model in its family's own format, if that can express the plan", model)
    export.add_argument("model", metavar="MODEL", help="a checkpoint of windows and softmax")
    export.add_argument("--out", required=True, metavar="DIR", help="folder of the new checkpoint")

    evaluate = add("evaluate", "judge models side by side by a recipe's quality section", model, device, table)
    evaluate.add_argument("models", metavar="MODEL", nargs="+", help="the first one is the base of the ratios")
    evaluate.add_argument("--recipe", required=True, metavar="RECIPE", help="the recipe that says how to judge")
    _add_overrides(evaluate)

    bench = add("bench", "time decoding of models side by side", model, device, table)
    bench.add_argument("models", metavar="MODEL", nargs="+", help="the first one is the base of the ratios")
    bench.add_argument("--engine", choices=ENGINES.names(), default=TRANSFORMERS)
    bench.add_argument("--environment", metavar="DIR", help="virtual environment that has vllm (default: this one)")
    bench.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], metavar="N", help="sequences at a time")
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    bench.add_argument("--new-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="at least 3 (default: %(default)s)")
    bench.add_argument("--no-prefill", action="store_true", help="fill the cache with random numbers: decoding only")
    bench.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)")

    generate = add("generate", "continue a prompt with a model", model, device)
    generate.add_argument("model", metavar="MODEL", help="a local folder or a hub name")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: %(default)s)")

    doctor = add("doctor", "list what this machine or a cluster lacks, with the remedy")
    _add_address(doctor)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=value",
        help="override a field of the recipe; may be given several times",
    )


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or None,
        help="Ray cluster, HOST:PORT or auto (default: $RAY_ADDRESS, else this machine)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        parser = build_parser()
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    arguments = parser.parse_args(argv)
    _set_up_logging(arguments.verbose)
    try:
        return _handler(arguments.command)(arguments)
    except KeyboardInterrupt:
        again = f"; the same command goes on from here: {_same_command(argv)}" if arguments.command == "run" else ""
        print(f"interrupted{again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone. Python would raise again when it flushes at exit, so stdout goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if arguments.verbose:
            logging.getLogger("layerboost").exception("traceback")
        line, code = describe_error(error)
        print(line, file=sys.stderr)
        return code


def _handler(command: str) -> Callable[[argparse.Namespace], int]:
    """Returns the function of a command; its module and everything that this imports is loaded only now."""
    module = {"export": "convert"}.get(command, command)
    package = "orchestrator.submit.submit" if command == "submit" else f"orchestrator.commands.{module}"
    return getattr(importlib.import_module(package), command)


def describe_error(error: Exception) -> tuple[str, int]:
    """Returns the one line that describes an error, and its exit code."""
    from layerboost.storage.errors import DiskFullError
    from orchestrator.recipe.errors import InputError
    from orchestrator.run.lock import RunFolderLockedError

    text = " ".join(str(error).split())
    if isinstance(error, (InputError, PluginError)):
        return f"error: {text}", EXIT_BAD_INPUT
    if isinstance(error, RunFolderLockedError):
        return f"error: --out: {text}", EXIT_BAD_INPUT
    if isinstance(error, DiskFullError):
        return f"error: --out: {text}", EXIT_FAILED
    return f"error: {type(error).__name__}: {text}; --verbose shows where", EXIT_FAILED


def _same_command(argv: Sequence[str] | None) -> str:
    return shlex.join(["layerboost", *(sys.argv[1:] if argv is None else argv)])


class _OffStdout(logging.Filter):
    """Sends a library's log to stderr instead of stdout, because stdout carries results."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._level:
            logging.getLogger().handle(record)
        return False


def _set_up_logging(verbose: bool) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(name)s: %(message)s")
    # Other libraries import DeepSpeed where it is installed. It logs to stdout and warns of a missing GPU each time.
    deepspeed = logging.getLogger("DeepSpeed")
    for previous in deepspeed.filters[:]:
        deepspeed.removeFilter(previous)
    deepspeed.addFilter(_OffStdout(logging.INFO if verbose else logging.ERROR))
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
