"""What the sections of a recipe are made of: the error that every mistake becomes, and types of fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

AUTO = "auto"
DEFAULT_SEQUENCE_TOKENS = 512
_MAX_VALUE_CHARS = 160


class InputError(ValueError):
    """An input that cannot be used.

    Attributes:
        field: where the value stands, dotted (`search.window`) or the name of an argument (`--out`).
        value: what was given.
        remedy: what is wrong with it and what to write instead.
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


def as_number(value: Any) -> Any:
    """YAML reads `1e7` as a text, and `true` would silently become 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def auto_or(kind: type[int | float], minimum: float, words: str) -> Callable[[Any], Any]:
    """A check that lets `auto` pass, and numbers of a kind from `minimum` on."""

    def check(value: Any) -> Any:
        if value == AUTO:
            return AUTO
        try:
            number = float(as_number(value))
            if not minimum <= number < float("inf") or (kind is int and not number.is_integer()):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"must be auto or {words}") from None
        return kind(number)

    return check


def unique_entries(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses a list that names something twice."""
    if len(set(value)) != len(value):
        raise ValueError("names the same entry twice; keep one")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Count = Annotated[int, BeforeValidator(as_number), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(as_number), Field(ge=0)]
Number = Annotated[float, BeforeValidator(as_number)]
Name = Annotated[str, AfterValidator(_not_blank)]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(auto_or(int, 1, "a whole number of at least 1"))]


class Section(BaseModel):
    """A frozen mapping of known fields."""

    # `model_` is pydantic's own prefix; the recipe's first section is called `model`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def resolve_sequence_tokens(sequence_tokens: int | None, context_tokens: int | None) -> int:
    """The tokens of a sequence: as asked, else 512 or the model's context where that is shorter."""
    if sequence_tokens is not None:
        return sequence_tokens
    return min(DEFAULT_SEQUENCE_TOKENS, context_tokens or DEFAULT_SEQUENCE_TOKENS)
