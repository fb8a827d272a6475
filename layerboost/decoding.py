"""Decoding: measured speed, memory and KV bytes of a live model, and the bytes that a decode step must read."""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import math
import os
import platform
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from .cache import cache_bytes
from .convert import convert
from .families import attention_module, decoder_layers, head_dim, kv_heads
from .plan import Plan, Treatment

MIB = 1 << 20


class DecodeSettingError(ValueError):
    """A condition that cannot be measured; the message names the setting, its value and the remedy."""


@dataclass(frozen=True)
class DecodeMeasurement:
    """What one serving condition cost with the transformers engine: greedy, one batch, prefill apart from decode.

    Attributes:
        threads: torch's CPU threads.
        output_throughput_tok_per_s: concurrency x decode steps / decode seconds, where each step counts with its median
            over the repeats. Prefill, which gives each sequence its first token, is not in it.
        output_throughput_stderr: standard error of the mean of the repeats.
        ttft_ms_p50: median over the repeats of the prefill's milliseconds (time to first token).
        tpot_ms_p50: median over all decode steps of all repeats (time per output token, the first left out).
        peak_memory_mib: the bytes of the model's weights plus the growth over a whole untimed pass: on CUDA of what the
            allocator holds, on CPU of the process's resident memory, sampled each 2 ms.
        kv_bytes_per_token: bytes by which the live cache grows for each token of one sequence, past every window.
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
        """As it would have been on a machine `factor` times as fast."""
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
    model, *, concurrency: int, prompt_tokens: int, new_tokens: int, repeats: int = 3, seed: int = 0
) -> DecodeMeasurement:
    """Times greedy decoding of `concurrency` random prompts through the model's own forward and cache.

    One whole pass goes before the timed ones: it warms up, and the memory is read off it so that the reading does not
    disturb the clock. Every step ends with a synchronisation, as a server that hands out each token would.

    Args:
        model: a causal language model, converted or not, on the device to be measured.
        concurrency: sequences decoded together in one batch.
        prompt_tokens: length of each prompt, of tokens drawn evenly from the vocabulary.
        new_tokens: tokens to generate for each sequence, at least 2: the prefill gives the first.
        repeats: timed passes, at least 3.
        seed: of the prompts.

    Raises:
        DecodeSettingError: a setting that is too small, or more tokens than the model has positions.
    """
    return measure_together(
        [model],
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
    )[0]


@torch.inference_mode()
def measure_together(
    models: Sequence, *, concurrency: int, prompt_tokens: int, new_tokens: int, repeats: int = 3, seed: int = 0
) -> list[DecodeMeasurement]:
    """Times models of one vocabulary on one device side by side, so that a machine that drifts is fair to all of them.

    Each of the `repeats` rounds has one pass of every model, in an order drawn anew. By how much a round was slower
    than the others, all models together tell; it is taken out of each pass. See `measure_decode` for the arguments.

    Returns:
        One measurement for each model, in order.
    """
    for model in models:
        _check_settings(model, concurrency, prompt_tokens, new_tokens, repeats)
        model.eval()
    prompts = _random_tokens(models[0], concurrency, prompt_tokens, seed)
    kv_bytes = [kv_bytes_per_token(model, seed=seed) for model in models]
    peaks_mib = []
    for model in models:
        with _PeakMemory(model) as memory:
            _generate(model, prompts, new_tokens)
        peaks_mib.append(memory.peak_mib)
    prefill_s = np.empty((len(models), repeats))
    steps_s = np.empty((len(models), repeats, new_tokens - 1))
    order = random.Random(seed)
    for repeat in range(repeats):
        for index in order.sample(range(len(models)), len(models)):
            prefill_s[index, repeat], steps_s[index, repeat], _ = _generate(models[index], prompts, new_tokens)
    slowness = _slowness_of_rounds(steps_s.sum(axis=2))
    prefill_s /= slowness
    steps_s /= slowness[:, None]
    # What is taken out was read off the same passes, which then scatter less than they did.
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
                # Step by step: another process that gets in between hits other steps in each pass, what is slow by
                # itself the same ones.
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
    """(rounds,) by how much each round was slower than the middle one, from seconds (models, rounds)."""
    if len(passes_s) == 1:  # one model cannot tell the machine's slowness from its own scatter
        return np.ones(passes_s.shape[1])
    logs = np.log(passes_s)
    slowness = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
    return np.exp(slowness - np.median(slowness))


@torch.inference_mode()
def kv_bytes_per_token(model, *, seed: int = 0, n_sequences: int = 2, n_tokens: int = 8) -> float:
    """Bytes by which the live cache grows for each token of one sequence, counted past every window of the model.

    A layer with a constant state or a full window counts nothing. The cache is filled by a prefill up to the largest
    window (or as far as the model has positions), then grown token by token.
    """
    start = _largest_window(model.config) + 1
    n_positions = _n_positions(model.config)
    if n_positions is not None:
        start = max(1, min(start, n_positions - n_tokens))
    tokens = _random_tokens(model, n_sequences, start, seed)
    cache, token = _forward(model, tokens, None)
    before = cache_bytes(cache)
    for _ in range(n_tokens):
        cache, token = _forward(model, token, cache)
    return (cache_bytes(cache) - before) / n_tokens / n_sequences


def hardware_name(device: torch.device | str) -> str:
    """What the measurement ran on: the GPU's name, or the CPU's and the number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no /proc on this system: the architecture has to do
    return f"{name} ({os.cpu_count()} cores)"


@dataclass(frozen=True)
class LayerBytes:
    """What one layer with one treatment makes a decode step read.

    Attributes:
        n_parameters: of the whole layer.
        kv_values_per_token: numbers that the cache keeps for a token of one sequence.
        window_tokens: the newest tokens that the cache keeps, None for all.
        state_values: fp32 numbers of constant state for one sequence.
    """

    n_parameters: int
    kv_values_per_token: int
    window_tokens: int | None
    state_values: int


class ByteModel:
    """Bytes that one decode step must read: the limit of decoding, the same on every machine.

    Weights are read once for a step (an untied input embedding only at the rows looked up); for each sequence the
    cache as it stands before the step: all context tokens in a softmax layer (the newest in a natively sliding one),
    window - 1 tokens in a windowed one, which with the step's own token fill the window, and the fp32 state of
    linear_window: (features x head_dim + features) for each key/value head. Activations are left out; every expert of
    a mixture is counted.

    The parameters are counted on a real model of the config, converted, on the meta device: no memory, no weights.
    """

    def __init__(self, config):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        self.n_layers = len(decoder_layers(base))
        self.hidden_size = base.config.get_text_config().hidden_size
        text_config = base.config.get_text_config()
        self._kv_values = 2 * kv_heads(text_config) * head_dim(text_config)
        self._native_windows = native_windows(base.config)
        self._parameters: dict[Treatment, list[int]] = {}
        self._states: list[int] = []
        for treatment in Treatment:
            # Any window does: it changes no parameter.
            variant = (
                base if treatment is Treatment.SOFTMAX else convert(base, Plan.uniform(treatment, self.n_layers, 16))
            )
            self._parameters[treatment] = [_n_parameters(layer) for layer in decoder_layers(variant)]
            if treatment is Treatment.LINEAR_WINDOW:
                self._states = [_state_values(attention_module(variant, i)) for i in range(self.n_layers)]
        embedding = base.get_input_embeddings().weight
        head = base.get_output_embeddings()
        tied = head is not None and head.weight is embedding
        self._other_parameters = _n_parameters(base) - sum(self._parameters[Treatment.SOFTMAX])
        if not tied:
            self._other_parameters -= embedding.numel()

    def layer(self, index: int, treatment: Treatment, window: int | None = None) -> LayerBytes:
        """What layer `index` costs with a treatment; `window` in tokens where the treatment needs one."""
        n_parameters = self._parameters[treatment][index]
        if treatment is Treatment.NONE:
            return LayerBytes(n_parameters, 0, 0, 0)
        state = self._states[index] if treatment is Treatment.LINEAR_WINDOW else 0
        reach = window if treatment.needs_window else self._native_windows[index]
        return LayerBytes(n_parameters, self._kv_values, None if reach is None else reach - 1, state)

    def weight_bytes(self, plan: Plan | None, *, concurrency: int, dtype_bytes: int) -> int:
        """Bytes of the weights that a step reads, the looked-up embedding rows among them."""
        layers = sum(layer.n_parameters for layer in self._layers(plan))
        return (layers + self._other_parameters + concurrency * self.hidden_size) * dtype_bytes

    def cache_bytes(self, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
        """Bytes of the live cache of `concurrency` sequences of `context_tokens` tokens each."""
        sequence = 0
        for layer in self._layers(plan):
            tokens = context_tokens if layer.window_tokens is None else min(layer.window_tokens, context_tokens)
            sequence += layer.kv_values_per_token * tokens * dtype_bytes + layer.state_values * 4
        return concurrency * sequence

    def decode_bytes(self, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
        """Bytes that one decode step reads; `plan` None is the untouched model."""
        return self.weight_bytes(plan, concurrency=concurrency, dtype_bytes=dtype_bytes) + self.cache_bytes(
            plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes
        )

    def _layers(self, plan: Plan | None) -> list[LayerBytes]:
        if plan is None:
            return [self.layer(i, Treatment.SOFTMAX) for i in range(self.n_layers)]
        plan.check_length(self.n_layers)
        return [self.layer(i, treatment, plan.window) for i, treatment in enumerate(plan.treatments)]


def decode_bytes(config, plan: Plan | None, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> int:
    """Bytes that one decode step of a model with this config reads under a plan (None: untouched); see ByteModel.

    Args:
        config: the untouched parent's config.
        concurrency: sequences decoded together.
        context_tokens: tokens that each sequence's cache covers before the step.
        dtype_bytes: bytes of a weight and of a cached number.
    """
    return _byte_model(config).decode_bytes(
        plan, concurrency=concurrency, context_tokens=context_tokens, dtype_bytes=dtype_bytes
    )


def predicted_speedup(config, plan: Plan, *, concurrency: int, context_tokens: int, dtype_bytes: int) -> float:
    """Decode throughput of the plan over the base's where bytes are the limit: the base's bytes / the plan's bytes."""
    condition = {"concurrency": concurrency, "context_tokens": context_tokens, "dtype_bytes": dtype_bytes}
    return decode_bytes(config, None, **condition) / decode_bytes(config, plan, **condition)


def kv_bytes_of_layers(config, dtype_bytes: int) -> dict[Treatment, tuple[float, ...]]:
    """Bytes by which each layer's cache grows for each token of one sequence, past every window, by treatment.

    Args:
        config: the untouched parent's config.
        dtype_bytes: bytes of a cached number.
    """
    model = _byte_model(config)
    found = {}
    for treatment in Treatment:
        layers = [model.layer(index, treatment, 1) for index in range(model.n_layers)]
        found[treatment] = tuple(
            0.0 if layer.window_tokens is not None else float(layer.kv_values_per_token * dtype_bytes)
            for layer in layers
        )
    return found


class _ConfigKey:
    """A config as a dictionary key: configs of equal content are equal."""

    def __init__(self, config):
        self.config, self._text = config, config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other) -> bool:
        return isinstance(other, _ConfigKey) and self._text == other._text


@functools.lru_cache(maxsize=8)
def _cached_byte_model(key: _ConfigKey) -> ByteModel:
    return ByteModel(key.config)


def _byte_model(config) -> ByteModel:
    return _cached_byte_model(_ConfigKey(config))


def _n_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _state_values(attention) -> int:
    feature_map = attention.linear_window
    return feature_map.n_kv_heads * feature_map.n_features * (feature_map.head_dim + 1)


def native_windows(config) -> tuple[int | None, ...]:
    """The window that the parent itself gives each layer, as transformers' own cache understands the config."""
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    n_layers = config.get_text_config().num_hidden_layers
    return tuple(getattr(layer, "sliding_window", None) for layer in layers[:n_layers])


def _largest_window(config) -> int:
    """The largest window of a model's own sliding layers and of its plan, at least 1."""
    native = native_windows(config)
    plan_window = (getattr(config, "layerboost", None) or {}).get("window")
    return max(window or 1 for window in (*native, plan_window))


def _n_positions(config) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_settings(model, concurrency: int, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
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


def _random_tokens(model, n_sequences: int, n_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same prompts on every device
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (n_sequences, n_tokens), generator=generator).to(model.device)


def _forward(model, tokens: torch.Tensor, cache):
    """One forward call; the cache, and the greedy next token of each sequence (n, 1)."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(type(model).forward) else {}
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, **last_only)
    return output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)


@functools.cache
def _forward_parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _generate(model, prompts: torch.Tensor, new_tokens: int) -> tuple[float, list[float], torch.Tensor]:
    """Prefill seconds, seconds of each decode step, generated tokens (concurrency, new_tokens)."""
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    cache, token = _forward(model, prompts, None)
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


class _PeakMemory:
    """Peak memory of what runs inside the `with` block, weights included; see DecodeMeasurement.peak_memory_mib."""

    SAMPLE_S = 0.002

    def __init__(self, model):
        self.device, self.peak_mib = model.device, 0.0
        tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        import psutil

        _trim_heap()
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.SAMPLE_S):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._weight_bytes + self._peak - self._before) / MIB


def _trim_heap() -> None:
    """Gives freed heap pages back, so that memory which an earlier pass left behind shows as growth again."""
    if os.name == "posix" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
