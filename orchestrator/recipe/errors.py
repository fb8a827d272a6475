"""Defines the error of bad input and formats the values and names in it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that is not empty; library messages often have many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def without_prefix(error: Exception, prefix: str) -> str:
    """Returns the message of an error without the field that it names first."""
    return first_line(error).removeprefix(f"{prefix}: ")


_MAX_VALUE_CHARS = 160


class InputError(ValueError):
    """Reports an input that cannot be used.

    Attributes:
        field: the dotted name of the field (`search.window`) or the name of an argument (`--out`).
        value: the value that was given.
        remedy: what is wrong with the value and what to write instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{field}: {one_line(value)}: {one_line(remedy, limit=600)}")


def one_line(value: object, *, limit: int = _MAX_VALUE_CHARS) -> str:
    """Writes any value on one line, shortened in the middle when it is long."""
    text = " ".join(str(value).split()) if value is not None else "missing"
    if text == "":
        text = "(empty)"
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns `did you mean X?` for the known name nearest to `name`, or an empty string."""
    folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(str(name).lower(), list(folded), n=1, cutoff=0.6)
    return f"did you mean {folded[matches[0]]}?" if matches else ""
