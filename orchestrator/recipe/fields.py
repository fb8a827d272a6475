"""Defines the base class of a recipe's sections, and the types and checks of their fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import PydanticCustomError, core_schema

AUTO = "auto"
DEFAULT_SEQUENCE_TOKENS = 512


def as_number(value: Any) -> Any:
    """Turns a text such as `1e7`, as YAML reads it, into a number; refuses `true`, which would silently become 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


@dataclass(frozen=True)
class AutoOr:
    """Checks that a value is `auto`, or a number of a kind that is not below a minimum.

    Attributes:
        kind: `int` for whole numbers.
        minimum: The smallest number allowed.
        words: Description of the allowed numbers, for the message.
    """

    kind: type[int | float]
    minimum: float
    words: str

    def __call__(self, value: Any) -> Any:
        if value == AUTO:
            return AUTO
        try:
            number = float(as_number(value))
            if not self.minimum <= number < float("inf") or (self.kind is int and not number.is_integer()):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"must be auto or {self.words}") from None
        return self.kind(number)


def unique_entries(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses a list that names an entry twice."""
    if len(set(value)) != len(value):
        raise ValueError("names the same entry twice; keep one")
    return value


class OneOf:
    """Checks a name against a list of allowed names, like the type `Literal`, but with names that plug-ins can add.

    Args:
        names: Names, or functions that give some; they are called when a value is checked or the schema is written.
    """

    def __init__(self, *names: str | Callable[[], Iterable[str]]):
        self._names = names

    def known(self) -> list[str]:
        """Returns the allowed names, in order."""
        return [name for given in self._names for name in ([given] if isinstance(given, str) else given())]

    def __call__(self, value: Any) -> str:
        known = self.known()
        if isinstance(value, str) and value in known:
            return str(value)
        listed = [repr(name) for name in known]
        expected = " or ".join(filter(None, (", ".join(listed[:-1]), listed[-1])))
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(schema), "enum": self.known()}


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Count = Annotated[int, BeforeValidator(as_number), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(as_number), Field(ge=0)]
Number = Annotated[float, BeforeValidator(as_number)]
Name = Annotated[str, AfterValidator(_not_blank)]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(AutoOr(int, 1, "a whole number of at least 1"))]


class Section(BaseModel):
    """Represents a section of a recipe: a frozen mapping of known fields."""

    # Pydantic protects the prefix `model_`, but the recipe's first section is called `model`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def resolve_sequence_tokens(sequence_tokens: int | None, context_tokens: int | None) -> int:
    """Returns the tokens of a sequence: the given number, else 512 or the model's context if that is shorter."""
    if sequence_tokens is not None:
        return sequence_tokens
    return min(DEFAULT_SEQUENCE_TOKENS, context_tokens or DEFAULT_SEQUENCE_TOKENS)
