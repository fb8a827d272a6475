"""Lists the divergences of the student's next token from the teacher's that healing may minimise.

This file only describes them. The arithmetic is in `losses.py`, so that a recipe is checked without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..registry import OpenName, Registry


@dataclass(frozen=True)
class DivergenceEntry:
    """Describes one divergence.

    Attributes:
        name: Name in recipes.
        summary: One line for messages and help.
        value_and_gradient: A function, or a reference to one (`module:name`). From the logits of student and teacher
            (N, V) in fp32 it returns the divergence in nats (N,) and its gradient by the student's logits (N, V). The
            gradient must be a new tensor, because the caller changes it in place.
        fused_beta: Number by which the fused kernel (`fused_loss.py`) selects it; None if the kernel lacks it.
    """

    name: str
    summary: str
    value_and_gradient: Any
    fused_beta: float | None = None


DIVERGENCES: Registry[DivergenceEntry] = Registry(
    "divergence",
    (
        DivergenceEntry(
            "forward_kl", "KL(teacher || student): covers all that the teacher finds likely", ".losses:forward_kl", 0.0
        ),
        DivergenceEntry(
            "reverse_kl", "KL(student || teacher): avoids what the teacher finds unlikely", ".losses:reverse_kl", 1.0
        ),
        DivergenceEntry(
            "jensen_shannon", "mean of the KLs of both to their mean; at most ln 2", ".losses:jensen_shannon", 0.5
        ),
    ),
)


class Divergence(OpenName):
    """Names a divergence; there is one object for each name."""

    __slots__ = ()
    registry = DIVERGENCES

    FORWARD_KL: ClassVar[Divergence]
    REVERSE_KL: ClassVar[Divergence]
    JENSEN_SHANNON: ClassVar[Divergence]


Divergence.FORWARD_KL, Divergence.REVERSE_KL = Divergence("forward_kl"), Divergence("reverse_kl")
Divergence.JENSEN_SHANNON = Divergence("jensen_shannon")
