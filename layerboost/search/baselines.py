"""Makes plans by rules that ignore how much layers are worth or estimate it otherwise, as baselines for guided plans.

The uniform and interleaved plans are those of published hybrids. The plans at another plan's attention budget have its
number of layers for each treatment, and therefore its speed, and differ only in which layers get which treatment.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from ..plan import Plan, Treatment

CONTROL = "parent"
"""The untouched parent, healed alike: what the tokens of healing are worth to a model that has lost nothing."""

UNIFORM = ("window", "linear_window", "linear")
"""One treatment in every layer: a window, window plus linear attention (LoLCATs, Liger), linear attention (SUPRA)."""

SAME_BUDGET = ("interleaved", "cosine", "first", "last", "random")
"""Orders in which a plan's treatments are dealt out again: evenly, by LLM-Drop's score, from an end, or at random."""

KNOWN = (*UNIFORM, "interleaved_1/2", "interleaved_1/4", *SAME_BUDGET, "random:3", CONTROL)
"""Names that an error message lists; any share below one may follow `interleaved_`, any number `random:`."""

_SHARE = re.compile(r"interleaved_([1-9]\d*)/([1-9]\d*)")
_RANDOM = re.compile(r"random(?::([1-9]\d*))?")


class BaselineError(ValueError):
    """A baseline is unknown, or lacks what it is made from."""


def check_baseline(name: str) -> None:
    """Raises BaselineError if no baseline has this name."""
    if name not in KNOWN and not _RANDOM.fullmatch(name) and not _is_share(name):
        raise BaselineError(f"baseline: '{name}' is unknown; use one of {', '.join(KNOWN)}")


def is_of_same_budget(name: str) -> bool:
    """Returns whether a baseline is made for a given plan, from its number of layers of each treatment."""
    return name.partition(":")[0] in SAME_BUDGET


def n_baseline_plans(name: str) -> int:
    """Returns the number of plans that a name stands for, for each plan that it is made for."""
    found = _RANDOM.fullmatch(name)
    return int(found[1] or 1) if found else 1


def baseline_plans(
    name: str,
    n_layers: int,
    *,
    middle: Treatment = Treatment.LINEAR_WINDOW,
    window: int | None = None,
    sinks: int = 0,
    budget: Plan | None = None,
    cosine: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Plan]:
    """Returns the plans of a baseline, by name; `random:3` gives `random_1` to `random_3`.

    Args:
        name: `parent` (softmax in every layer); `window`, `linear_window`, `linear` (linear_window with a window of
            1 and no sinks); `interleaved_1/2`, `interleaved_1/4`, ...: softmax in this share of the layers, evenly
            spread, and `middle` in the others. At the budget of a plan: `interleaved` (each treatment evenly spread),
            `cosine`, `first`, `last`, `random`, `random:N`.
        middle, window, sinks: Treatment, window and sinks of the layers between softmax and none; not used with
            `budget`.
        budget: The plan whose treatments `interleaved`, `cosine`, `first`, `last` and `random` deal out again. In the
            order given by the name, removal is dealt first, then `window`, then `linear_window`.
        cosine: How far each layer's attention turns the residual stream (`sensitivity.cosine.cosine_scores`), first
            layer first; the layer with the smallest value is treated most (LLM-Drop, arXiv 2406.15786).
        seed: Seed of `random`.

    Raises:
        BaselineError: The name is unknown, or what it needs is not given.
    """
    check_baseline(name)
    if name == CONTROL:
        return {name: Plan.uniform(Treatment.SOFTMAX, n_layers)}
    if name in UNIFORM:
        treatment = Treatment.WINDOW if name == "window" else Treatment.LINEAR_WINDOW
        return {name: Plan.uniform(treatment, n_layers, *((1, 0) if name == "linear" else (window, sinks)))}
    if share := _SHARE.fullmatch(name):
        n_softmax = round(Fraction(int(share[1]), int(share[2])) * n_layers)
        counts = {Treatment.SOFTMAX: n_softmax, middle: n_layers - n_softmax}
        return {name: Plan(_interleaved(counts), window, sinks)}
    if budget is None:
        raise BaselineError(f"baseline: '{name}' is made for a plan; give the one whose budget it is to have")
    budget.check_length(n_layers)
    layers = list(range(n_layers))
    if name == "interleaved":
        counts = {treatment: budget.count(treatment) for treatment in Treatment}
        return {name: Plan(_interleaved(counts), budget.window, budget.sinks)}
    if name == "cosine":
        if cosine is None or len(cosine) != n_layers:
            raise BaselineError(f"baseline: 'cosine' needs a distance for each of the {n_layers} layers; measure them")
        return {name: _dealt(sorted(layers, key=lambda layer: cosine[layer]), budget)}
    if name in ("first", "last"):
        return {name: _dealt(layers if name == "first" else layers[::-1], budget)}
    n_plans = n_baseline_plans(name)
    found = {}
    for number in range(1, n_plans + 1):
        order = random.Random(f"{seed} {number}").sample(layers, n_layers)
        found["random" if n_plans == 1 else f"random_{number}"] = _dealt(order, budget)
    return found


def _is_share(name: str) -> bool:
    found = _SHARE.fullmatch(name)
    return found is not None and int(found[1]) < int(found[2])


def _interleaved(counts: Mapping[Treatment, int]) -> tuple[Treatment, ...]:
    """Spreads each treatment evenly over the layers: the i-th of n is placed at (i + 1/2) / n of the depth."""
    places = [
        (Fraction(2 * i + 1, 2 * count), order, treatment)
        for order, (treatment, count) in enumerate(counts.items())
        for i in range(count)
    ]
    return tuple(treatment for *_, treatment in sorted(places))


def _dealt(order: Sequence[int], budget: Plan) -> Plan:
    """Deals out the budget's treatments along an order of layers, those that keep least of attention first."""
    dealt = sorted(budget.treatments, key=lambda treatment: -treatment.entry.depth)
    by_layer = dict(zip(order, dealt, strict=True))
    return Plan(tuple(by_layer[layer] for layer in range(len(budget))), budget.window, budget.sinks)
