"""Implements the cache of a converted model, which keeps for each layer exactly what its treatment needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
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
    """Keeps keys and values of `window` tokens, (B, K, window, D): the first `sinks` tokens and the newest ones.

    Token t lies in slot t if it is a sink, else in slot sinks + (t - sinks) modulo (window - sinks). A step writes one
    slot in place and costs the same at any length. Softmax does not depend on the order of its keys.

    A row that starts with padding has its sinks later. They are copied to the slots in front that hold its padding, as
    soon as they come, and are seen there once they have left the newest tokens.

    Attributes:
        n_apart: The number of sinks in front of the keys that the last `update` returned, which tokens that are no
            longer there separate from the rest.
        padding: What is known of padded rows; None if no row begins with padding.
    """

    window: int

    def __init__(self, window: int, sinks: int = 0):
        super().__init__(window)
        self.sinks, self.n_newest = sinks, window - sinks
        self.n_apart = 0
        self.padding: Padding | None = None

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

        For one token these are the window's filled slots, in the order of the slots. For several tokens they are the
        sinks that lie further back (`n_apart`), up to window - sinks - 1 older tokens, and the new ones, in order of
        time.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1:
            return self._step(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        oldest = max(self.seen_tokens - (self.n_newest - 1), 0)
        before = self._slots(oldest, self.seen_tokens)
        self.n_apart = min(self.sinks, oldest)
        if self.n_apart and self.padding is not None:
            self.n_apart = min(self.sinks, self.seen_tokens)  # each row has its own
        keys, values = (
            torch.cat([kept[:, :, : self.n_apart], kept[:, :, before], new], dim=2)
            for kept, new in ((self.keys, key_states), (self.values, value_states))
        )
        first = self.seen_tokens
        self.seen_tokens += key_states.shape[2]
        self._own_tensors()
        # A later token overwrites an earlier one in the same slot, so only the tokens that will stay are written.
        newest = max(self.seen_tokens - self.n_newest, first)
        for start, stop in ((first, min(self.sinks, self.seen_tokens)), (max(newest, self.sinks), self.seen_tokens)):
            if start < stop:
                slots, new = self._slots(start, stop), slice(start - first, stop - first)
                self.keys[:, :, slots], self.values[:, :, slots] = key_states[:, :, new], value_states[:, :, new]
        self._keep_sinks(first, key_states, value_states)
        return keys, values

    def _step(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._own_tensors()
        assert self.keys is not None
        assert self.values is not None
        token, self.n_apart = self.seen_tokens, 0
        slot = token if token < self.sinks else self.sinks + (token - self.sinks) % self.n_newest
        self.keys[:, :, slot], self.values[:, :, slot] = key[:, :, 0], value[:, :, 0]
        self.seen_tokens += 1
        self._keep_sinks(token, key, value)
        n_filled = min(self.seen_tokens, self.window)
        return self.keys[:, :, :n_filled], self.values[:, :, :n_filled]

    def _keep_sinks(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies those new tokens, from `first` on, that are sinks of rows that begin with padding."""
        if self.padding is None or not self.padding.awaits(first):
            return
        assert self.keys is not None
        assert self.values is not None
        tokens = self.padding.tokens_in_front
        is_new = (tokens >= max(first, self.sinks))[:, None, :, None]
        index = (tokens - first).clamp(0, keys.shape[2] - 1)[:, None, :, None]
        for kept, new in ((self.keys, keys), (self.values, values)):
            chosen = new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3]))
            kept[:, :, : self.sinks] = torch.where(is_new, chosen, kept[:, :, : self.sinks])

    def _own_tensors(self) -> None:
        """Copies the tensors if gradients are wanted, because the graphs of earlier tokens still need the old ones."""
        if torch.is_grad_enabled() and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _slots(self, first: int, stop: int) -> torch.Tensor:
        """Returns the slots of the tokens first .. stop - 1."""
        tokens = torch.arange(first, stop, device=self.device)
        ring = self.sinks + (tokens - self.sinks) % self.n_newest
        return torch.where(tokens < self.sinks, tokens, ring) if self.sinks else ring

    def tokens_of_slots(self) -> torch.Tensor:
        """Returns the index of the token in each filled slot, apart from sinks of rows that begin with padding."""
        newest, n_filled = self.seen_tokens - 1, min(self.seen_tokens, self.window)
        slots = torch.arange(n_filled, device=self.device)
        tokens = newest - (newest - slots) % self.n_newest
        return torch.where(slots < self.sinks, slots, tokens) if self.sinks else tokens

    def visible_slots(self, valid: torch.Tensor) -> torch.Tensor:
        """Returns which filled slots the newest token sees, (B, slots) bool.

        Args:
            valid: (B, all tokens so far) bool, False for padding.
        """
        tokens, newest = self.tokens_of_slots(), self.seen_tokens - 1
        visible = valid[:, tokens] | (tokens == newest)
        if self.padding is not None:
            front = self.padding.visible_in_front(self.seen_tokens - self.n_newest)
            n_front = min(self.sinks, visible.shape[1])
            own = valid[:, :n_front] | (tokens[:n_front] == newest)
            visible[:, :n_front] = own | front[:, :n_front]
        return visible

    def valid_keys(self, valid: torch.Tensor, n_keys: int) -> torch.Tensor:
        """Returns which of the `n_keys` keys of the last update of several tokens are no padding, (B, n_keys) bool."""
        in_order = valid[:, valid.shape[1] - (n_keys - self.n_apart) :]
        if not self.n_apart:
            return in_order
        oldest = valid.shape[1] - in_order.shape[1]
        front = valid[:, : self.n_apart] & (torch.arange(self.n_apart, device=valid.device) < oldest)
        if self.padding is not None:
            front = front | self.padding.visible_in_front(oldest)[:, : self.n_apart]
        return torch.cat([front, in_order], dim=1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all kept tensors by attribute; the first dimension of each is the batch."""
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}


class Padding:
    """Knows the sinks of rows that begin with padding, and the slots in front of a window that keep them.

    The tokens 0 .. sinks - 1 of a row lie in the slots of their numbers. Those of them that are padding are as many as
    the row's sinks that come later, so the first later sink takes the slot of the first padding token, and so on.

    Attributes:
        tokens_in_front: (B, sinks) integer, the token that each slot in front keeps or will keep; its own number where
            that is no padding, or where the row has no such token yet.
    """

    def __init__(self, sinks: int, valid: torch.Tensor):
        """Finds the sinks.

        Args:
            sinks: Sinks of each row.
            valid: (B, all tokens so far) bool, False for padding.
        """
        self.sinks = sinks
        counted = valid.long().cumsum(dim=1)
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(counted)
        # at[:, r] is the token that is number r of its row's real ones; the last column takes all that are no sinks.
        at = torch.full((valid.shape[0], sinks + 1), -1, device=valid.device)
        at.scatter_(1, torch.where(valid, counted - 1, sinks).clamp(max=sinks), index)
        at = at[:, :sinks]
        # Slots of tokens that have not come yet count as theirs.
        real = nn.functional.pad(valid[:, :sinks], (0, max(sinks - valid.shape[1], 0)), value=True)
        own = torch.arange(sinks, device=valid.device).expand_as(at)
        later = (real.sum(dim=1, keepdim=True) + (~real).long().cumsum(dim=1) - 1).clamp(0, sinks - 1)
        moved = at.gather(1, later)
        self.tokens_in_front = torch.where(real | (moved < 0), own, moved)
        self._n_missing = int((at < 0).sum())
        self._newest = int(at.max())

    @property
    def is_complete(self) -> bool:
        """Whether every row has all its sinks, so that later tokens change nothing."""
        return self._n_missing == 0

    def awaits(self, first: int) -> bool:
        """Whether a sink of any row is at token `first` or later."""
        return self._newest >= first

    def select(self, rows: torch.Tensor) -> None:
        """Makes the rows those of the given numbers, as a cache does whose rows are chosen or repeated."""
        self.tokens_in_front = self.tokens_in_front[rows.to(self.tokens_in_front.device)]

    def visible_in_front(self, before: int) -> torch.Tensor:
        """Returns which slots in front hold a later sink that is older than token `before`, (B, sinks) bool."""
        tokens = self.tokens_in_front
        moved = tokens != torch.arange(self.sinks, device=tokens.device)
        return moved & (tokens < before)


class LinearWindowLayer(WindowLayer):
    """Keeps a window, and sums over the tokens before the next token's window: `sums` (B, K, R, D), `norms` (B, K, R).

    Sinks are in neither sum. Both are at least fp32. They exist once a token has left the window.
    """

    def __init__(self, window: int, sinks: int = 0):
        super().__init__(window, sinks)
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

        It is None while no token leaves. In rows that begin with padding the token may be a sink.
        """
        first = self.seen_tokens - self.n_newest
        if first < self.sinks or self.keys is None or self.values is None:
            return None
        number = self.sinks + (first - self.sinks) % self.n_newest
        slot = slice(number, number + 1)
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


def _layer_of(treatment: Treatment, plan: Plan) -> CacheLayerMixin:
    """Makes a treated layer's part of the cache.

    It comes from the treatment's mechanism. By default it keeps the keys and values of the window, or of all tokens if
    the treatment needs no window.
    """
    if (make_layer := treatment.mechanism.cache) is not None:
        return make_layer(plan.window, plan.sinks) if plan.sinks and treatment.needs_window else make_layer(plan.window)
    if not treatment.needs_window:
        return DynamicLayer()
    assert plan.window is not None
    return WindowLayer(plan.window, plan.sinks)


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
                layers[index] = _layer_of(treatment, plan)
        super().__init__(layers=layers)
        self.treatments, self.sinks = plan.treatments, plan.sinks
        self.seen_tokens = 0
        self._has_padding = False
        self._padding: Padding | None = None

    def begin(self, valid: torch.Tensor | None) -> None:
        """Tells the layers about padding, before they take in the next tokens.

        Args:
            valid: (B, all tokens with the next ones) bool, False for padding; None if there is none.
        """
        if not self.sinks or valid is None:
            return
        if self.seen_tokens < self.sinks:
            # Only padding among the first tokens moves the sinks, so that one look at them decides for all later calls.
            self._has_padding = not bool(valid[:, : self.sinks].all())
        if not self._has_padding or (self._padding is not None and self._padding.is_complete):
            return
        self._set_padding(Padding(self.sinks, valid))

    def _set_padding(self, padding: Padding | None) -> None:
        self._padding = padding
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.padding = padding

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self._padding is not None:
            self._padding.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._padding is not None:
            rows = torch.arange(len(self._padding.tokens_in_front))
            self._padding.select(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self._padding is not None:
            self._padding.select(beam_idx)

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
        self._set_padding(None)

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
