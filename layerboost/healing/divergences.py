"""The divergences that healing may minimise: how far the student's next token is from the teacher's.

Descriptions only: the arithmetic is in `losses.py`, so that a recipe is checked without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..registry import OpenName, Registry


@dataclass(frozen=True)
class DivergenceEntry:
    """One divergence.

    Attributes:
        name: as recipes have it.
        summary: one line for messages and help.
        value_and_gradient: a function, or where it is (`module:name`). From the logits of student and teacher (N, V) in
            fp32 it gives the divergence in nats (N,) and its gradient by the student's logits (N, V), a tensor of its
            own that the caller changes in place.
        fused_beta: the number by which the fused kernel (`fused_loss.py`) knows it; None where the kernel does not.
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
    """The name of a divergence, one object each."""

    __slots__ = ()
    registry = DIVERGENCES

    FORWARD_KL: ClassVar[Divergence]
    REVERSE_KL: ClassVar[Divergence]
    JENSEN_SHANNON: ClassVar[Divergence]


Divergence.FORWARD_KL, Divergence.REVERSE_KL = Divergence("forward_kl"), Divergence("reverse_kl")
Divergence.JENSEN_SHANNON = Divergence("jensen_shannon")
