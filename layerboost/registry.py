"""Open vocabularies: registries of frozen descriptions, which this package fills and plug-ins add to.

A checkpoint carries a copy of this file; what finds plug-ins (`plugins.py`) stays behind, so a copy knows none.
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
    """A name that no entry has; the message gives the nearest name and lists all."""


class DuplicateEntryError(ValueError):
    """An entry whose name, or another property that must be unique, is taken; the message says by whom."""


class EntryReferenceError(ValueError):
    """A description that refers to code which cannot be loaded; the message names the code and the remedy."""


@dataclass(frozen=True)
class Plugin:
    """The installed distribution that a plug-in comes from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Named(Protocol):
    """An entry of a registry: a frozen dataclass with a name."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)

_ADDING: ContextVar[Plugin | None] = ContextVar("adding", default=None)


@contextlib.contextmanager
def adding(plugin: Plugin) -> Iterator[None]:
    """Every entry that is added inside the block belongs to `plugin`."""
    token = _ADDING.set(plugin)
    try:
        yield
    finally:
        _ADDING.reset(token)


class Registry(Generic[Entry]):
    """Frozen descriptions by name: the built-in ones first, then those of plug-ins.

    Reading it loads the plug-ins of this process, once.

    Args:
        kind: what one entry is, in the singular, as messages call it.
        entries: the built-in ones, in the order that lists and columns have.
        unique: further attributes that no two entries may share.
    """

    def __init__(self, kind: str, entries: Iterable[Entry] = (), *, unique: tuple[str, ...] = ()):
        self.kind, self._unique = kind, ("name", *unique)
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, Plugin] = {}
        for entry in entries:
            self._insert(entry, None)  # built in, even where a plug-in is the first to import the module

    def add(self, entry: Entry) -> Entry:
        """Adds an entry and gives it back.

        Raises:
            DuplicateEntryError: another entry has its name, or shares what must be unique.
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
        """The names of all entries, in order."""
        _load_plugins()
        return tuple(self._entries)

    def built_in(self) -> tuple[Entry, ...]:
        """The entries of this package alone; loads no plug-in."""
        return tuple(entry for name, entry in self._entries.items() if name not in self._plugins)

    def plugin_of(self, name: str) -> Plugin | None:
        """The plug-in that an entry comes from; None for a built-in one."""
        return self._plugins.get(self[name].name)

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            UnknownEntryError: there is none.
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
    """The name of an entry of one registry; it equals and hashes as its text does, and pickles by it.

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
    """Name and version of the plug-ins that some entries come from, sorted; empty where all are built in."""
    found = {registry.plugin_of(name) for registry, name in used}
    return {plugin.name: plugin.version for plugin in sorted(found - {None}, key=str) if plugin is not None}


def resolved(reference: Any, package: str | None = None) -> Any:
    """What a description refers to: `module:attribute` is imported now, anything else is given back as it is.

    A reference keeps a description light: names and letters are known without importing torch.

    Args:
        reference: such as `my_package.attention:MEAN`, or `.treatments:WINDOW` relative to `package`.
        package: that relative references start from.

    Raises:
        EntryReferenceError: what a plug-in refers to cannot be loaded; the message names it.
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
    """Raises a ValueError where plug-ins that `what` was made with, version by name, are not there.

    A checkpoint that is loaded by its own copy of this file has no plug-ins: they need this package to be installed.
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
    """The module that knows plug-ins; None in a copy of this file inside a checkpoint, which stands alone."""
    try:
        return importlib.import_module(".plugins", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.plugins":
            raise
        return None
