"""Defines plans, which assign a treatment to each layer's attention."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .registry import OpenName, Registry, check_plugins, resolved, used_plugins


class PlanError(ValueError):
    """Reports an invalid plan; the message names the value and the remedy."""


@dataclass(frozen=True)
class TreatmentEntry:
    """Describes a treatment to all code that names, draws, counts or computes it.

    Attributes:
        name: Name in recipes and tables, and of the submodule that holds its weights, if it has any.
        letter: Its letter in plan strings, a capital letter.
        summary: One line for messages and help.
        mechanism: A `layerboost.treatments.Mechanism`, which says how a layer computes with it, or a reference to one
            (`module:name`).
        fill, ink: Colours of a layer in pictures, and of its letter on it.
        needs_window: Whether it uses the plan's window.
        has_weights: Whether it has additional parameters. Attention transfer fits them before healing.
        is_fitted: Whether least squares fit them instead (`layerboost.affine`).
        is_middle: Whether it may be used between removal and softmax (`search.middle`).
        depth: How much of softmax attention it takes away, from 0 (softmax) to 1 (none). Baselines assign the deepest
            treatments first.
    """

    name: str
    letter: str
    summary: str
    mechanism: Any
    fill: str
    ink: str = "#000001"
    needs_window: bool = False
    has_weights: bool = False
    is_fitted: bool = False
    is_middle: bool = True
    depth: float = 0.5

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Z]", self.letter):
            raise ValueError(f"letter: '{self.letter}' of treatment {self.name} must be one capital letter, A to Z")
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name: '{self.name}' must be small letters, digits and _; it names columns and modules")


TREATMENTS: Registry[TreatmentEntry] = Registry(
    "treatment",
    (
        TreatmentEntry(
            "softmax",
            "S",
            "kept as the parent has it",
            ".treatments:SOFTMAX",
            "#0072b2",
            "#fefefe",
            is_middle=False,
            depth=0.0,
        ),
        TreatmentEntry(
            "linear_window",
            "L",
            "softmax inside the window, linear attention over everything older",
            ".treatments:LINEAR_WINDOW",
            "#e69f00",
            needs_window=True,
            has_weights=True,
            depth=0.4,
        ),
        TreatmentEntry(
            "window",
            "W",
            "softmax inside the window only",
            ".treatments:WINDOW",
            "#56b4e9",
            needs_window=True,
            depth=0.6,
        ),
        TreatmentEntry(
            "none",
            "N",
            "attention and the norm that only it used are removed",
            ".treatments:NONE",
            "#c3c8ce",
            is_middle=False,
            depth=1.0,
        ),
        TreatmentEntry(
            "affine",
            "A",
            "attention is removed, and an affine map of its input, fitted to its output, stays in its place",
            ".treatments:AFFINE",
            "#009e73",
            "#fefefe",
            has_weights=True,
            is_fitted=True,
            is_middle=False,
            depth=0.8,
        ),
    ),
    unique=("letter",),
)
"""The treatments of a layer's attention, in the order of columns and legends; plug-ins append to them."""


class Treatment(OpenName):
    """Names the treatment of one layer's attention; there is one object for each name in `TREATMENTS`."""

    __slots__ = ()
    registry = TREATMENTS

    SOFTMAX: ClassVar[Treatment]
    """Attention stays as the parent has it."""
    LINEAR_WINDOW: ClassVar[Treatment]
    """Softmax inside a sliding window, linear attention over everything older, one shared denominator."""
    WINDOW: ClassVar[Treatment]
    """Softmax inside a sliding window only."""
    AFFINE: ClassVar[Treatment]
    """Attention is removed; an affine map of its input, fitted to its output, stays in its place."""
    NONE: ClassVar[Treatment]
    """Attention and the norm that only it used are removed; the residual passes."""

    @property
    def entry(self) -> TreatmentEntry:
        return TREATMENTS[self.value]

    @property
    def letter(self) -> str:
        return self.entry.letter

    @property
    def needs_window(self) -> bool:
        return self.entry.needs_window

    @property
    def has_weights(self) -> bool:
        return self.entry.has_weights

    @property
    def is_transferred(self) -> bool:
        """Whether attention transfer fits its parameters before healing."""
        return self.entry.has_weights and not self.entry.is_fitted

    @property
    def mechanism(self) -> Any:
        """The `Mechanism` by which a layer computes with it; reading it imports torch."""
        return resolved(self.entry.mechanism, __package__)


Treatment.SOFTMAX, Treatment.LINEAR_WINDOW = Treatment("softmax"), Treatment("linear_window")
Treatment.WINDOW, Treatment.AFFINE, Treatment.NONE = Treatment("window"), Treatment("affine"), Treatment("none")


def letters_help(separator: str = ", ") -> str:
    """Returns every letter with its treatment, such as `S (softmax), N (none)`."""
    return separator.join(f"{entry.letter} ({entry.name})" for entry in TREATMENTS)


@dataclass(frozen=True)
class Plan:
    """Assigns a treatment to each layer, first layer first; all windowed layers share one window.

    Attributes:
        treatments: The treatment of each layer.
        window: Tokens that a windowed layer sees by softmax. It is None if no layer needs one, so that equal plans are
            equal objects with equal ids.
        sinks: How many of the window's tokens are the first ones of the sequence; the others are the newest ones. It is
            0 if no layer needs a window.
    """

    treatments: tuple[Treatment, ...]
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        treatments = tuple(Treatment(treatment) for treatment in self.treatments)
        if not treatments:
            letters = ", ".join(entry.letter for entry in TREATMENTS)
            raise PlanError(f"plan: '' has no layers; give one letter of {letters} for each layer")
        needs_window = any(treatment.needs_window for treatment in treatments)
        if needs_window and (self.window is None or self.window < 1):
            windowed = " and ".join(entry.letter for entry in TREATMENTS if entry.needs_window)
            raise PlanError(f"window: {self.window} is too small for the {windowed} layers; give at least 1 token")
        if needs_window and not 0 <= self.sinks < (self.window or 0):
            raise PlanError(
                f"sinks: {self.sinks} must leave room for a newest token in the window of {self.window}; "
                f"give 0 to {(self.window or 0) - 1}"
            )
        object.__setattr__(self, "treatments", treatments)
        object.__setattr__(self, "window", self.window if needs_window else None)
        object.__setattr__(self, "sinks", self.sinks if needs_window else 0)

    @classmethod
    def parse(cls, text: str, window: int | None = None, sinks: int = 0) -> Plan:
        """Reads a plan string such as `NSSLLN`.

        Raises:
            PlanError: A letter belongs to no treatment, there are no letters, or a windowed treatment has no window.
        """
        letters = text.strip().upper()
        by_letter = {entry.letter: entry.name for entry in TREATMENTS.built_in()}
        if not set(letters) <= set(by_letter):
            by_letter = {entry.letter: entry.name for entry in TREATMENTS}
        if unknown := sorted(set(letters) - set(by_letter)):
            raise PlanError(f"plan: '{text}' holds {', '.join(map(repr, unknown))}; use {letters_help()}")
        return cls(tuple(Treatment(by_letter[letter]) for letter in letters), window, sinks)

    @classmethod
    def uniform(cls, treatment: Treatment, n_layers: int, window: int | None = None, sinks: int = 0) -> Plan:
        return cls((treatment,) * n_layers, window, sinks)

    def with_layer(self, layer: int, treatment: Treatment, window: int | None = None, sinks: int = 0) -> Plan:
        """Returns the plan with another treatment of one layer.

        `window` and `sinks` are needed if the plan has no window yet; without a window the plan keeps its own.
        """
        treatments = list(self.treatments)
        treatments[layer] = treatment
        kept = (self.window, self.sinks) if window is None else (window, sinks)
        return Plan(tuple(treatments), *kept)

    def check_length(self, n_layers: int) -> None:
        """Raises PlanError unless the plan has one letter for each of the model's `n_layers` layers."""
        if len(self) != n_layers:
            raise PlanError(f"plan: '{self}' has {len(self)} letters; the model has {n_layers} layers, give one each")

    def count(self, treatment: Treatment) -> int:
        return self.treatments.count(treatment)

    @property
    def is_untouched(self) -> bool:
        """Whether every layer keeps softmax attention, so that the plan stands for the untouched model."""
        return self.count(Treatment.SOFTMAX) == len(self)

    @property
    def is_transferred(self) -> bool:
        """Whether any layer gets parameters that attention transfer fits before healing."""
        return any(treatment.is_transferred for treatment in set(self.treatments))

    def layers(self, treatment: Treatment) -> list[int]:
        """Returns the layers with a treatment, from 0."""
        return [layer for layer, found in enumerate(self.treatments) if found is treatment]

    @property
    def plugins(self) -> dict[str, str]:
        """The plug-ins of its treatments, version by name."""
        return used_plugins((TREATMENTS, treatment.value) for treatment in dict.fromkeys(self.treatments))

    @property
    def newest_tokens(self) -> int | None:
        """How many of the window's tokens are the newest ones; None if no layer needs a window."""
        return None if self.window is None else self.window - self.sinks

    def to_dict(self) -> dict:
        sinks = {"sinks": self.sinks} if self.sinks else {}  # plans without sinks keep the ids that they always had
        return {"plan": str(self), "window": self.window, **sinks}

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
        """Reads a plan that `to_dict` wrote, or that a checkpoint's configuration holds.

        Raises:
            PlanError: The data hold no valid plan; see `parse`.
            ValueError: The data name plug-ins (`plugins`: version by name) that are not installed.
        """
        check_plugins(data.get("plugins") or {}, f"the plan {data['plan']}")
        return cls.parse(data["plan"], data.get("window"), data.get("sinks") or 0)

    @property
    def plan_id(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical plan."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return "".join(treatment.letter for treatment in self.treatments)

    def __len__(self) -> int:
        return len(self.treatments)


def plan_from_thresholds(
    drops: Sequence[float],
    remove_below: float,
    keep_above: float,
    middle: Treatment,
    window: int | None,
    sinks: int = 0,
    removed: Treatment = Treatment.NONE,
) -> Plan:
    """Sorts layers into the three tiers by their sensitivity (LayerBoost's rule).

    Args:
        drops: Sensitivity of each layer to `removed`, first layer first; positive is worse.
        remove_below: Layers whose drop is below this get `removed`.
        keep_above: Layers whose drop is at or above this keep softmax attention.
        middle: Treatment of the layers between the two.
        window, sinks: Window and sinks in tokens for the middle treatment.
        removed: Treatment of the layers below the lower threshold.

    Raises:
        PlanError: `remove_below` is above `keep_above`.
    """
    if remove_below > keep_above:
        raise PlanError(f"remove_below: {remove_below} is above keep_above {keep_above}; swap or move them apart")
    tiers = (removed if drop < remove_below else Treatment.SOFTMAX if drop >= keep_above else middle for drop in drops)
    return Plan(tuple(tiers), window, sinks)
