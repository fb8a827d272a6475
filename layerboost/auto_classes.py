"""Makes converted checkpoints known to the auto classes of transformers without importing transformers.

The configuration and model classes are made from the family's own classes, which take seconds to import. Therefore
transformers learns only their names, as soon as it is imported itself, and a class is made when it is first requested.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"


class _ConvertedConfigs(dict[str, Any]):
    """Maps `model_type` to the configuration classes that others registered; makes those of converted models lazily."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _parent_type(model_type) is not None

    def __missing__(self, model_type: str) -> Any:
        if (parent := _parent_type(model_type)) is None:
            raise KeyError(model_type)
        self[model_type] = _package_module("modeling").config_class(parent)
        return self[model_type]


def _parent_type(model_type: object) -> str | None:
    """Returns the parent's `model_type` for that of a converted model; None for any other."""
    families = _package_module("families")
    parent = str(model_type).removeprefix(families.CONVERTED_PREFIX)
    return parent if parent != model_type and parent in families.supported_families() else None


def _package_module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def announce() -> None:
    """Registers converted models with the auto classes: now if transformers is imported, else once it is."""
    module = sys.modules.get(_CONFIGURATIONS)
    if module is not None and hasattr(module, "CONFIG_MAPPING"):
        _extend(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _extend(configurations: ModuleType) -> None:
    mapping: Any = configurations.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _ConvertedConfigs):
        mapping._extra_content = _ConvertedConfigs(mapping._extra_content)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the module of transformers' configurations like other finders, and extends it after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
