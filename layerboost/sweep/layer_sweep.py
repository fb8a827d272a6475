"""Runs many plans over the same tokens in one pass and computes what they have in common only once.

Plans are paths through the layers: two plans that treat the first l layers alike share everything up to there. All
paths advance together, layer by layer, and fork where their treatments differ; at each layer one call takes the hidden
states of all paths that go through it as one batch. The L plans that treat one layer each therefore need half the
layers of L passes, in far fewer and larger calls. A layer is called as the model itself calls it, with the arguments
that the model gives it, so that every family works without special code.

The number of paths in flight is bounded. If they would exceed the memory allowed, the paths off the largest branch are
taken to the last layer first, and the others then continue from the states already reached. Nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention import MIN_CHUNK_TOKENS
from ..convert import convert
from ..families import decoder_layers, family_of
from ..plan import Plan, Treatment
from ..treatments import softmax_pairs
from .request_tries import Forest
from .trie_attention import (
    CAPPED_FOREST,
    PAIRS_FOREST,
    SOFTMAX_FOREST,
    ForestMask,
    ForestMasks,
    Step,
    at_columns,
)

DEFAULT_BUDGET_BYTES = 1 << 30
"""Default for the memory of the hidden states in flight and of the working memory of a call."""

_CALL_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens that make a call of a layer large enough: the data still fits a CPU's caches, or keeps a GPU busy."""

_PATHS_AT_LEAST = 8

Path = tuple[Step, ...]
Emit = Callable[[list[int], list[torch.Tensor]], None]


class LayerSweep:
    """Runs plans on one model over the same tokens.

    The model is left unchanged after each call.

    Args:
        model: A causal language model of a supported family that is not converted yet.
        plans: The plans to run. The plan with softmax in every layer is the model itself.
        budget_bytes: Bound on the hidden states in flight and on the working memory of calls. Two paths of one row are
            always allowed, because a fork needs them.
    """

    def __init__(self, model: Any, plans: Sequence[Plan], *, budget_bytes: int = DEFAULT_BUDGET_BYTES):
        self.model, self.budget_bytes = model, budget_bytes
        self._layers: dict[Step, list[Any]] = {(Treatment.SOFTMAX, None, 0): list(decoder_layers(model))}
        self.paths: list[Path] = []
        for plan in plans:
            plan.check_length(self.n_layers)
            path = tuple((t, plan.window, plan.sinks) if t.needs_window else (t, None, 0) for t in plan.treatments)
            for step in set(path) - set(self._layers):
                treated = convert(model, Plan.uniform(step[0], self.n_layers, *step[1:]))
                self._layers[step] = list(decoder_layers(treated.eval()))
            self.paths.append(path)

    @property
    def n_layers(self) -> int:
        return len(decoder_layers(self.model))

    @torch.inference_mode()
    def run(
        self, tokens: torch.Tensor, emit: Emit, *, forest: Forest | None = None, plans: Sequence[int] | None = None
    ) -> None:
        """Runs plans over tokens and hands over the hidden states after the last layer.

        Args:
            tokens: (B, T) token ids: sequences without padding, or the tokens of `forest`.
            emit: Called with the indices of plans and the hidden states of each, (B, T, d), before the final norm. It
                is called several times if not all plans fit into memory together.
            forest: The tree structure of the tokens, if they are not plain sequences.
            plans: Indices of the plans to run; all of them if None.
        """
        chosen = range(len(self.paths)) if plans is None else plans
        indices: dict[Path, list[int]] = {}
        for index in chosen:
            indices.setdefault(self.paths[index], []).append(index)

        def emit_paths(frontier: dict[Path, torch.Tensor]) -> None:
            named = [(index, states) for path, states in frontier.items() for index in indices[path]]
            emit([index for index, _ in named], [states for _, states in named])

        with in_eval_mode(self.model):
            device = self.model.device
            inputs = self._inputs(tokens.to(device), None if forest is None else forest.to(device))
            with self._forest_attention(forest is not None):
                self._descend(0, {(): inputs.embedded}, list(indices), self.room(*tokens.shape), inputs, emit_paths)

    def room(self, n_rows: int, n_tokens: int) -> int:
        """Returns how many paths may be in flight over `n_rows` rows of `n_tokens` tokens; a fork needs two."""
        state_bytes = n_rows * n_tokens * self.model.config.hidden_size * self.model.dtype.itemsize
        return max(2, self._state_bytes // state_bytes - 1)  # the embedded tokens take the place of one path

    def rows_at_once(self, n_tokens: int) -> int:
        """Returns how many rows of `n_tokens` tokens leave room for several paths in flight, at least one row."""
        row_bytes = n_tokens * self.model.config.hidden_size * self.model.dtype.itemsize
        return max(1, self._state_bytes // (_PATHS_AT_LEAST * row_bytes))

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the logits (n, vocabulary) of hidden states (n, d) from `run`: final norm, head and what follows."""
        with in_eval_mode(self.model), _stand_ins(self.model) as stand_ins:
            stand_ins.value = states[:, None]
            return self.model(inputs_embeds=states[:, None], use_cache=False).logits[:, 0]

    def _inputs(self, tokens: torch.Tensor, forest: Forest | None) -> _Inputs:
        """Returns what the model hands to its first layer, and the arguments that it hands to each layer."""
        if forest is None:
            return _Inputs(*layer_inputs(self.model, tokens))
        decoder = self.model.base_model
        with _stand_ins(self.model) as stand_ins:
            # A row as long as the deepest path makes the family build its own masks over every pair of positions.
            decoder(input_ids=tokens.new_zeros(1, int(forest.depths.max()) + 1), use_cache=False)
            masks = [call.get("attention_mask") for call in stand_ins.calls]
            stand_ins.clear()
            decoder(input_ids=tokens, position_ids=forest.depths, use_cache=False)
            return _Inputs(stand_ins.embedded, stand_ins.calls, forest, ForestMasks(forest, masks))

    @contextlib.contextmanager
    def _forest_attention(self, active: bool) -> Iterator[None]:
        """Makes every attention module use the masks of a forest."""
        if not active:
            yield
            return
        attention = family_of(self.model.config).attention
        # The family's own SDPA ignores a cap on scores, so a model that runs on SDPA must get none here either.
        is_capped = self.model.config._attn_implementation != "sdpa"
        changes = [(self.model.config, CAPPED_FOREST if is_capped else SOFTMAX_FOREST)]
        for (treatment, *_), layers in self._layers.items():
            if treatment.mechanism.attends:
                name = PAIRS_FOREST if _is_spelt_out(treatment) else CAPPED_FOREST
                changes += [(getattr(layer, attention).config, name) for layer in layers]
        before = [(config, config._attn_implementation) for config, _ in changes]
        try:
            for config, name in changes:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, name in before:
                config._attn_implementation_internal = name

    def _descend(
        self,
        first_layer: int,
        frontier: dict[Path, torch.Tensor],
        leaves: list[Path],
        room: int,
        inputs: _Inputs,
        emit: Callable[[dict[Path, torch.Tensor]], None],
    ) -> None:
        """Takes `leaves` from their states in `frontier` to the last layer, with at most `room` paths in flight."""
        for layer in range(first_layer, self.n_layers):
            children = Counter(leaf[: layer + 1] for leaf in leaves)
            if len(children) > room and len(children) > 1:
                trunk = Counter(leaf[:layer] for leaf in leaves).most_common(1)[0][0]
                early = [leaf for leaf in leaves if leaf[:layer] != trunk]
                if early:
                    parted = {path: frontier.pop(path) for path in list(frontier) if path != trunk}
                    self._descend(layer, parted, early, room - 1, inputs, emit)
                leaves = [leaf for leaf in leaves if leaf[:layer] == trunk]
                children = Counter(leaf[: layer + 1] for leaf in leaves)
                while len(children) > max(1, room):
                    # Paths that lead to the fewest plans go first: the others continue here, without more recursion.
                    some = [child for child, _ in children.most_common()[::-1]][: max(1, room - 1)]
                    first = [leaf for leaf in leaves if leaf[: layer + 1] in some]
                    self._descend(layer, dict(frontier), first, max(1, room - 1), inputs, emit)
                    leaves = [leaf for leaf in leaves if leaf[: layer + 1] not in some]
                    children = Counter(leaf[: layer + 1] for leaf in leaves)
            frontier = self._advance(layer, frontier, list(children), inputs)
        emit(frontier)

    def _advance(
        self, layer: int, frontier: dict[Path, torch.Tensor], children: list[Path], inputs: _Inputs
    ) -> dict[Path, torch.Tensor]:
        """Returns the hidden states after a layer; those before it are freed as soon as no path needs them."""
        needed = Counter(child[:layer] for child in children)
        after: dict[Path, torch.Tensor] = {}
        # Few paths fork off and most continue: handle the forks first, so that the others can be freed in groups.
        for step in sorted({child[layer] for child in children}, key=lambda step: step[0].mechanism.native):
            going = [child for child in children if child[layer] == step]
            n_at_once = self._states_at_once(step, inputs)
            for start in range(0, len(going), n_at_once):
                group = going[start : start + n_at_once]
                states = [frontier[child[:layer]] for child in group]
                for child in group:
                    needed[child[:layer]] -= 1
                    if not needed[child[:layer]]:
                        del frontier[child[:layer]]
                outputs = self._call(layer, step, torch.cat(states) if len(states) > 1 else states[0], inputs)
                del states
                after |= zip(group, outputs.split(inputs.n_rows), strict=True)
        return {child: after[child] for child in children}

    def _call(self, layer: int, step: Step, states: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
        """Runs one layer over stacked states (n * B, T, d), in as many calls as the working memory requires."""
        module, arguments = self._layers[step][layer], inputs.arguments(layer, step)
        rows_at_once = max(1, self._work_bytes // self._row_work_bytes(step, inputs))
        outputs = []
        with at_columns(getattr(module, "mlp", None), inputs.read_columns if layer == self.n_layers - 1 else None):
            for start in range(0, len(states), rows_at_once):
                part = states[start : start + rows_at_once]
                output = module(part, **_of_rows(arguments, start, len(part), inputs.n_rows))
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _states_at_once(self, step: Step, inputs: _Inputs) -> int:
        n_rows, n_tokens, _ = inputs.embedded.shape
        by_memory = self._work_bytes // (n_rows * self._row_work_bytes(step, inputs))
        call_tokens = _CALL_TOKENS.get(self.model.device.type, _CALL_TOKENS["cuda"])
        return max(1, min(by_memory, call_tokens // (n_rows * n_tokens)))

    # The two parts leave a remainder, since allocators hold more than is asked for and reading results needs memory.

    @property
    def _state_bytes(self) -> int:
        return self.budget_bytes * 3 // 8

    @property
    def _work_bytes(self) -> int:
        return self.budget_bytes // 4

    def _row_work_bytes(self, step: Step, inputs: _Inputs) -> int:
        """Returns an upper bound of what a layer holds for one row: MLP or attention, and scores if materialised."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        n_tokens = inputs.embedded.shape[1]
        mlp = getattr(config, "intermediate_size", 4 * config.hidden_size)
        linear = n_tokens * (6 * config.hidden_size + 3 * mlp) * itemsize
        treatment, window, _ = step
        if inputs.forest is not None:
            n_pairs, is_spelt_out = n_tokens**2, _is_spelt_out(treatment)
            linear += 5 * n_pairs
        elif window is not None:
            n_pairs, is_spelt_out = n_tokens * (2 * window + MIN_CHUNK_TOKENS), True
        else:
            n_pairs, is_spelt_out = n_tokens**2, config._attn_implementation == "eager"
        return linear + (24 * config.num_attention_heads * n_pairs if is_spelt_out else 0)


def layer_inputs(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Returns the embedded tokens (B, T, d) that a model gives its first layer, and the other arguments of each layer.

    Args:
        model: A causal language model of a supported family, converted or not.
        tokens: (B, T) token ids of sequences without padding, on the model's device.
    """
    with _stand_ins(model) as stand_ins:
        model.base_model(input_ids=tokens, use_cache=False)
        return stand_ins.embedded, stand_ins.calls


def _is_spelt_out(treatment: Treatment) -> bool:
    """Whether a forest's layer writes out every pair of tokens, since the treatment is no softmax over some keys."""
    return treatment.mechanism.pairs is not softmax_pairs and not treatment.mechanism.native


@dataclass
class _Inputs:
    """Holds what a model's forward pass gives its layers: `embedded` (B, T, d), and the keyword arguments of each."""

    embedded: torch.Tensor
    calls: list[dict[str, Any]]
    forest: Forest | None = None
    masks: ForestMasks | None = None

    @property
    def n_rows(self) -> int:
        return self.embedded.shape[0]

    @property
    def read_columns(self) -> torch.Tensor | None:
        return None if self.masks is None else self.masks.read_columns

    def arguments(self, layer: int, step: Step) -> dict[str, Any]:
        if self.masks is None or step[0].mechanism.replace is not None:
            return self.calls[layer]
        return {**self.calls[layer], "attention_mask": self.masks.mask(layer, step)}


def _of_rows(arguments: Any, start: int, n: int, n_rows: int) -> Any:
    """Selects the arguments of `n` rows of a stack of states from row `start` on; one row serves all of them."""
    if isinstance(arguments, dict):
        return {name: _of_rows(value, start, n, n_rows) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_of_rows(value, start, n, n_rows) for value in arguments)
    if n_rows == 1 or (n == n_rows and start % n_rows == 0):
        return arguments
    if isinstance(arguments, ForestMask):
        return arguments.of_rows(_row_indices(start, n, n_rows, arguments.inside.device))
    if isinstance(arguments, torch.Tensor) and arguments.ndim > 1 and arguments.shape[0] == n_rows:
        return arguments[_row_indices(start, n, n_rows, arguments.device)]
    return arguments


def _row_indices(start: int, n: int, n_rows: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, start + n, device=device) % n_rows


class _StandIns:
    """Replaces a model's layers: records what they are called with, and returns `value` or the layer's input."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.value: torch.Tensor | None = None
        self._embedded: list[torch.Tensor] = []

    @property
    def embedded(self) -> torch.Tensor:
        return self._embedded[0]

    def clear(self) -> None:
        self.calls.clear()
        self._embedded.clear()

    def answer(self, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if self.value is not None:
            return self.value
        self._embedded.append(hidden_states)
        self.calls.append(arguments)
        return hidden_states


class _StandIn(nn.Module):
    def __init__(self, layer: nn.Module, owner: _StandIns):
        super().__init__()
        object.__setattr__(self, "layer", layer)  # bypasses nn.Module, so that the layer is not a submodule
        self.owner = owner

    def __getattr__(self, name: str) -> Any:
        # A decoder may read attributes of a layer, such as the kind of its attention.
        return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise TypeError(f"{type(self.layer).__name__}: called with positional arguments, which no family does")
        return self.owner.answer(hidden_states, kwargs)


@contextlib.contextmanager
def _stand_ins(model: Any) -> Iterator[_StandIns]:
    layers, stand_ins = decoder_layers(model), _StandIns()
    model.base_model.layers = nn.ModuleList(_StandIn(layer, stand_ins) for layer in layers)
    try:
        yield stand_ins
    finally:
        model.base_model.layers = layers


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
