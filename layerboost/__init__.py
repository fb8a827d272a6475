"""LayerBoost: softmax attention where it matters, cheaper attention or none elsewhere, healed by distillation.

Importing this package lets `transformers.AutoModelForCausalLM` load converted checkpoints. It imports neither torch nor
transformers itself: names are looked up when they are used, so that the command line can read the vocabularies at once.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from .auto_classes import announce
from .version import __version__

if TYPE_CHECKING:
    from .cache import PlanCache
    from .convert import convert, plan_of, restore
    from .families import UnsupportedFamilyError, supported_families
    from .modeling import register
    from .plan import Plan, PlanError, Treatment, plan_from_thresholds

__all__ = [
    "Plan",
    "PlanCache",
    "PlanError",
    "Treatment",
    "UnsupportedFamilyError",
    "__version__",
    "convert",
    "plan_from_thresholds",
    "plan_of",
    "register",
    "restore",
    "supported_families",
]

_MODULES = {
    "Plan": "plan",
    "PlanCache": "cache",
    "PlanError": "plan",
    "Treatment": "plan",
    "UnsupportedFamilyError": "families",
    "convert": "convert",
    "plan_from_thresholds": "plan",
    "plan_of": "convert",
    "register": "modeling",
    "restore": "convert",
    "supported_families": "families",
}
"""The module that each public name is in."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps a public name what it is when the module of the same name (`convert`) is imported and would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
announce()
