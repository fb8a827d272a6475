"""Plans: which treatment each layer's attention gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class PlanError(ValueError):
    """A plan that cannot be meant: the message names the value and the remedy."""


class Treatment(StrEnum):
    """What becomes of one layer's attention."""

    SOFTMAX = "softmax"
    """Kept as the parent has it."""
    LINEAR_WINDOW = "linear_window"
    """Softmax inside a sliding window, linear attention over everything older, one shared denominator."""
    WINDOW = "window"
    """Softmax inside a sliding window only."""
    NONE = "none"
    """Attention and the norm that only it used are removed; the residual passes."""

    @property
    def letter(self) -> str:
        return self.value[0].upper()

    @property
    def needs_window(self) -> bool:
        return self in (Treatment.WINDOW, Treatment.LINEAR_WINDOW)


_BY_LETTER = {treatment.letter: treatment for treatment in Treatment}


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
            raise PlanError("plan: '' has no layers; give one letter of S, L, W, N for each layer")
        needs_window = any(treatment.needs_window for treatment in treatments)
        if needs_window and (self.window is None or self.window < 1):
            raise PlanError(f"window: {self.window} is too small for the L and W layers; give at least 1 token")
        object.__setattr__(self, "treatments", treatments)
        object.__setattr__(self, "window", self.window if needs_window else None)

    @classmethod
    def parse(cls, text: str, window: int | None = None) -> Plan:
        """Reads a plan string such as `NSSLLN`.

        Raises:
            PlanError: a letter other than S, L, W, N, no letters, or a window missing for L or W.
        """
        unknown = sorted(set(text.strip().upper()) - set(_BY_LETTER))
        if unknown:
            raise PlanError(
                f"plan: '{text}' holds {', '.join(map(repr, unknown))}; "
                "use S (softmax), L (linear_window), W (window), N (none)"
            )
        return cls(tuple(_BY_LETTER[letter] for letter in text.strip().upper()), window)

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

    def to_dict(self) -> dict:
        return {"plan": str(self), "window": self.window}

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
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
