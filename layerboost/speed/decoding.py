"""Measures decoding of a live model: speed, memory and KV bytes, with caches that no step has to copy."""

from __future__ import annotations

import functools
import inspect
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from ..cache import LinearWindowLayer, PlanCache, cache_bytes, preallocated_cache
from ..families import head_dim, kv_heads, native_windows
from .hardware import PeakMemory, hardware_name

PREFILL_TOKENS = {"cpu": 256, "cuda": 16_384}
"""Tokens of all sequences in one call of a prefill; few enough for its activations to stay small beside the cache."""

MIN_PREFILL_CHUNK_TOKENS = 16


class DecodeSettingError(ValueError):
    """A condition cannot be measured; the message names the setting, its value and the remedy."""


@dataclass(frozen=True)
class DecodeMeasurement:
    """Holds the cost of one serving condition with the transformers engine: one greedy batch, prefill timed separately.

    Attributes:
        threads: Number of torch's CPU threads.
        output_throughput_tok_per_s: Concurrency x decode steps / decode seconds, where each step counts with its median
            over the repeats. The prefill, which gives each sequence its first token, is not included.
        output_throughput_stderr: Standard error of the mean of the repeats.
        ttft_ms_p50: Median over the repeats of the prefill's milliseconds (time to first token); 0 if the prompts were
            not read.
        tpot_ms_p50: Median over all decode steps of all repeats (time per output token, without the first token).
        peak_memory_mib: Bytes of the model's weights plus the growth over the last chunk of a prefill and a decode step
            with a cache for all tokens, as in `PeakMemory`.
        kv_bytes_per_token: Bytes by which the live cache grows for each token of one sequence, past every window.
    """

    engine: str
    hardware: str
    dtype: str
    threads: int
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    output_throughput_tok_per_s: float
    output_throughput_stderr: float
    ttft_ms_p50: float
    tpot_ms_p50: float
    peak_memory_mib: float
    kv_bytes_per_token: float
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    repeats_tok_per_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> DecodeMeasurement:
        return cls(**data)

    def scaled(self, factor: float) -> DecodeMeasurement:
        """Returns the measurement as it would have been on a machine `factor` times as fast."""
        return replace(
            self,
            output_throughput_tok_per_s=self.output_throughput_tok_per_s * factor,
            output_throughput_stderr=self.output_throughput_stderr * factor,
            ttft_ms_p50=self.ttft_ms_p50 / factor,
            tpot_ms_p50=self.tpot_ms_p50 / factor,
            prefill_s=[seconds / factor for seconds in self.prefill_s],
            decode_s=[seconds / factor for seconds in self.decode_s],
            repeats_tok_per_s=[speed * factor for speed in self.repeats_tok_per_s],
        )


def measure_decode(
    model: PreTrainedModel,
    *,
    concurrency: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 3,
    seed: int = 0,
    read_prompts: bool = True,
) -> DecodeMeasurement:
    """Times greedy decoding of `concurrency` random prompts through the model's own forward and cache.

    The end of a pass precedes the timed ones: the last chunk of the prefill, behind a cache that is filled with random
    numbers, and a decode step. It warms up, and the memory, of which this is the peak, is measured during it, so that
    the measurement does not disturb the timings. Every step ends with a synchronisation, as in a server that sends out
    each token.

    Args:
        model: A causal language model, converted or not, on the device to be measured.
        concurrency: Sequences decoded together in one batch.
        prompt_tokens: Length of each prompt; its tokens are drawn uniformly from the vocabulary.
        new_tokens: Tokens to generate for each sequence, at least 2, because the prefill gives the first.
        repeats: Number of timed passes, at least 3.
        seed: Seed of the prompts.
        read_prompts: False fills the cache with random numbers instead, to time decoding after a context that would
            take long to read. The steps cost the same.

    Raises:
        DecodeSettingError: A setting is too small, or there are more tokens than the model has positions.
    """
    return measure_together(
        [model],
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
        read_prompts=read_prompts,
    )[0]


@torch.inference_mode()
def measure_together(
    models: Sequence,
    *,
    concurrency: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 3,
    seed: int = 0,
    read_prompts: bool = True,
) -> list[DecodeMeasurement]:
    """Times models with one vocabulary on one device side by side, so that a drift of the machine affects all equally.

    Each of the `repeats` rounds has one pass of every model, in a new random order. How much slower a round was than
    the others is estimated from all models together and divided out of each pass. See `measure_decode` for the
    arguments.

    Returns:
        One measurement for each model, in order.
    """
    for model in models:
        _check_settings(model, concurrency, prompt_tokens, new_tokens, repeats)
        model.eval()
    prompts = random_tokens(models[0], concurrency, prompt_tokens, seed)
    n_filled = 0 if read_prompts else prompt_tokens - 1
    kv_bytes = [kv_bytes_per_token(model, seed=seed) for model in models]
    peaks_mib = []
    for model in models:
        chunk_tokens = prefill_chunk_tokens(model, concurrency)
        # Memory that libraries allocate once does not count.
        timed_generation(model, prompts[:, :chunk_tokens], 2)
        before_last = max(n_filled, prompt_tokens - chunk_tokens)
        with PeakMemory(model) as memory:
            timed_generation(model, prompts, 2, before_last, room_tokens=new_tokens)
        peaks_mib.append(memory.peak_mib)
    prefill_s = np.empty((len(models), repeats))
    steps_s = np.empty((len(models), repeats, new_tokens - 1))
    order = random.Random(seed)
    for repeat in range(repeats):
        for index in order.sample(range(len(models)), len(models)):
            prefill_s[index, repeat], steps_s[index, repeat], _ = timed_generation(
                models[index], prompts, new_tokens, n_filled
            )
    if not read_prompts:
        prefill_s[:] = 0.0
    slowness = _slowness_of_rounds(steps_s.sum(axis=2))
    prefill_s /= slowness
    steps_s /= slowness[:, None]
    # The slowness is estimated from the same passes and reduces their scatter; this factor compensates for it.
    spread = math.sqrt(len(models) / (len(models) - 1)) if len(models) > 1 else 1.0
    found = []
    for model, prefills_s, passes_s, kv, peak_mib in zip(models, prefill_s, steps_s, kv_bytes, peaks_mib, strict=True):
        decode_s = passes_s.sum(axis=1)
        throughput = concurrency * (new_tokens - 1) / decode_s
        found.append(
            DecodeMeasurement(
                engine="transformers",
                hardware=hardware_name(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                concurrency=concurrency,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                # The median is taken for each step: a disturbance by another process hits other steps in each pass,
                # whereas a step that is slow by itself is slow in every pass.
                output_throughput_tok_per_s=float(concurrency * (new_tokens - 1) / np.median(passes_s, axis=0).sum()),
                output_throughput_stderr=float(spread * throughput.std(ddof=1) / math.sqrt(repeats)),
                ttft_ms_p50=float(1e3 * np.median(prefills_s)),
                tpot_ms_p50=float(1e3 * np.median(passes_s)),
                peak_memory_mib=peak_mib,
                kv_bytes_per_token=kv,
                prefill_s=prefills_s.tolist(),
                decode_s=decode_s.tolist(),
                repeats_tok_per_s=throughput.tolist(),
            )
        )
    return found


def _slowness_of_rounds(passes_s: np.ndarray) -> np.ndarray:
    """Returns how much slower each round was than the median round, (rounds,), given seconds (models, rounds)."""
    if len(passes_s) == 1:  # with one model the machine's slowness cannot be told from the model's own scatter
        return np.ones(passes_s.shape[1])
    logs = np.log(passes_s)
    slowness = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
    return np.exp(slowness - np.median(slowness))


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, *, seed: int = 0, n_sequences: int = 2, n_tokens: int = 8) -> float:
    """Returns the bytes by which the live cache grows for each token of one sequence, past every window of the model.

    A layer with a constant state or a full window adds nothing. The cache is filled by a prefill up to the largest
    window (or as far as the model has positions), then grown token by token.
    """
    start = _largest_window(model.config) + 1
    n_positions = _n_positions(model.config)
    if n_positions is not None:
        start = max(1, min(start, n_positions - n_tokens))
    tokens = random_tokens(model, n_sequences, start, seed)
    cache, token = _forward(model, tokens, None)
    before = cache_bytes(cache)
    for _ in range(n_tokens):
        cache, token = _forward(model, token, cache)
    return (cache_bytes(cache) - before) / n_tokens / n_sequences


def _largest_window(config: PreTrainedConfig) -> int:
    """Returns the largest window of a model's own sliding layers and of its plan, at least 1."""
    native = native_windows(config)
    plan_window = (getattr(config, "layerboost", None) or {}).get("window")
    return max(window or 1 for window in (*native, plan_window))


def _n_positions(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_settings(
    model: PreTrainedModel, concurrency: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> None:
    for name, value, least in (
        ("concurrency", concurrency, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 3),
    ):
        if value < least:
            raise DecodeSettingError(f"{name}: {value} is too small; give at least {least}")
    n_positions = _n_positions(model.config)
    if n_positions is not None and prompt_tokens + new_tokens > n_positions:
        raise DecodeSettingError(
            f"prompt_tokens: {prompt_tokens} with {new_tokens} new tokens is more than the model's {n_positions} "
            f"positions; lower prompt_tokens to at most {n_positions - new_tokens}"
        )


def random_tokens(model: PreTrainedModel, n_sequences: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Returns tokens drawn uniformly from the vocabulary, (n_sequences, n_tokens), on the model's device."""
    generator = torch.Generator().manual_seed(seed)  # the CPU's generator gives the same prompts on every device
    embeddings: Any = model.get_input_embeddings()
    return torch.randint(embeddings.num_embeddings, (n_sequences, n_tokens), generator=generator).to(model.device)


def _forward(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache | None) -> tuple[Cache, torch.Tensor]:
    """Makes one forward call and returns the cache and the greedy next token of each sequence (n, 1)."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, **_last_only(model))
    return output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)


def last_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits (n, vocabulary) of each sequence's last token, without a cache."""
    return model(input_ids=tokens, use_cache=False, **_last_only(model)).logits[:, -1]


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    """Returns the argument that has a model compute the logits of the last token alone, if its family takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(type(model).forward) else {}


@functools.cache
def _forward_parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def timed_generation(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, n_filled: int = 0, *, room_tokens: int = 0
) -> tuple[float, list[float], torch.Tensor]:
    """Decodes a batch greedily, with a cache that has room for all tokens from the start.

    Args:
        model: A causal language model, converted or not.
        prompts: (concurrency, tokens), on the model's device.
        new_tokens: Tokens to generate for each sequence; the prefill gives the first.
        n_filled: First tokens of each prompt that are not read, but stand in the cache as random numbers.
        room_tokens: New tokens that the cache has room for, if they are more than `new_tokens`.

    Returns:
        Seconds of the prefill, seconds of each decode step, generated tokens (concurrency, new_tokens).
    """
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    cache = preallocated_cache(model.config, prompts.shape[1] + max(new_tokens, room_tokens))
    if n_filled:
        fill_cache(cache, model, len(prompts), n_filled)
    chunks = prompts[:, n_filled:].split(prefill_chunk_tokens(model, len(prompts)), dim=1)
    synchronize()
    start = time.perf_counter()
    for chunk in chunks:
        cache, token = _forward(model, chunk, cache)
    synchronize()
    prefill_s = time.perf_counter() - start
    steps_s, tokens = [], [token]
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        cache, token = _forward(model, token, cache)
        synchronize()
        steps_s.append(time.perf_counter() - start)
        tokens.append(token)
    return prefill_s, steps_s, torch.cat(tokens, dim=1)


def fill_cache(cache: Cache, model: PreTrainedModel, n_sequences: int, n_tokens: int) -> None:
    """Fills a new cache as if it had seen `n_tokens` tokens, with random numbers that are the same in all heads.

    It is filled in the chunks of a prefill, because layers with a window hold all tokens of the last update.
    """
    config = model.config.get_text_config()
    chunk = prefill_chunk_tokens(model, n_sequences)
    # The first piece takes the rest too, so that none has a single token, which layers take for a decode step.
    pieces = [min(n_tokens, chunk + n_tokens % chunk), *[chunk] * (n_tokens // chunk - 1)]
    shape = (n_sequences, kv_heads(config), -1, head_dim(config))
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):
            continue
        assert isinstance(layer, CacheLayerMixin)
        both = torch.randn(2, n_tokens, shape[-1], device=model.device, dtype=model.dtype)
        for keys, values in both.split(pieces, dim=1):
            layer.update(keys.expand(shape), values.expand(shape))
        if isinstance(layer, LinearWindowLayer):
            norms = torch.rand((*shape[:2], 2 * shape[-1]), device=model.device)
            layer.state = torch.randn((*norms.shape, shape[-1]), device=model.device), norms
    if isinstance(cache, PlanCache):
        cache.seen_tokens = n_tokens


def prefill_chunk_tokens(model: PreTrainedModel, n_sequences: int) -> int:
    """Returns the tokens of each sequence that one call of a prefill takes."""
    return max(MIN_PREFILL_CHUNK_TOKENS, PREFILL_TOKENS[model.device.type] // n_sequences)
