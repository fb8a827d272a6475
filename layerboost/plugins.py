"""Loads plug-ins: other packages that add treatments, scores, searchers, divergences and engines.

A plug-in is a distribution with an entry point in the group `layerboost.plugins`: a callable without arguments that
adds entries to registries. It is called once in each process that reads a registry: the command line, the driver, a
worker, or any program that loads a checkpoint. It should import nothing heavy, because a description may refer to code
by name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
from collections.abc import Mapping

from .registry import Plugin, adding

GROUP = "layerboost.plugins"


class PluginError(ValueError):
    """Reports a plug-in that fails, conflicts with another one, or is missing; the message names it and the remedy."""


_lock = threading.RLock()
_is_loading = False
_is_loaded = False
_failure: str | None = None


def load_plugins() -> None:
    """Calls the entry point of every installed plug-in, in the order of their names; does nothing the second time.

    Raises:
        PluginError: A plug-in fails or conflicts. It is raised again whenever a registry is read, because entries are
            missing.
    """
    global _is_loading, _is_loaded, _failure
    if _is_loaded:
        return
    with _lock:
        if _is_loaded or _is_loading:  # a plug-in that reads a registry while loading sees the entries so far
            return
        if _failure is not None:
            raise PluginError(_failure)
        _is_loading = True
        try:
            points = importlib.metadata.entry_points(group=GROUP)
            for point in sorted(points, key=lambda point: (_plugin(point).name, point.name)):
                _load(point)
            _is_loaded = True
        except PluginError as error:
            _failure = str(error)
            raise
        finally:
            _is_loading = False


@functools.cache
def installed_plugins() -> dict[str, str]:
    """Returns every distribution with an entry point in the group, version by name; it loads none of them."""
    found = {_plugin(point) for point in importlib.metadata.entry_points(group=GROUP)}
    return {plugin.name: plugin.version for plugin in sorted(found, key=str)}


def check_required(required: Mapping[str, str], what: str) -> None:
    """Raises PluginError if a plug-in that `what` was made with is not installed here.

    Args:
        required: Versions of the plug-ins, by name.
        what: Name for messages of the object that needs them.
    """
    installed = installed_plugins()
    for name, version in required.items():
        if name not in installed:
            raise PluginError(
                f"plug-in {name}: {what} was made with version {version} and it is not installed here; "
                f"install {name}=={version}"
            )
        if installed[name] != version:
            raise PluginError(
                f"plug-in {name}: {what} was made with version {version} and {installed[name]} is installed here; "
                f"install {name}=={version}"
            )


def _load(point: importlib.metadata.EntryPoint) -> None:
    plugin = _plugin(point)
    try:
        with adding(plugin):
            point.load()()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(
            f"plug-in {plugin}: its entry point {point.name} = {point.value} fails "
            f"({type(error).__name__}: {reason}); repair it, or uninstall {plugin.name}"
        ) from error


def _plugin(point: importlib.metadata.EntryPoint) -> Plugin:
    if point.dist is None:
        return Plugin(point.name, "unknown")
    return Plugin(point.dist.name, point.dist.version)
