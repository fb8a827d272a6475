"""What a converted model keeps between tokens: for each layer exactly what its treatment needs."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache

from .families import head_dim, kv_heads
from .plan import Plan, Treatment


class WindowLayer(CacheLayerMixin):
    """Keys and values (B, K, at most window - 1, D): with the token at hand they fill the window."""

    is_sliding = False  # sized by the plan, not by the masks that the family makes for its own sliding layers
    supports_early_init = False

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keeps the last window - 1 tokens, and gives the kept ones before them together with the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        # A clone, lest a view of the window keep the whole prompt alive.
        first = max(keys.shape[2] - (self.window - 1), 0)
        self.keys, self.values = keys[:, :, first:].clone(), values[:, :, first:].clone()
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.window

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is kept, by attribute; the first dimension of each is the batch."""
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}

    def reset(self) -> None:
        for name in self.tensors():
            setattr(self, name, None)
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


class LinearWindowLayer(WindowLayer):
    """A window, and the sums over everything older: `sums` (B, K, R, D) and `norms` (B, K, R), at least fp32."""

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

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {} if self.state is None else {"sums": self.state[0], "norms": self.state[1]}
        return super().tensors() | state


class PlanCache(Cache):
    """The cache of a converted model.

    `softmax` layers have the cache layer that the family gives them, `window` and `linear_window` layers a constant
    one, `none` layers nothing. The number of tokens seen is the cache's own, since no layer needs to know it.
    """

    def __init__(self, config):
        """Args: config: of a converted model."""
        plan = Plan.from_dict(config.layerboost)
        layers = list(DynamicCache(config=config).layers)
        for index, treatment in enumerate(plan.treatments):
            if treatment is Treatment.NONE:
                layers[index] = DummyLayer()
            elif treatment is Treatment.WINDOW:
                layers[index] = WindowLayer(plan.window)
            elif treatment is Treatment.LINEAR_WINDOW:
                layers[index] = LinearWindowLayer(plan.window)
        super().__init__(layers=layers)
        self.treatments = plan.treatments
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.treatments[layer_idx] is Treatment.SOFTMAX:
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
    """Every tensor that the layers of a cache keep for their tokens."""
    tensors: list[torch.Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, WindowLayer):
            tensors += layer.tensors().values()
        else:
            tensors += [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in tensors if tensor is not None]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys, values and states that a live cache of any model keeps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache))


def expected_cache_bytes(config, n_tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes that the plan of a converted model's config promises after `n_tokens` tokens of `batch` sequences.

    A `softmax` layer holds 2 K D per token (up to its own window - 1 where the family has one), `window` the same for
    the last window - 1 tokens, `linear_window` also 2 D K (D + 1) sums in fp32 once a token left its window.
    """
    plan = Plan.from_dict(config.layerboost)
    n_kv_heads, dim = kv_heads(config), head_dim(config)
    token_bytes = 2 * n_kv_heads * dim * dtype.itemsize
    native = DynamicCache(config=config).layers
    total = 0
    for treatment, layer in zip(plan.treatments, native, strict=True):
        if treatment is Treatment.SOFTMAX:
            own_window = getattr(layer, "sliding_window", None)
            total += token_bytes * (n_tokens if own_window is None else min(n_tokens, own_window - 1))
        elif treatment.needs_window:
            assert plan.window is not None
            total += token_bytes * min(n_tokens, plan.window - 1)
            if treatment is Treatment.LINEAR_WINDOW:
                total += n_kv_heads * 2 * dim * (dim + 1) * torch.float32.itemsize
    return total * batch
