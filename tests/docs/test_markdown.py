"""Tests that the files, commands and columns in the Markdown files exist: links, paths, command lines, tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from layerboost.families import supported_families
from orchestrator.cli import build_parser
from orchestrator.recipe.load import recipe_from_dict
from orchestrator.recipe.recipe import Recipe
from orchestrator.report.data import ReportData
from orchestrator.report.render import REPORT_FILES

PROJECT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", ".git", "node_modules", "runs"}
PAGES = sorted(
    path
    for path in PROJECT.rglob("*.md")
    if not SKIPPED.intersection(path.relative_to(PROJECT).parts) and path.is_file()
)
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?|(?<![\w*-])[\w-]+\.(?:py|toml)")
CHECKED_SUFFIXES = {".py", ".sh", ".yaml", ".yml", ".toml", ".csv", ".json", ".md", ".png", ".j2", ".txt", ""}
TOP_FOLDERS = {path.name for path in PROJECT.iterdir() if path.is_dir() and path.name not in SKIPPED}
NO_PATHS = {"layerboost/hardware"}
"""Names that only look like paths: this one is a label of Ray nodes."""

NAMED_AS_A_WHOLE = {"orchestrator/checks/", "orchestrator/results/"}
"""Folders whose files are similar, so that the picture of the folders names only some of them."""

TABLE_FIELDS = {"healing_quality": "quality_curve", "rank_correlations": "correlations"}
"""Fields of `ReportData` whose name differs from that of their file."""


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def blocks(text: str, language: str = "bash") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links(text: str) -> Iterator[str]:
    """Yields the targets of links and pictures that are not on the web."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def check_links(page: Path, text: str) -> list[str]:
    """Returns the links of a page that lead nowhere."""
    wrong = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        path = page if not target else (page.parent / target)
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            wrong.append(link)
    return wrong


def check_paths(page: Path, text: str) -> list[str]:
    """Returns the missing files that code spans name by a path in the project or in the page's folder."""
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", prose(text)):
        for path in PATH.findall(span) if not span.startswith(("http", "ray ")) else []:
            is_ours = path.split("/")[0] in TOP_FOLDERS or (("/" not in path) and path.endswith(".py"))
            if path not in NO_PATHS and is_ours and Path(path).suffix in CHECKED_SUFFIXES:
                beside = [PROJECT / path, page.parent / path]
                named_alone = "/" not in path and any(PROJECT.glob(f"[!.]*/**/{path}"))
                if not named_alone and not any(candidate.exists() for candidate in beside):
                    wrong.append(path)
    return wrong


def command_lines(text: str) -> Iterator[list[str]]:
    """Yields the arguments of each command of the shell blocks: `layerboost` or `python -m orchestrator`."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if words and Path(words[0]).name == "layerboost":
                    yield words[1:]
                elif "orchestrator" in words and words[words.index("orchestrator") - 1] == "-m":
                    yield words[words.index("orchestrator") + 1 :]


def options_of(command: str) -> set[str] | None:
    """Returns the options of a command; None if there is no such command."""
    actions = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    parser = (actions[0].choices or {}).get(command)  # type: ignore[union-attr]
    return None if parser is None else set(parser._option_string_actions)


def check_spans(text: str) -> list[str]:
    """Returns commands in running text, such as `layerboost run RECIPE --dry-run`, that the command line lacks."""
    wrong = []
    for span in re.findall(r"`layerboost ([a-z]+\b[^`]*)`", prose(text)):
        options = options_of(span.split()[0])
        if options is None or set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) - options:
            wrong.append(span)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path):
    assert check_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_is_there(page: Path):
    assert check_paths(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_the_command_line_takes(page: Path):
    text = page.read_text(encoding="utf-8")
    for arguments in command_lines(text):
        build_parser().parse_args(arguments)
    assert check_spans(text) == []


def recipes_of(text: str) -> Iterator[dict[str, Any]]:
    """Yields the recipes, and parts of recipes, of the YAML blocks; required fields that a part lacks are added."""
    for block in blocks(text, "yaml"):
        data = yaml.safe_load(block)
        if isinstance(data, dict) and set(data) <= set(Recipe.model_fields):
            yield {"model": {"path": "a"}, "quality": {"text": "b"}} | data


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_recipe_is_one(page: Path):
    for data in recipes_of(page.read_text(encoding="utf-8")):
        recipe_from_dict(data)


def test_the_guides_hold_recipes():
    texts = [(PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/own-model.md")]
    assert [len(list(recipes_of(text))) for text in texts] == [1, 2]


def test_what_is_wrong_would_be_found(capsys: pytest.CaptureFixture[str]):
    page = PROJECT / "README.md"
    text = "[a](docs/nowhere.md) [b](docs/method.md#nowhere) [c](https://example.com) [d](docs/method.md#speed)"
    assert check_links(page, text) == ["docs/nowhere.md", "docs/method.md#nowhere"]
    text = "`layerboost/plan.py`, `layerboost/plans.py`, `tasks/units.py`, `nowhere.py`, `plan.py`, `orchestrator.cli`"
    assert check_paths(page, text) == ["layerboost/plans.py", "tasks/units.py", "nowhere.py"]
    assert check_spans("`layerboost run A --dry-run`, `layerboost run A --dryrun`, `layerboost rum A`") == [
        "run A --dryrun",
        "rum A",
    ]
    (arguments,) = command_lines("```bash\nA=1 .venv/bin/layerboost run a.yaml \\\n  --dryrun  # why\n```")
    with pytest.raises(SystemExit):
        build_parser().parse_args(arguments)
    assert "--dryrun" in capsys.readouterr().err


def test_the_readme_shows_the_two_commands_and_fits_on_a_page():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    set_up, tests = blocks(text)[:2]
    assert set_up.count("\n") == tests.count("\n") == 1
    assert set_up.split("&& ")[-1] == ".venv/bin/layerboost run recipes/default.yaml\n"
    assert tests.split("&& ")[-1] == ".venv/bin/python -m pytest\n"


def test_every_page_is_in_the_index():
    index = (PROJECT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(PROJECT / "docs" / link.partition("#")[0]).resolve() for link in links(index)}
    pages = set((PROJECT / "docs").glob("*.md")) - {PROJECT / "docs" / "README.md"}
    assert pages <= linked, "docs/README.md lacks a page of docs/"


def test_the_families_are_those_that_can_be_converted():
    guide = (PROJECT / "docs" / "own-model.md").read_text(encoding="utf-8")
    listed = re.search(r"decoders of the families (.+?), with\s+safetensors", guide, re.DOTALL)
    assert listed is not None
    assert re.split(r",\s+|\s+and\s+", listed[1]) == sorted(supported_families())
    assert f"{len(supported_families())} families" in (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in REPORT_FILES if name.endswith(".csv")])
def test_every_column_of_the_report_is_described(name: str):
    text = (PROJECT / "docs" / "report.md").read_text(encoding="utf-8")
    sections = re.split(r"^##+ ", text, flags=re.MULTILINE)
    (described,) = [section for section in sections if f"`{name}`" in section.partition("\n")[0]]
    data, stem = ReportData(title="", recipe_yaml=""), name.removesuffix(".csv")
    table = getattr(data, TABLE_FIELDS.get(stem, stem))
    assert isinstance(table, pd.DataFrame)
    missing = [column for column in table.columns if f"`{column}`" not in described]
    assert missing == [], f"docs/report.md lacks columns of {name}"


def paths_of_tree(text: str) -> list[str]:
    """Returns the paths of a tree of folders: packages at the margin, levels and names, indented files of folders."""
    found, package, folder = [], "", ""
    for line in filter(None, text.splitlines()):
        names = re.findall(r"[\w.]+/|[\w]+\.py", re.split(r"  +(?=\S)", line.strip())[0])
        if not line.startswith((" ", *"123456789")):
            package = names[0]
            found.append(package)
            continue
        if not line.startswith("    "):
            folder = ""
        found += [f"{package}{folder}{name}" for name in names]
        if names[0].endswith("/"):
            folder = names[0]
            found += [f"{package}{folder}{name}" for name in re.findall(r"\w+\.py", line)]
    return found


def test_a_tree_is_read_by_its_folders():
    tree = "a/    the first\n1 b.py, c.py   two\n  d.py  one\n2 e/   f.py does it\n    g.py, h.py  two\n3 i/  more"
    assert paths_of_tree(tree) == [
        "a/",
        "a/b.py",
        "a/c.py",
        "a/d.py",
        "a/e/",
        "a/e/f.py",
        "a/e/g.py",
        "a/e/h.py",
        "a/i/",
    ]


def test_the_picture_of_the_folders_is_true():
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (tree,) = [block for block in blocks(text, "") if block.startswith("layerboost/")]
    named = paths_of_tree(tree)
    assert [path for path in named if not (PROJECT / path).exists()] == []
    packages = ("layerboost", "tasks", "orchestrator")
    folders = {path.parent.relative_to(PROJECT) for name in packages for path in (PROJECT / name).rglob("*.py")}
    assert [f"{folder}/" for folder in sorted(folders) if f"{folder}/" not in named] == []
    # If the tree has lines for some files of a folder, it must have one for each of them.
    listed = {path.rpartition("/")[0] + "/" for path in re.findall(r"\S+\.py", "\n".join(named))}
    whole = [f"{folder}/" for folder in folders if f"{folder}/" in listed and f"{folder}/" not in NAMED_AS_A_WHOLE]
    files = [path for folder in whole for path in sorted((PROJECT / folder).glob("*.py")) if path.stem[:2] != "__"]
    missing = [str(path.relative_to(PROJECT)) for path in files if str(path.relative_to(PROJECT)) not in named]
    assert missing == [], "docs/architecture.md lacks files in its picture of the folders"


def test_every_picture_of_the_report_is_described():
    text = (PROJECT / "docs" / "report.md").read_text(encoding="utf-8")
    assert [name for name in REPORT_FILES if name.endswith(".png") and f"| `{name[:-4]}` |" not in text] == []
