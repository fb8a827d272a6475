"""Every command line of clusters/README.md is one that its tool takes, and names files that are there."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

PROJECT = Path(__file__).resolve().parents[2]
README = PROJECT / "clusters" / "README.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
# Tools that are not here; what they are told is theirs to check.
ELSEWHERE = {"aws", "docker", "gcloud", "kubectl", "scancel", "squeue"}
SHELL = {"base64", "chmod", "export", "mkdir", "sed", "tail"}


def command_lines() -> list[str]:
    return [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    """A line's first command without settings of variables before it and redirections after it."""
    if substitution := re.fullmatch(r"\w+=\$\((.*)\)", line):
        line = substitution[1]
    words = shlex.split(line)
    words = words[: words.index("|")] if "|" in words else words
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    return words[: words.index(">")] if ">" in words else words


def check(line: str) -> None:
    """Parses one command as its own tool does, without running it.

    Raises:
        AssertionError, click.UsageError: it would be refused.
    """
    words = words_of(line)
    if not words:
        return
    tool, arguments = words[0], words[1:]
    for word in arguments:
        if word.startswith(("clusters/", "recipes/")) and "*" not in word:
            assert (PROJECT / word).exists(), word
    if tool == "ray":
        check_ray(arguments)
    elif tool == "layerboost" or words[:3] == ["python", "-m", "orchestrator"]:
        check_layerboost(arguments if tool == "layerboost" else words[3:])
    elif tool == "python":
        # In the image, where the project is /home/ray/layerboost.
        script = PROJECT / Path(arguments[0]).relative_to("/home/ray/layerboost")
        assert script.name == "wait_for.py" and script.exists()
        from clusters.wait_for import build_parser

        build_parser().parse_args(arguments[1:])
    elif tool == "sbatch":
        (script,) = [word for word in arguments if word.startswith("clusters/")]
        assert os.access(PROJECT / script, os.X_OK)
    else:
        assert tool in ELSEWHERE | SHELL, f"nobody checks {tool}"


def check_ray(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    command, context = cli, click.Context(cli)
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
        assert command is not None
        context = click.Context(command, parent=context)
    parameters = command.make_context(command.name, list(arguments)).params
    if "entrypoint" in parameters:
        check(shlex.join(parameters["entrypoint"]))
    if "cmd" in parameters:
        check(parameters["cmd"])


def check_layerboost(arguments: list[str]) -> None:
    from orchestrator.cli import build_parser

    if arguments[0] == "submit":
        pytest.importorskip("orchestrator.submit.submit", reason="needs layerboost submit")
    parsed = build_parser().parse_args(arguments)
    assert isinstance(parsed, argparse.Namespace)
    if getattr(parsed, "recipe", None):
        assert (PROJECT / parsed.recipe).exists()


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_shell_reads_each_block(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("line", sorted(set(command_lines())))
def test_a_command_line_is_one_that_its_tool_takes(line):
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "ray up --yess clusters/local.yaml",
        "ray up --yes clusters/lokal.yaml",
        "ray exec clusters/local.yaml 'layerboost doctor --adress auto'",
        "ray job submit --address http://127.0.0.1:8265 -- python -m orchestrator run recipes/missing.yaml",
        "layerboost run recipes/default.yaml --dryrun",
        "python /home/ray/layerboost/clusters/wait_for.py gpu 2",
        "rye up",
    ],
)
def test_a_wrong_line_would_be_found(line, capsys):
    with pytest.raises((AssertionError, click.UsageError, SystemExit)):
        check(line)


def test_every_way_to_run_is_described_whole():
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.MULTILINE))
    for title in ("Own machines", "EC2", "Compute Engine", "Kubernetes"):
        assert "layerboost submit" in sections[title] and "ray job submit" in sections[title]
    for title in ("Own machines", "EC2", "Compute Engine", "Kubernetes", "Slurm"):
        assert "Costs:" in sections[title] and "Watch" in sections[title] and "top" in sections[title]
    for path in (PROJECT / "clusters").iterdir():
        assert path.name in README.read_text() or path.name in ("README.md", "Dockerfile.dockerignore", "__pycache__")
