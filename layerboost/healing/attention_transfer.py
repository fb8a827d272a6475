"""Fits the feature maps of linear_window layers to the parent's attention (attention transfer)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..plan import Treatment
from .adapters import feature_map_layers
from .losses import relative_error
from .spec import HealingSpec, window_dropout_at


class AttentionTransfer(nn.Module):
    """Returns, as a module's forward, the error of linear_window layers' attention on the teacher's hidden inputs.

    Each converted attention module gets the hidden state that the teacher's module of the same name got, and its
    output (after the output projection) is compared with the teacher's. No gradient passes from one layer to another.

    Args:
        teacher, student: The parent and its conversion.
        spec: Gives window dropout and seed.
        layers: Names of the attention modules to fit; all linear_window ones if None.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, spec: HealingSpec, layers: Sequence[str] | None = None
    ):
        super().__init__()
        self.teacher, self.student, self.spec = teacher, student, spec
        self.layers = feature_map_layers(student) if layers is None else list(layers)
        if not self.layers:
            raise ValueError("student: no layer has a linear_window; there is nothing to transfer")

    def begin_step(self, step: int, *, whole_windows: bool = False) -> None:
        draw_windows(self.student, self.spec, step, whole=whole_windows)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the sum over the layers, not the mean: what a layer learns must not depend on which others train."""
        return torch.stack(list(self.layer_errors(input_ids, position_ids, targets).values())).sum()

    def layer_errors(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Returns each converted attention module's squared error relative to the teacher's variance, by name.

        All tokens count; `targets` (B, T) only weights the sequences, as in the other losses.
        """
        weights = None if targets is None else targets[:, 1:].sum(dim=1)
        inputs: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        errors: dict[str, torch.Tensor] = {}

        def keep(name: str, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            inputs[name], wanted[name] = hidden_states, output
            return output

        def compare(name: str, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            errors[name] = relative_error(output, wanted.pop(name), weights)
            return output.detach()

        arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        with torch.no_grad(), _tapped(self.teacher, self.layers, lambda name, states: states, keep):
            self.teacher.base_model(**arguments)
        # The whole student runs, so that its layers get the masks and positions that the student itself makes.
        with _tapped(self.student, self.layers, lambda name, states: inputs.pop(name), compare):
            self.student.base_model(**arguments)
        return errors


@contextmanager
def _tapped(
    model: nn.Module,
    names: Sequence[str],
    on_input: Callable[[str, torch.Tensor], torch.Tensor],
    on_output: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Passes the hidden input and the output of the named attention modules through functions."""

    def before(name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": on_input(name, kwargs["hidden_states"])}
            return (on_input(name, args[0]), *args[1:]), kwargs

        return hook

    def after(name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
        ) -> tuple[Any, ...]:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (on_output(name, states, output[0]), *output[1:])

        return hook

    handles: list[RemovableHandle] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_window_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the names of the attention modules of linear_window layers, with their treatment's state."""
    return [(name, treated) for name, treated in treated_layers(model) if treated.treatment is Treatment.LINEAR_WINDOW]


def treated_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the names of the attention modules that own parameters and a window, with their treatment's state."""
    named = ((name, getattr(model.get_submodule(name), "layerboost", None)) for name in feature_map_layers(model))
    return [(name, treated) for name, treated in named if treated is not None and treated.full_window is not None]


def draw_windows(student: nn.Module, spec: HealingSpec, step: int, *, whole: bool = False) -> None:
    """Gives each linear_window layer its window for a step: its own or, with some probability, a shorter one.

    The draw depends only on seed, step and layer, so it is the same in all workers and after a resume. `whole` disables
    the random shortening.
    """
    probability = 0.0 if whole else window_dropout_at(spec, step)
    for name, treated in treated_layers(student):
        draw = random.Random(f"{spec.seed} {step} {name}")
        is_shortened = draw.random() < probability and treated.full_window > 1
        treated.window = draw.randrange(1, treated.full_window) if is_shortened else treated.full_window


def restore_windows(student: nn.Module) -> None:
    """Gives each linear_window layer its whole window back, permanently."""
    for _, treated in treated_layers(student):
        treated.window = treated.full_window


@contextmanager
def full_windows(student: nn.Module) -> Iterator[None]:
    """Gives every linear_window layer its whole window inside the block, whatever the step drew."""
    drawn = [(treated, treated.window) for _, treated in treated_layers(student)]
    try:
        restore_windows(student)
        yield
    finally:
        for treated, window in drawn:
            treated.window = window
