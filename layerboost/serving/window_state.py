"""Implements layers in vLLM that keep a state of constant size for each request in a block of its own.

They are the linear_window layers, and windows with sinks, which vLLM's blocks of tokens cannot keep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..attention import (
    LinearWindow,
    Sinks,
    add_to_state,
    linear_window_attention,
    linear_window_step,
    softmax_attention,
    window_attention,
)
from ..plan import Plan, Treatment

CPU_CACHE_BYTES = 8 << 20
"""Bytes of states that a CPU works on at once, so that they are read from memory and written back only once."""


def state_shapes(n_kv_heads: int, head_dim: int, plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of what one request keeps in a layer of K heads on this rank.

    They are the keys and values (K, window, D) of the window, where token t is in slot t if it is a sink and else in
    slot sinks + (t - sinks) modulo (window - sinks). If the plan has linear_window layers, the sums (K, R, D) and norms
    (K, R) over the tokens that left the window come first, also in its other layers, because vLLM's states have one
    size.
    """
    assert plan.window is not None
    n_features = 2 * head_dim
    kept = (n_kv_heads, plan.window, head_dim)
    sums = ((n_kv_heads, n_features, head_dim), (n_kv_heads, n_features)) if _has_sums(plan) else ()
    return (*sums, kept, kept)


def state_dtypes(dtype: torch.dtype, plan: Plan) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of the tensors of `state_shapes` in a model of `dtype`."""
    return (torch.float32, torch.float32, dtype, dtype) if _has_sums(plan) else (dtype, dtype)


def _has_sums(plan: Plan) -> bool:
    return plan.count(Treatment.LINEAR_WINDOW) > 0


class WindowState(nn.Module, MambaBase):
    """Replaces vLLM's `Attention` in a family's attention module, with heads as input and output.

    A request's tokens may come in any number of chunks. Requests with one token, mostly decode steps, are processed
    together.
    """

    kv_cache: tuple[torch.Tensor, ...]

    def __init__(
        self,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        scaling: float,
        plan: Plan,
        treatment: Treatment,
        vllm_config: Any,
        prefix: str,
    ):
        """Creates the layer; heads are those of this tensor-parallel rank, `prefix` is the layer's name in vLLM."""
        super().__init__()
        assert plan.window is not None and plan.newest_tokens is not None
        self.plan, self.window, self.sinks, self.n_newest = plan, plan.window, plan.sinks, plan.newest_tokens
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.scaling, self.layer_name = scaling, prefix
        self.dtype = vllm_config.model_config.dtype
        self.feature_map: LinearWindow | None = None
        if treatment is Treatment.LINEAR_WINDOW:
            self.feature_map = LinearWindow(n_heads, n_kv_heads, head_dim, scaling)
            for parameter in self.feature_map.parameters():
                set_weight_attrs(parameter, {"weight_loader": _load_heads_of_rank})
        self.kv_cache = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> Any:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.n_kv_heads, self.head_dim, self.plan)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype, self.plan)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Returns (tokens, H D), given query (tokens, H D), key and value (tokens, K D) of all requests of a step."""
        output = torch.empty_like(query)
        torch.ops.vllm.layerboost_linear_window(query, key, value, output, self.layer_name)
        return output

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Fills `output` of `forward` and updates the states of the present requests."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM runs the model without requests to measure its memory
            output.zero_()
            return
        metadata = metadata[self.layer_name]
        query, output = (x.view(-1, self.n_heads, self.head_dim) for x in (query, output))
        key, value = (x.view(-1, self.n_kv_heads, self.head_dim) for x in (key, value))
        n_steps = metadata.num_decodes
        blocks = metadata.state_indices_tensor.long()
        if n_steps:
            n_together = n_steps if query.is_cuda else self._requests_in_cpu_cache()
            for first in range(0, n_steps, n_together):
                steps = slice(first, min(first + n_together, n_steps))
                output[steps] = self._steps(
                    query[steps], key[steps], value[steps], metadata.seq_lens[steps], blocks[steps]
                )
        if metadata.num_prefills:
            starts = metadata.query_start_loc.tolist()
            n_tokens = metadata.seq_lens.tolist()
            for request in range(n_steps, n_steps + metadata.num_prefills):
                tokens = slice(starts[request], starts[request + 1])
                output[tokens] = self._chunk(
                    query[tokens], key[tokens], value[tokens], n_tokens[request], blocks[request]
                )

    def _requests_in_cpu_cache(self) -> int:
        """Returns how many requests' states can be read, changed and written back within a CPU's cache."""
        shapes, dtypes = self.get_state_shape(), self.get_state_dtype()
        n_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        return max(1, CPU_CACHE_BYTES // n_bytes)

    def _steps(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        n_tokens: torch.Tensor,
        blocks: torch.Tensor,
    ) -> torch.Tensor:
        """Processes one token of each of B requests: query (B, H, D), key and value (B, K, D).

        `n_tokens` (B,) includes these tokens. On a GPU the host reads no value, so that a graph can capture this.
        """
        newest = self._slots(n_tokens - 1)
        is_first = n_tokens == 1
        if query.is_cuda or bool(is_first.any()):
            self._clear(blocks, is_first)
        keys, values = self.kv_cache[-2:]
        keys[blocks, :, newest], values[blocks, :, newest] = key, value
        window_keys, window_values = keys[blocks], values[blocks]
        visible, left = None, None
        if query.is_cuda or bool((n_tokens < self.window).any()):
            visible = (torch.arange(self.window, device=query.device) < n_tokens[:, None])[:, None, None]
            left = (n_tokens >= self.window)[:, None]
        if self.feature_map is None:
            seen = softmax_attention(query.unsqueeze(2), window_keys, window_values, visible, self.scaling, None, 0.0)
            return seen.squeeze(2)
        sums, norms = (kept[blocks] for kept in self.kv_cache[:2])
        output = linear_window_step(
            query.unsqueeze(2),
            window_keys,
            window_values,
            scaling=self.scaling,
            feature_map=self.feature_map,
            state=(sums, norms),
            visible=visible,
        )
        rows = torch.arange(len(blocks), device=query.device)
        # The token that leaves with the next one lies where the next one will; a sink never leaves.
        leaving = self.sinks + (n_tokens - self.sinks) % self.n_newest
        features = self.feature_map.key_features(window_keys[rows, :, leaving].unsqueeze(2))
        left_value = window_values[rows, :, leaving].unsqueeze(2)
        self.kv_cache[0][blocks], self.kv_cache[1][blocks] = add_to_state((sums, norms), features, left_value, left)
        return output.squeeze(2)

    def _clear(self, blocks: torch.Tensor, is_first: torch.Tensor) -> None:
        """Zeroes the blocks of requests at their first token, as a previous owner may have left NaNs in a block."""
        for kept in self.kv_cache:
            where = is_first.view(-1, *(1 for _ in kept.shape[1:]))
            kept[blocks] = kept[blocks].masked_fill_(where, 0)

    def _chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n_tokens: int, block: torch.Tensor
    ) -> torch.Tensor:
        """Processes T tokens of one request: query (T, H, D), key and value (T, K, D); `n_tokens` includes them."""
        n_before = n_tokens - query.shape[0]
        if n_before == 0:
            for kept in self.kv_cache:
                kept[block] = 0
        keys, values = (kept[block] for kept in self.kv_cache[-2:])
        oldest = max(n_before - (self.n_newest - 1), 0)
        n_apart = min(self.sinks, oldest)
        tokens = torch.cat([self._tokens(0, n_apart), self._tokens(oldest, n_tokens)])
        before = self._slots(tokens[: n_apart + n_before - oldest])
        new_keys, new_values = key.transpose(0, 1), value.transpose(0, 1)
        key, value = (
            torch.cat([kept[:, before], new], dim=1) for kept, new in ((keys, new_keys), (values, new_values))
        )
        inputs = query.transpose(0, 1)[None], key[None], value[None]
        sinks = Sinks(self.sinks, (tokens < self.sinks)[None], n_apart) if self.sinks else None
        if self.feature_map is None:
            output = window_attention(*inputs, scaling=self.scaling, window=self.n_newest, sinks=sinks)
        else:
            sums, norms = (kept[block] for kept in self.kv_cache[:2])
            output, state = linear_window_attention(
                *inputs,
                scaling=self.scaling,
                window=self.n_newest,
                sinks=sinks,
                feature_map=self.feature_map,
                state=(sums[None], norms[None]) if n_before >= self.window else None,
                return_state=True,
            )
            assert state is not None
            self.kv_cache[0][block], self.kv_cache[1][block] = state[0][0], state[1][0]
        new = self._tokens(n_before, n_tokens)
        # A later token overwrites an earlier one in the same slot, so only the tokens that will stay are written.
        stays = (new < self.sinks) | (new >= n_tokens - self.n_newest)
        slots = self._slots(new[stays])
        for kept, of_new in zip(self.kv_cache[-2:], (new_keys, new_values), strict=True):
            kept[block, :, slots] = of_new[:, stays]
        return output[0].transpose(0, 1)

    def _tokens(self, first: int, stop: int) -> torch.Tensor:
        return torch.arange(first, stop, device=self.kv_cache[0].device)

    def _slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the slots of tokens."""
        newest = self.sinks + (tokens - self.sinks) % self.n_newest
        return torch.where(tokens < self.sinks, tokens, newest) if self.sinks else newest


def _load_heads_of_rank(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copies this rank's heads; ranks share key heads if there are fewer of these than ranks."""
    first = get_tensor_model_parallel_rank() * loaded.shape[0] // get_tensor_model_parallel_world_size()
    own = loaded.narrow(0, first, parameter.shape[0])
    if own.shape != parameter.shape:
        raise ValueError(f"linear_window: weights of shape {tuple(loaded.shape)} do not fit {tuple(parameter.shape)}")
    parameter.data.copy_(own)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].attend(query, key, value, output)


def _attend_traced(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """Stands in for `_attend` while the compiler traces; it only has to know that `output` is written."""


direct_register_custom_op("layerboost_linear_window", _attend, mutates_args=["output"], fake_impl=_attend_traced)
