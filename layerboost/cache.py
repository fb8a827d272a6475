"""Implements the cache of a converted model, which keeps for each layer exactly what its treatment needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .plan import Plan, Treatment

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class StateLayer(CacheLayerMixin):
    """Serves as base class of layers that keep tensors of constant size, whatever the number of tokens.

    A subclass returns in `tensors` the attributes that it keeps. Its `update` takes in the new tokens' keys and values,
    counts them in `seen_tokens`, and returns the keys and values that the attention function sees.
    """

    is_sliding = False  # the plan sets the size, not the masks that the family makes for its own sliding layers
    supports_early_init = False

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.seen_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all kept tensors by attribute; the first dimension of each is the batch."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        for name in self.tensors():
            setattr(self, name, None)
        self.seen_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "crop: a layer with a window has forgotten what a shorter text would need; "
                "use a plan of softmax and none only where tokens are taken back (assisted generation)"
            )


class WindowLayer(StateLayer):
    """Keeps keys and values of the last `window` tokens, (B, K, window, D), with token t at slot t modulo window.

    A step writes one slot in place and costs the same at any length. Softmax does not depend on the order of its keys.
    """

    window: int

    def __init__(self, window: int):
        super().__init__(window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, n_kv_heads, _, key_dim = key_states.shape
        self.keys = key_states.new_zeros(batch, n_kv_heads, self.window, key_dim)
        self.values = value_states.new_zeros(batch, n_kv_heads, self.window, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the new tokens and returns the keys and values that they may see.

        For one token these are the window's filled slots, in the order of the slots. For several tokens they are up to
        window - 1 older tokens and the new ones, in order of time.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1:
            return self._step(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        before = self._slots(self.seen_tokens - min(self.seen_tokens, self.window - 1), self.seen_tokens)
        keys = torch.cat([self.keys[:, :, before], key_states], dim=2)
        values = torch.cat([self.values[:, :, before], value_states], dim=2)
        self.seen_tokens += key_states.shape[2]
        n_kept = min(keys.shape[2], self.window)
        kept = self._slots(self.seen_tokens - n_kept, self.seen_tokens)
        self._own_tensors()
        self.keys[:, :, kept], self.values[:, :, kept] = keys[:, :, -n_kept:], values[:, :, -n_kept:]
        return keys, values

    def _step(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._own_tensors()
        assert self.keys is not None
        assert self.values is not None
        slot = self.seen_tokens % self.window
        self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
        self.seen_tokens += 1
        n_filled = min(self.seen_tokens, self.window)
        return self.keys[:, :, :n_filled], self.values[:, :, :n_filled]

    def _own_tensors(self) -> None:
        """Copies the tensors if gradients are wanted, because the graphs of earlier tokens still need the old ones."""
        if torch.is_grad_enabled() and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _slots(self, first: int, stop: int) -> torch.Tensor:
        """Returns the slots of the tokens first .. stop - 1."""
        return torch.arange(first, stop, device=self.device) % self.window

    def tokens_of_slots(self) -> torch.Tensor:
        """Returns the index of the token in each filled slot."""
        newest, n_filled = self.seen_tokens - 1, min(self.seen_tokens, self.window)
        return newest - (newest - torch.arange(n_filled, device=self.device)) % self.window

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all kept tensors by attribute; the first dimension of each is the batch."""
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}


class LinearWindowLayer(WindowLayer):
    """Keeps a window, and sums over the tokens before the next token's window: `sums` (B, K, R, D), `norms` (B, K, R).

    Both are at least fp32. They exist once a token has left the window.
    """

    def __init__(self, window: int):
        super().__init__(window)
        self.sums: torch.Tensor | None = None
        self.norms: torch.Tensor | None = None

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.sums is None or self.norms is None else (self.sums, self.norms)

    @state.setter
    def state(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.sums, self.norms = state

    def leaving(self) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        """Returns index, key and value (B, K, 1, D) of the token that leaves the window with the next token.

        It is None while the window is not full.
        """
        first = self.seen_tokens - self.window
        if first < 0 or self.keys is None or self.values is None:
            return None
        slot = slice(first % self.window, first % self.window + 1)
        return first, self.keys[:, :, slot], self.values[:, :, slot]

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {} if self.state is None else {"sums": self.state[0], "norms": self.state[1]}
        return super().tensors() | state


class PreallocatedLayer(DynamicLayer):
    """Keeps keys and values of up to `n_tokens` tokens; it writes in place, so that no step copies earlier tokens."""

    is_croppable = False

    def __init__(self, n_tokens: int):
        super().__init__()
        self.n_tokens = n_tokens
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, n_kv_heads, _, key_dim = key_states.shape
        # Zeroing touches the memory pages now; otherwise their first use would slow down a step.
        self.keys = key_states.new_zeros(batch, n_kv_heads, self.n_tokens, key_dim)
        self.values = value_states.new_zeros(batch, n_kv_heads, self.n_tokens, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        first, stop = self.cumulative_length, self.cumulative_length + key_states.shape[2]
        if stop > self.n_tokens:
            raise ValueError(f"n_tokens: {self.n_tokens} is too small for {stop} tokens; make a larger cache")
        self.keys[:, :, first:stop], self.values[:, :, first:stop] = key_states, value_states
        self.cumulative_length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.n_tokens

    def crop(self, tokens_to_remove: int) -> None:
        self.cumulative_length -= abs(tokens_to_remove)


def _layer_of(treatment: Treatment, window: int | None) -> CacheLayerMixin:
    """Makes a treated layer's part of the cache.

    It comes from the treatment's mechanism. By default it keeps the keys and values of the window, or of all tokens if
    the treatment needs no window.
    """
    if (make_layer := treatment.mechanism.cache) is not None:
        return make_layer(window)
    if not treatment.needs_window:
        return DynamicLayer()
    assert window is not None
    return WindowLayer(window)


class PlanCache(Cache):
    """Implements the cache of a converted model.

    The mechanism of a layer's treatment determines what the layer keeps: `softmax` layers use the family's own cache
    layer, `window` and `linear_window` layers keep tensors of constant size, `none` layers keep nothing. The cache
    itself counts the tokens seen, since not every layer does.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """Makes an empty cache.

        Args:
            config: Config of a converted model.
        """
        plan = Plan.from_dict(config.layerboost)
        layers = list(DynamicCache(config=config).layers)
        for index, treatment in enumerate(plan.treatments):
            if not treatment.mechanism.native:
                layers[index] = _layer_of(treatment, plan.window)
        super().__init__(layers=layers)
        self.treatments = plan.treatments
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.treatments[layer_idx].mechanism.native:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.seen_tokens + query_length, 0  # treated layers make their own mask

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.seen_tokens -= abs(tokens_to_remove)


def cache_tensors(cache: Cache) -> list[torch.Tensor]:
    """Returns every tensor that the layers of a cache keep for their tokens."""
    tensors: list[torch.Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            tensors += layer.tensors().values()
        else:
            tensors += [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in tensors if tensor is not None]


def cache_bytes(cache: Cache) -> int:
    """Returns the bytes of all keys, values and states in a live cache of any model."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache))


def preallocated_cache(config: PreTrainedConfig, n_tokens: int) -> Cache:
    """Makes a cache of any model, converted or not, that never grows.

    Layers that keep all tokens get room for `n_tokens` tokens.

    Args:
        config: Config of the model.
        n_tokens: Tokens of the longest sequence, including those to be generated.
    """
    cache = PlanCache(config) if getattr(config, "layerboost", None) else DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = PreallocatedLayer(n_tokens)
    return cache
