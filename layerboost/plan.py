"""Plans: which treatment each layer's attention gets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .registry import OpenName, Registry, check_plugins, resolved, used_plugins


class PlanError(ValueError):
    """A plan that cannot be meant: the message names the value and the remedy."""


@dataclass(frozen=True)
class TreatmentEntry:
    """What is known of a treatment wherever it is named, drawn, counted or computed.

    Attributes:
        name: as recipes and tables have it; also of the submodule that holds its weights, if it has some.
        letter: of plan strings, one capital letter.
        summary: one line for messages and help.
        mechanism: how a layer computes with it: a `layerboost.treatments.Mechanism`, or where one is (`module:name`).
        fill, ink: colours of a layer in pictures, and of its letter on it.
        needs_window: whether it looks at the plan's window.
        has_weights: whether it has parameters of its own, which attention transfer fits before healing.
        is_middle: whether it may stand between removal and softmax (`search.middle`).
        depth: how much of softmax attention is taken away, from 0 (softmax) to 1 (none): baselines deal out the deepest
            first.
    """

    name: str
    letter: str
    summary: str
    mechanism: Any
    fill: str
    ink: str = "#000001"
    needs_window: bool = False
    has_weights: bool = False
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
    ),
    unique=("letter",),
)
"""What may become of a layer's attention, in the order of columns and legends; plug-ins add theirs behind these."""


class Treatment(OpenName):
    """What becomes of one layer's attention: a name of `TREATMENTS`, one object each."""

    __slots__ = ()
    registry = TREATMENTS

    SOFTMAX: ClassVar[Treatment]
    """Kept as the parent has it."""
    LINEAR_WINDOW: ClassVar[Treatment]
    """Softmax inside a sliding window, linear attention over everything older, one shared denominator."""
    WINDOW: ClassVar[Treatment]
    """Softmax inside a sliding window only."""
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
    def mechanism(self) -> Any:
        """How a layer computes with it, a `Mechanism`; imports torch."""
        return resolved(self.entry.mechanism, __package__)


Treatment.SOFTMAX, Treatment.LINEAR_WINDOW = Treatment("softmax"), Treatment("linear_window")
Treatment.WINDOW, Treatment.NONE = Treatment("window"), Treatment("none")


def letters_help(separator: str = ", ") -> str:
    """Every letter with its treatment, such as `S (softmax), N (none)`."""
    return separator.join(f"{entry.letter} ({entry.name})" for entry in TREATMENTS)


@dataclass(frozen=True)
class Plan:
    """One treatment for each layer, first layer first, and the window in tokens that the windowed ones share.

    `window` is None where no layer needs one, so that equal plans are equal objects with equal ids.
    """

    treatments: tuple[Treatment, ...]
    window: int | None = None

    def __post_init__(self) -> None:
        treatments = tuple(Treatment(treatment) for treatment in self.treatments)
        if not treatments:
            letters = ", ".join(entry.letter for entry in TREATMENTS)
            raise PlanError(f"plan: '' has no layers; give one letter of {letters} for each layer")
        needs_window = any(treatment.needs_window for treatment in treatments)
        if needs_window and (self.window is None or self.window < 1):
            windowed = " and ".join(entry.letter for entry in TREATMENTS if entry.needs_window)
            raise PlanError(f"window: {self.window} is too small for the {windowed} layers; give at least 1 token")
        object.__setattr__(self, "treatments", treatments)
        object.__setattr__(self, "window", self.window if needs_window else None)

    @classmethod
    def parse(cls, text: str, window: int | None = None) -> Plan:
        """Reads a plan string such as `NSSLLN`.

        Raises:
            PlanError: a letter that no treatment has, no letters, or a window missing for a windowed treatment.
        """
        letters = text.strip().upper()
        by_letter = {entry.letter: entry.name for entry in TREATMENTS.built_in()}
        if not set(letters) <= set(by_letter):
            by_letter = {entry.letter: entry.name for entry in TREATMENTS}
        if unknown := sorted(set(letters) - set(by_letter)):
            raise PlanError(f"plan: '{text}' holds {', '.join(map(repr, unknown))}; use {letters_help()}")
        return cls(tuple(Treatment(by_letter[letter]) for letter in letters), window)

    @classmethod
    def uniform(cls, treatment: Treatment, n_layers: int, window: int | None = None) -> Plan:
        return cls((treatment,) * n_layers, window)

    def with_layer(self, layer: int, treatment: Treatment, window: int | None = None) -> Plan:
        """The same plan with one layer treated otherwise; `window` is needed where the plan has none yet."""
        treatments = list(self.treatments)
        treatments[layer] = treatment
        return Plan(tuple(treatments), self.window if window is None else window)

    def check_length(self, n_layers: int) -> None:
        """Raises PlanError unless the plan has one letter for each of the model's `n_layers` layers."""
        if len(self) != n_layers:
            raise PlanError(f"plan: '{self}' has {len(self)} letters; the model has {n_layers} layers, give one each")

    def count(self, treatment: Treatment) -> int:
        return self.treatments.count(treatment)

    @property
    def has_weights(self) -> bool:
        """Whether any layer gets parameters of its own, which attention transfer fits."""
        return any(treatment.has_weights for treatment in set(self.treatments))

    @property
    def plugins(self) -> dict[str, str]:
        """Name and version of the plug-ins that its treatments come from."""
        return used_plugins((TREATMENTS, treatment.value) for treatment in dict.fromkeys(self.treatments))

    def to_dict(self) -> dict:
        return {"plan": str(self), "window": self.window}

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
        """The plan that `to_dict` wrote, or that a checkpoint's configuration holds.

        Raises:
            PlanError: not a plan; see `parse`.
            ValueError: it names plug-ins (`plugins`: version by name) that are not there.
        """
        check_plugins(data.get("plugins") or {}, f"the plan {data['plan']}")
        return cls.parse(data["plan"], data.get("window"))

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
    drops: Sequence[float], remove_below: float, keep_above: float, middle: Treatment, window: int | None
) -> Plan:
    """Sorts layers into the three tiers by their sensitivity (LayerBoost's rule).

    Args:
        drops: sensitivity of each layer to the removal of its attention, first layer first; positive is worse.
        remove_below: layers whose drop is below this lose their attention.
        keep_above: layers whose drop is at or above this keep softmax attention.
        middle: treatment of the layers between the two.
        window: window in tokens for the middle treatment.

    Raises:
        PlanError: the thresholds are crossed.
    """
    if remove_below > keep_above:
        raise PlanError(f"remove_below: {remove_below} is above keep_above {keep_above}; swap or move them apart")
    tiers = (
        Treatment.NONE if drop < remove_below else Treatment.SOFTMAX if drop >= keep_above else middle for drop in drops
    )
    return Plan(tuple(tiers), window)
