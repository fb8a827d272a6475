"""Divides items into shares of nearly equal cost, so that several workers can judge the same plans."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .lm_eval_requests import Item

MIN_AUTO_SHARES, MAX_AUTO_SHARES = 16, 1024


AUTO_SHARE_TOKENS = 1024
"""Minimum tokens of a share if there are more than `MIN_AUTO_SHARES`: enough to keep a pass busy."""


@dataclass(frozen=True)
class Share:
    """Denotes the items `start` to `stop` of a spec, in a random order if there is a seed.

    Without a seed the order puts items next to each other that have most in common. The items of a spec with a text
    and no tasks are its sequences. The random order mixes tasks so that any beginning of it holds the same fraction of
    each.
    """

    start: int
    stop: int
    seed: int | None = None


def mixed(items: Sequence[Item], seed: int) -> list[Item]:
    """Shuffles items and spreads tasks evenly: any beginning holds about the same fraction of each task."""
    draw = random.Random(seed)
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_task[item.task].append(item)
    for name in sorted(by_task):
        draw.shuffle(by_task[name])
    iterators = {name: iter(of_task) for name, of_task in by_task.items()}
    return [next(iterators[name]) for name in mixed_tasks({name: len(of_task) for name, of_task in by_task.items()})]


def mixed_tasks(counts: Mapping[str, int]) -> list[str]:
    """Returns the task of each position of `mixed`, given the number of items of each task."""
    places = [((i + 0.5) / n, name) for name, n in counts.items() for i in range(n)]
    return [name for _, name in sorted(places)]


def share_order(n: int, share: Share) -> torch.Tensor:
    """Returns the indices of the sequences of a share."""
    order = list(range(n))
    if share.seed is not None:
        random.Random(share.seed).shuffle(order)
    return torch.tensor(order[share.start : share.stop])


def requests_of_items(items: Sequence[Item]) -> list[int]:
    return sorted({index for item in items for index in item.requests})


def shares(costs: Sequence[int], n_shares: int, *, first: int = 0, seed: int | None = None) -> list[Share]:
    """Cuts items into shares of nearly the same cost, none of them empty.

    Args:
        costs: Cost of each item, starting with item `first`.
        n_shares: Maximum number of shares.
        first: Index of the first item.
        seed: Seed of the random order of the items, if they are in one.
    """
    ends = list(itertools.accumulate(costs))
    cuts = [0] + [bisect.bisect_left(ends, ends[-1] * i / n_shares) + 1 for i in range(1, n_shares + 1)] if ends else []
    return [Share(first + start, first + stop, seed) for start, stop in itertools.pairwise(cuts) if start < stop]


def auto_shares(costs: Sequence[int]) -> int:
    """Returns how many shares items with these costs in tokens are cut into if the recipe does not say.

    The number depends only on the items: if it depended on the workers, another cluster would make other records.
    """
    return min(max(MIN_AUTO_SHARES, sum(costs) // AUTO_SHARE_TOKENS), MAX_AUTO_SHARES)
