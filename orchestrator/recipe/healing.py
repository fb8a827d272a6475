"""Defines the recipe's `healing` section: which plans are distilled, on which text, by which loss, against what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from layerboost.healing.divergences import DIVERGENCES
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import (
    Count,
    CountOrZero,
    Name,
    Number,
    OneOf,
    Section,
    as_number,
    resolve_sequence_tokens,
    unique_entries,
)

if TYPE_CHECKING:
    from layerboost.healing.spec import HealingSpec
    from layerboost.text.sources import TextSource

SAMPLED: Final = "sampled"

Share = Annotated[Number, Field(gt=0, lt=1)]
Weight = Annotated[Number, Field(ge=0)]


class HealingText(Section):
    """Describes one source of the text that plans are healed on.

    Attributes:
        path: a local `.txt`, `.jsonl` or `.parquet` file or a hub dataset; `sampled` text has no path.
        weight: the source's share of the tokens, relative to the other sources. The default is 1, but `sampled` text
            must name a weight.
        split: the split of a hub dataset; the default is `healing.split`.
        field: the field of a record that holds the text or the conversation; the default is `healing.field`.
        format: `text`, `chat` (lists of role and content; only the assistant's tokens are learnt) or `sampled` (text
            that the parent itself writes).
        temperature: temperature at which `sampled` text is written; the default is 1.
    """

    path: Name | None = None
    weight: Annotated[Number, Field(gt=0)] | None = None
    split: Name | None = None
    field: Name | None = None
    format: Literal["text", "chat", "sampled"] = "text"
    temperature: Annotated[Number, Field(gt=0)] | None = None

    def source(self) -> TextSource:
        """Returns a file or hub dataset as healing takes it."""
        from layerboost.text.sources import TextSource

        assert self.path is not None and self.format != SAMPLED
        return TextSource(self.path, self.weight or 1.0, self.split or "train", self.field, self.format)


class HalvingSection(Section):
    """Applies successive halving over tokens: it heals many plans on a part of the budget and keeps the best.

    Each rung heals its plans from the start with more tokens; the last one heals `healing.candidates` plans on the
    whole budget. Shares of the budget rise and numbers of plans fall in equal ratios.

    Attributes:
        plans: number of plans that are healed in the first rung; more than `healing.candidates`.
        first: the first rung's share of the budget.
        rungs: number of rungs before the whole budget.
    """

    plans: Annotated[int, BeforeValidator(as_number), Field(ge=2)] = 18
    first: Share = 0.1
    rungs: Count = 1


def _or_one_name(schema: dict[str, Any]) -> None:
    """Allows in a JSON Schema a name in place of a list with one source."""
    listed = {name: schema.pop(name) for name in ("items", "type")}
    schema["anyOf"] = [{"type": "string", "minLength": 1}, listed, {"type": "null"}]


class HealingSection(Section):
    """Configures distillation from the untouched parent, or from a larger teacher.

    The fields from `zero_stage` on change memory and safety and no result.

    Attributes:
        tokens: budget of each healed plan in tokens, over both phases; 0 heals nothing.
        text: a file or hub name, or a list of sources that are mixed by weight.
        split: the split of hub datasets that name none.
        field: the field of sources that name none; the default is `text`, or `messages` for conversations.
        documents: a sequence is packed from documents; `apart` keeps attention inside each document, `joined` lets it
            read across them.
        candidates: number of searched plans that are healed on the whole budget.
        halving: heal many plans on few tokens and the most promising on all of them; without a value this is off.
        baselines: plans by other rules that are healed on the same tokens: `parent` (the control: nothing is treated),
            `window`, `linear_window`, `linear`, `interleaved_1/2` (any share below one), and at each candidate's own
            attention budget `interleaved`, `cosine`, `first`, `last`, `random` or `random:3`.
        curve: shares of the budget at which quality is measured, besides 0 and 1; an empty list measures no curve.
        teacher: a larger model with the same tokenizer to learn from, named as `model.path` is; the default is the
            parent.
        teacher_revision: a branch, tag or commit of the teacher.
        method: `lora` trains adapters on every projection and merges them at the end; `full` trains every parameter of
            a copy.
        rank: rank of the adapters.
        alpha: scale of the adapters; the default is the rank.
        learning_rate: peak learning rate of the healing phase; the default is 0.5 (`lora`) or 0.1 (`full`) divided by
            the model's width.
        batch_sequences: sequences of one step, over all workers.
        sequence_tokens: tokens in a sequence; without a value 512, or the model's context if that is shorter.
        transfer_fraction: share of the tokens for attention transfer, for plans with linear_window layers.
        transfer_learning_rate: peak learning rate of the transfer phase.
        divergence: divergence of the student's next token from the teacher's.
        temperature: temperature by which the divergence divides the logits of both models.
        divergence_weight: weight of the divergence in the loss.
        cross_entropy_weight: weight of the text's own cross-entropy in the loss.
        hidden_weight: weight of the squared error of every layer's hidden state, relative to the teacher's variance.
        window_dropout: probability that a linear_window layer sees only a shorter window for one step, so that its
            linear branch must carry the rest.
        stop_when_flat: end a candidate early once two tenths of the budget bring less than this share of the fall of
            its held-out divergence so far; without a value the whole budget is spent.
        seed: seed of the adapters and of the order of the text.
        zero_stage: DeepSpeed's ZeRO stage: 1 divides the optimizer's state among the workers, 2 also the gradients, 3
            also the weights.
        transfer: fit the feature maps of all linear_window layers in one pass (`together`), or each layer in a separate
            task (`by_layer`), which needs less memory and gives the same result.
        micro_batch_sequences: maximum number of sequences that a worker runs at once; the default is its whole share of
            a step.
        offload_optimizer: keep the optimizer's state in the memory of the CPU. It needs `zero_stage` 1 or above.
        activation_checkpointing: run the student's layers again in the backward pass instead of keeping activations.
        checkpoint_every_steps: number of steps between two checkpoints, from which an interrupted healing resumes.
        max_failures: number of worker failures that a healing survives.
        teacher_cache_gib: size of the teacher's hidden states that are kept in a run folder on a disk while several
            plans heal on the same text, so that they are computed once; 0 keeps none.
    """

    tokens: CountOrZero = 0
    text: tuple[HealingText, ...] = Field(default=(), json_schema_extra=_or_one_name)
    split: Name = "train"
    field: Name | None = None
    documents: Literal["joined", "apart"] = "joined"
    candidates: Count = 3
    halving: HalvingSection | None = None
    baselines: Annotated[tuple[Name, ...], AfterValidator(unique_entries)] = ()
    curve: Annotated[tuple[Share, ...], AfterValidator(unique_entries)] = (0.01, 0.03, 0.1, 0.3)
    teacher: Name | None = None
    teacher_revision: str | None = None
    method: Literal["lora", "full"] = "lora"
    rank: Count = 32
    alpha: Annotated[Number, Field(gt=0)] | None = None
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    batch_sequences: Count = 4
    sequence_tokens: Annotated[int, BeforeValidator(as_number), Field(ge=2)] | None = None
    transfer_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    transfer_learning_rate: Annotated[Number, Field(gt=0)] = 5e-2
    divergence: Annotated[str, OneOf(DIVERGENCES.names)] = "forward_kl"
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    divergence_weight: Weight = 1.0
    cross_entropy_weight: Weight = 0.0
    hidden_weight: Weight = 0.0
    window_dropout: Annotated[Number, Field(ge=0, le=1)] = 0.0
    stop_when_flat: Share | None = None
    seed: CountOrZero = 0
    # The following fields change memory and safety, not results.
    zero_stage: Annotated[int, BeforeValidator(as_number), Field(ge=0, le=3)] = 2
    transfer: Literal["together", "by_layer"] = "together"
    micro_batch_sequences: Count | None = None
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    checkpoint_every_steps: Count = 50
    max_failures: CountOrZero = 3
    teacher_cache_gib: Weight = 8.0

    @field_validator("text", mode="before")
    @classmethod
    def _one_source_by_its_name(cls, value: Any) -> Any:
        if value is None:
            return ()
        return ({"path": value},) if isinstance(value, str) else value

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            from layerboost.search.baselines import BaselineError, check_baseline

            for index, name in enumerate(names):
                try:
                    check_baseline(name)
                except BaselineError as error:
                    remedy = str(error).removeprefix(f"baseline: '{name}' ")
                    raise InputError(f"healing.baselines[{index}]", name, remedy) from None
        return names

    @model_validator(mode="after")
    def _fields_agree(self) -> HealingSection:
        if self.tokens > 0 and not self.text:
            raise InputError(
                "healing.text",
                None,
                f"needed to heal on {self.tokens} tokens; give a file, a hub name, or a list of sources",
            )
        for index, text in enumerate(self.text):
            _check_text(f"healing.text[{index}]", text)
        if sum(text.format == SAMPLED for text in self.text) > 1:
            raise InputError("healing.text", SAMPLED, "is in the list twice; keep one source of sampled text")
        if not (self.divergence_weight or self.cross_entropy_weight or self.hidden_weight):
            raise InputError(
                "healing.divergence_weight",
                self.divergence_weight,
                "leaves no loss; give it, cross_entropy_weight or hidden_weight a value above 0",
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise InputError("healing.offload_optimizer", True, "needs healing.zero_stage 1, 2 or 3; give one of them")
        if self.halving is not None and self.halving.plans <= self.candidates:
            raise InputError(
                "healing.halving.plans",
                self.halving.plans,
                f"leaves nothing to choose for healing.candidates {self.candidates}; give more, or leave halving out",
            )
        if self.teacher is None and self.teacher_revision is not None:
            raise InputError("healing.teacher_revision", self.teacher_revision, "has no healing.teacher; give both")
        return self

    def named_sources(self) -> Iterator[tuple[str, HealingText]]:
        """Yields each source with all its defaults filled in, and its name in errors."""
        for index, text in enumerate(self.text):
            name = "healing.text" if len(self.text) == 1 else f"healing.text[{index}].path"
            yield (
                name,
                text.model_copy(
                    update={
                        "weight": 1.0 if text.weight is None else text.weight,
                        "split": text.split or self.split,
                        "field": text.field or self.field,
                    }
                ),
            )

    def spec(self, context_tokens: int | None) -> HealingSpec:
        """Returns the section as `layerboost.healing.spec` takes it, for a model with this context length."""
        from layerboost.healing.spec import HealingSpec

        shared = {field.name for field in fields(HealingSpec)} & set(type(self).model_fields)
        values = {name: getattr(self, name) for name in shared}
        return HealingSpec(
            **values | {"sequence_tokens": resolve_sequence_tokens(self.sequence_tokens, context_tokens)}
        )


def _check_text(name: str, text: HealingText) -> None:
    if text.format == SAMPLED:
        if text.path is not None:
            raise InputError(f"{name}.path", text.path, "sampled text comes from the model; leave the path out")
        if text.weight is None:
            raise InputError(f"{name}.weight", None, "sampled text needs a share of the tokens; give a number above 0")
        for field in ("split", "field"):
            if getattr(text, field) is not None:
                raise InputError(f"{name}.{field}", getattr(text, field), "sampled text has none; leave it out")
        return
    if text.path is None:
        raise InputError(f"{name}.path", None, "needed; give a file or a hub name, or the format sampled")
    if text.temperature is not None:
        raise InputError(f"{name}.temperature", text.temperature, "is a field of sampled text only; leave it out")
