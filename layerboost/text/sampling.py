"""Samples text from a model itself, which its student learns from when no other data may be used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingSpec:
    """Says how a model's own text is sampled; every token of the vocabulary can be drawn (no top-k or top-p).

    Attributes:
        max_tokens: Maximum number of tokens in a document, including the special token that it starts with.
        seed: Seed of all documents.
        temperature: Divisor of the logits.
        batch_size: Documents sampled at the same time; it changes speed and memory, not what is sampled.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens: {self.max_tokens} leaves nothing to sample; use at least 2")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} must be above 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} is below 1; use at least 1")


def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n_documents: int,
    max_tokens: int,
    *,
    seed: int,
    first: int = 0,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> list[list[int]]:
    """Samples documents from a model, starting from nothing but the token that begins a text.

    A document depends only on the model, the seed and its own number, up to the rounding of the logits, which can
    depend on the batch. Any number of workers can therefore share a set of documents. The global random state is not
    touched.

    Args:
        model: The model, on the device to sample on.
        tokenizer: The model's tokenizer; a document starts with its BOS, or with its EOS if it has no BOS.
        n_documents: Number of documents.
        first: Number of the first document; the others follow it.
        max_tokens, seed, temperature, batch_size: As in `SamplingSpec`.

    Returns:
        Token ids of each document. The first is a special token, and so is the last if the document ended before
        `max_tokens`.

    Raises:
        ValueError: A number is out of its range, documents would be longer than the model's positions, or the
            tokenizer has neither BOS nor EOS.
    """
    spec = SamplingSpec(max_tokens, seed, temperature, batch_size)
    if n_documents < 1 or first < 0:
        raise ValueError(f"n_documents: {n_documents} from number {first}; ask for at least 1, from number 0 or more")
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if n_positions is not None and max_tokens > n_positions:
        raise ValueError(f"max_tokens: {max_tokens} is more than the model's {n_positions} positions; use fewer")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: it has neither BOS nor EOS to start a document with; set tokenizer.bos_token")
    ends = _end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_tokens - 1,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else start,
    )
    documents: list[list[int]] = []
    with _ready_to_generate(model, config):
        for begin in range(first, first + n_documents, batch_size):
            numbers = range(begin, min(begin + batch_size, first + n_documents))
            input_ids = torch.full((len(numbers), 1), start, device=model.device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                logits_processor=LogitsProcessorList([_Noise(spec, numbers, model.device)]),
            )
            documents += [_document(row, ends) for row in generated.tolist()]
    return documents


class _Noise(LogitsProcessor):
    """Makes the largest score a sample: argmax(logits / temperature + Gumbel noise) is distributed as their softmax.

    Each document has its own noise generator, so that the other documents of its batch do not change it.
    """

    def __init__(self, spec: SamplingSpec, numbers: Sequence[int], device: torch.device):
        self.temperature = spec.temperature
        self.generators = [torch.Generator(device).manual_seed(_seed_of(spec.seed, number)) for number in numbers]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # In single precision the noise of a large vocabulary would repeat values and never draw rare tokens.
        noise = torch.empty_like(scores, dtype=torch.float64)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() / self.temperature - noise.log()  # type: ignore[return-value]


def _seed_of(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that the tokenizer or the model treats as the end of a text."""
    of_model: Any = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in [tokenizer.eos_token_id, *of_model] if token is not None})


def _document(row: list[int], ends: Sequence[int]) -> list[int]:
    """Returns a generated row up to and including its end token; the rest of the row is padding."""
    stop = next((place for place, token in enumerate(row[1:], start=2) if token in ends), len(row))
    return row[:stop]


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Puts the model into evaluation mode and makes `config` its only generation configuration.

    `generate` fills what a given configuration leaves open from the model's own one, which may hold, for example, a
    repetition penalty. Replacing the model's own configuration prevents this.
    """
    own, was_training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
