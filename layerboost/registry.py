"""Implements open vocabularies: registries of frozen descriptions, which this package fills and plug-ins add to.

A checkpoint carries a copy of this file, but not `plugins.py`, which finds plug-ins; so such a copy knows no plug-ins.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar


class UnknownEntryError(ValueError):
    """Reports a name that no entry has; the message gives the nearest name and lists all."""


class DuplicateEntryError(ValueError):
    """Reports an entry whose name, or another property that must be unique, is taken; the message says by whom."""


class EntryReferenceError(ValueError):
    """Reports a description whose code cannot be loaded; the message names the code and the remedy."""


@dataclass(frozen=True)
class Plugin:
    """Names the installed distribution that a plug-in comes from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Named(Protocol):
    """Describes an entry of a registry: a frozen dataclass with a name."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)

_ADDING: ContextVar[Plugin | None] = ContextVar("adding", default=None)


@contextlib.contextmanager
def adding(plugin: Plugin) -> Iterator[None]:
    """Assigns every entry that is added inside the block to `plugin`."""
    token = _ADDING.set(plugin)
    try:
        yield
    finally:
        _ADDING.reset(token)


class Registry(Generic[Entry]):
    """Holds frozen descriptions by name: the built-in ones first, then those of plug-ins.

    Reading it loads the plug-ins of this process, once.

    Args:
        kind: Name of one entry in messages, in the singular.
        entries: The built-in entries, in the order of lists and columns.
        unique: Further attributes that no two entries may share.
    """

    def __init__(self, kind: str, entries: Iterable[Entry] = (), *, unique: tuple[str, ...] = ()):
        self.kind, self._unique = kind, ("name", *unique)
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, Plugin] = {}
        for entry in entries:
            self._insert(entry, None)  # these entries are built in, even if a plug-in imports the module first

    def add(self, entry: Entry) -> Entry:
        """Adds an entry and returns it.

        Raises:
            DuplicateEntryError: Another entry has its name, or shares an attribute that must be unique.
        """
        return self._insert(entry, _ADDING.get())

    def _insert(self, entry: Entry, plugin: Plugin | None) -> Entry:
        for other in self._entries.values():
            for attribute in self._unique:
                if getattr(other, attribute) == getattr(entry, attribute):
                    owner = self._plugins.get(other.name)
                    raise DuplicateEntryError(
                        f"{self.kind}: the {attribute} '{getattr(entry, attribute)}' belongs to "
                        f"{'layerboost itself' if owner is None else f'the plug-in {owner}'} ('{other.name}'); "
                        "choose another one"
                    )
        if plugin is not None:
            self._plugins[entry.name] = plugin
        self._entries[entry.name] = entry
        return entry

    def names(self) -> tuple[str, ...]:
        """Returns the names of all entries, in order."""
        _load_plugins()
        return tuple(self._entries)

    def built_in(self) -> tuple[Entry, ...]:
        """Returns only the entries of this package; it loads no plug-in."""
        return tuple(entry for name, entry in self._entries.items() if name not in self._plugins)

    def plugin_of(self, name: str) -> Plugin | None:
        """Returns the plug-in that an entry comes from; None for a built-in one."""
        return self._plugins.get(self[name].name)

    def __getitem__(self, name: str) -> Entry:
        """Returns the entry of a name.

        Raises:
            UnknownEntryError: No entry has this name.
        """
        if name in self._entries and name not in self._plugins:
            return self._entries[name]  # a built-in entry needs no plug-in to be loaded
        _load_plugins()
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownEntryError(f"{self.kind}: '{name}' is unknown; {hint}use one of {', '.join(self._entries)}")

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[Entry]:
        _load_plugins()
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self.names())


Name = TypeVar("Name", bound="OpenName")


class _OpenNames(type):
    """Makes a class of names iterable: over the entries of its registry, in their order."""

    def __iter__(cls: type[Name]) -> Iterator[Name]:  # type: ignore[misc]
        return (cls(name) for name in cls.registry.names())

    def __len__(cls: type[Name]) -> int:  # type: ignore[misc]
        return len(cls.registry)


class OpenName(str, metaclass=_OpenNames):
    """Represents the name of an entry of one registry; it compares, hashes and pickles like its text.

    There is one object for each name, so that names may be compared by `is`. A subclass sets `registry`.
    """

    __slots__ = ()
    registry: ClassVar[Registry[Any]]
    _known: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        cls._known = {}

    def __new__(cls, name: str) -> Self:
        if name not in cls._known:
            entry = cls.registry[str.__str__(name)]
            cls._known.setdefault(entry.name, super().__new__(cls, entry.name))
        return cls._known[name]

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.value,)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.value}>"

    @property
    def value(self) -> str:
        """The name as a plain string."""
        return str.__str__(self)


def used_plugins(used: Iterable[tuple[Registry[Any], str]]) -> dict[str, str]:
    """Returns the plug-ins that some entries come from, version by name and sorted; empty if all are built in."""
    found = {registry.plugin_of(name) for registry, name in used}
    return {plugin.name: plugin.version for plugin in sorted(found - {None}, key=str) if plugin is not None}


def resolved(reference: Any, package: str | None = None) -> Any:
    """Returns the object that a description refers to; imports `module:attribute`, and returns any other value as is.

    A reference keeps a description light: names and letters are known without importing torch.

    Args:
        reference: A reference such as `my_package.attention:MEAN`, or `.treatments:WINDOW` relative to `package`.
        package: The package that relative references start from.

    Raises:
        EntryReferenceError: The code that a plug-in refers to cannot be loaded; the message names it.
    """
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module, package), attribute)
    except (ImportError, AttributeError) as error:
        if reference.startswith("."):
            raise
        raise EntryReferenceError(
            f"'{reference}': a plug-in refers to it and it cannot be loaded ({type(error).__name__}: {error}); "
            "repair the plug-in, or uninstall it"
        ) from error


def check_plugins(required: Mapping[str, str], what: str) -> None:
    """Raises a ValueError unless the plug-ins that `what` was made with, version by name, are available.

    A checkpoint that is loaded by its own copy of this file has no plug-ins, because they need this package installed.
    """
    if not required:
        return
    if (plugins := _plugins()) is None:
        needed = " and ".join(f"{name}=={version}" for name, version in required.items())
        raise ValueError(
            f"plug-in {next(iter(required))}: {what} needs layerboost and {needed}; "
            "install them and `import layerboost` before the checkpoint is loaded"
        )
    plugins.check_required(required, what)


def _load_plugins() -> None:
    """Loads the plug-ins of this process, once."""
    if (plugins := _plugins()) is not None:
        plugins.load_plugins()


def _plugins() -> Any:
    """Returns the module that finds plug-ins; None in a checkpoint's copy of this file, which has no such module."""
    try:
        return importlib.import_module(".plugins", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.plugins":
            raise
        return None
