"""Tests plug-ins: another package adds entries to every vocabulary, and an error in a plug-in names it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerboost.registry import (
    DuplicateEntryError,
    EntryReferenceError,
    Plugin,
    Registry,
    UnknownEntryError,
    adding,
    resolved,
)
from layerboost.search.methods import Method
from tests.fork_server import python_path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "tests" / "plugin_package"


def python(*arguments: str, path: Path, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package in a folder installed."""
    environment = {**os.environ, "PYTHONPATH": python_path(path, PROJECT)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def installed(folder: Path, code: str, name: str = "broken", version: str = "0.1") -> Path:
    """Writes a package of one module with a plug-in, as pip would install it, and returns its folder."""
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(f"[layerboost.plugins]\n{name} = {name}:register\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not cluster", pytest.param("cluster", marks=pytest.mark.cluster)])
def test_an_entry_of_each_kind_works_everywhere(which):
    checks = str(PACKAGE / "checks_with_plugin.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, checks, path=PACKAGE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


FAULTS = {
    "import": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "call": ("def register():\n    raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
    "conflict": (
        "from layerboost.search.methods import METHODS, Method\n"
        "def register():\n    METHODS.add(Method('swaps', 'mine', 'x:y'))\n",
        "the name 'swaps' belongs to layerboost itself",
    ),
    "letter": (
        "from layerboost.plan import TREATMENTS, TreatmentEntry\n"
        "def register():\n    TREATMENTS.add(TreatmentEntry('wide', 'W', 'mine', 'x:y', '#000000'))\n",
        "the letter 'W' belongs to layerboost itself ('window'); choose another one",
    ),
}


@pytest.mark.parametrize(("code", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_failing_plugin_is_an_error_that_names_it(tmp_path, code, reason):
    done = python("-m", "orchestrator", "--help", path=installed(tmp_path, code))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: plug-in broken 0.1: its entry point broken = broken:register fails (")
    assert reason in line and line.endswith("; repair it, or uninstall broken")


def test_a_failure_is_said_again_to_whoever_reads_next(tmp_path):
    script = (
        "from layerboost.plan import TREATMENTS, Plan\n"
        "for read in (TREATMENTS.names, lambda: list(TREATMENTS), lambda: Plan.parse('SX')):\n"
        "    try:\n        read()\n    except ValueError as error:\n        print(type(error).__name__, error)\n"
        "print(Plan.parse('SN'))\n"
    )
    done = python("-c", script, path=installed(tmp_path, FAULTS["call"][0]))
    *failures, plan = done.stdout.splitlines()
    assert len(failures) == 3 and len(set(failures)) == 1 and failures[0].startswith("PluginError plug-in broken 0.1")
    assert plan == "SN"  # built-in treatments need no plug-in


def test_plugins_are_called_once_and_only_when_a_registry_is_read(tmp_path):
    code = "print('imported')\ndef register():\n    print('called')\n"
    script = (
        "import layerboost, layerboost.plan as p; print('first'); p.TREATMENTS.names(); list(p.Treatment); "
        "from tasks.engines import ENGINES; print(ENGINES.names())"
    )
    done = python("-c", script, path=installed(tmp_path, code))
    assert done.stdout.splitlines() == ["first", "imported", "called", "('transformers', 'vllm')"], done.stderr


def test_a_registry_names_the_nearest_entry_and_refuses_a_second_one():
    registry = Registry("search.method", [Method("fast", "", ""), Method("slow", "", "")])
    with pytest.raises(UnknownEntryError, match=r"search\.method: 'fasst' is unknown; did you mean fast\? use one of"):
        registry["fasst"]
    with adding(Plugin("mine", "1")):
        registry.add(Method("mine", "", ""))
    assert registry.names() == ("fast", "slow", "mine") and [m.name for m in registry.built_in()] == ["fast", "slow"]
    with pytest.raises(DuplicateEntryError, match="the name 'mine' belongs to the plug-in mine 1"):
        registry.add(Method("mine", "", ""))


def test_the_example_is_installed_by_pip_and_converts(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PROJECT / "examples" / "plugin", source)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(site)]
    installing = python("-m", "pip", "install", *options, str(source), path=tmp_path)
    assert installing.returncode == 0, installing.stderr
    script = (
        "import torch; from layerboost import PlanCache, Plan, convert; from layerboost.checkpoint import load_model; "
        "from layerboost.smallworld import MODEL; "
        "plan = Plan.parse('SMLNMSMLNMSW', window=5); print(plan.plugins); "
        "model = convert(load_model(MODEL), plan); tokens = torch.arange(24).reshape(2, 12) + 5; "
        "cache = PlanCache(model.config); torch.set_grad_enabled(False); "
        "steps = [model(tokens[:, [t]], past_key_values=cache).logits for t in range(12)]; "
        "torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits); "
        "print(cache.layers[1].keys.shape[2])"
    )
    done = python("-c", script, path=site)
    assert done.stdout.splitlines() == ["{'layerboost-mean': '0.1.0'}", "5"], done.stderr
    package = PROJECT / "examples" / "plugin" / "layerboost_mean"
    lines = [line for path in package.glob("*.py") for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40


@pytest.mark.parametrize("reference", ["no_such_package.module:NAME", "json:no_such_name"])
def test_a_reference_that_leads_nowhere_is_named(reference):
    with pytest.raises(EntryReferenceError, match=f"'{reference}': a plug-in refers to it and .*; repair the plug-in"):
        resolved(reference)
    assert resolved("json:dumps")([1]) == "[1]"
