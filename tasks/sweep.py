"""The sensitivity sweep on a cluster: workers take shares of the items, each with all the plans.

A worker that has read an item's context for one plan has read it for all, so what is shared out is items, never plans.
How much of it fits into memory together is the worker's own affair (`LayerSweep`). What comes back are answers, not
scores: lm-eval's metrics are worked out when all shares of a plan are there, whatever the shares were.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerboost.checkpoint import ModelSource
from layerboost.evaluation.evaluate import text_scores
from layerboost.evaluation.lm_eval_requests import Item
from layerboost.evaluation.scores import QualitySpec, Scores
from layerboost.evaluation.shares import Share, mixed, requests_of_items, share_order
from layerboost.plan import Plan
from tasks.cluster.resources import WorkerResources
from tasks.evaluation import EvaluationWorker
from tasks.pool.actors import actor_maker
from tasks.pool.pool import UnitFailure, run_units
from tasks.pool.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class CountUnit:
    """How many items a spec has."""

    spec: QualitySpec


@dataclass(frozen=True)
class SweepUnit:
    """All plans over one share of the items of a spec, which has either tasks or a text."""

    spec: QualitySpec
    share: Share
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class ScoreUnit:
    """The scores of one plan over some shares of the tasks' items, from what its sweeps gave.

    Attributes:
        shares: what was swept, together all items or some.
        answers: of each share, `log_p` and `greedy` of the plan, as `SweepWorker` gave them.
    """

    spec: QualitySpec
    plan: Plan
    shares: tuple[Share, ...]
    answers: tuple[tuple[tuple[float, ...], tuple[bool, ...]], ...]


@dataclass(frozen=True)
class PlansUnit:
    """Some plans judged together by all of a spec."""

    spec: QualitySpec
    plans: tuple[Plan, ...]


class SweepWorker(EvaluationWorker):
    """Also sweeps. A plain class: Ray only wraps it."""

    def _run(self, unit: Any) -> dict[str, Any]:
        """Does one unit.

        Returns:
            JSON-able, and `evaluation_s` in each. A CountUnit gives `tasks`, the number of items of each task (`text`
            for the sequences of a text), `costs`, the tokens that each item adds to those before it, and `generating`,
            the tasks that have the model generate. A SweepUnit gives a list with one entry for each plan under each of
            `log_p` and `greedy` (one value for each request of the share, in their order) or `nll` and `kl` (one for
            each sequence). A ScoreUnit gives `scores`, a PlansUnit a list of them.
        """
        start = time.perf_counter()
        if isinstance(unit, CountUnit):
            evaluation = self.evaluation(unit.spec)
            result: dict[str, Any] = {
                "tasks": self._count(unit.spec),
                "costs": evaluation.costs(),
                "generating": evaluation.generating,
            }
        elif isinstance(unit, SweepUnit):
            result = self._sweep(unit)
        elif isinstance(unit, ScoreUnit):
            result = {"scores": self._score(unit)}
        elif isinstance(unit, PlansUnit):
            found = self.evaluation(unit.spec).run(unit.plans)
            result = {"scores": [scores.to_dict() for scores in found]}
        else:
            return super()._run(unit)
        return {**result, "evaluation_s": time.perf_counter() - start}

    def _count(self, spec: QualitySpec) -> dict[str, int]:
        evaluation = self.evaluation(spec)
        if evaluation.sequences is not None:
            return {"text": len(evaluation.sequences)}
        counts: dict[str, int] = defaultdict(int)
        for item in evaluation.items:
            counts[item.task] += 1
        return dict(counts)

    def _sweep(self, unit: SweepUnit) -> dict[str, Any]:
        evaluation, share = self.evaluation(unit.spec), unit.share
        if evaluation.sequences is not None:
            order = share_order(len(evaluation.sequences), share)
            text = evaluation.read_text(unit.plans, order)
            return {"nll": text.nll.tolist(), "kl": text.kl.tolist()}
        items = self._items(unit.spec, share)
        asked = requests_of_items(items)
        answers = evaluation.answer(unit.plans, items)
        return {"log_p": answers.log_p[:, asked].tolist(), "greedy": answers.greedy[:, asked].tolist()}

    def _score(self, unit: ScoreUnit) -> dict[str, Any]:
        evaluation = self.evaluation(unit.spec)
        assert evaluation.benchmarks is not None
        n_requests = len(evaluation.benchmarks.requests)
        log_p, greedy = torch.zeros(n_requests, dtype=torch.float64), torch.ones(n_requests, dtype=torch.bool)
        items: list[Item] = []
        for share, (share_log_p, share_greedy) in zip(unit.shares, unit.answers, strict=True):
            of_share = self._items(unit.spec, share)
            asked = requests_of_items(of_share)
            log_p[asked] = torch.tensor(share_log_p, dtype=torch.float64)
            greedy[asked] = torch.tensor(share_greedy)
            items += of_share
        some = None if len(items) == len(evaluation.items) else items
        return evaluation.scores(unit.plan, (log_p, greedy), None, some).to_dict()

    def _items(self, spec: QualitySpec, share: Share) -> list[Item]:
        evaluation = self.evaluation(spec)
        if share.seed is None:
            return evaluation.items[share.start : share.stop]
        return mixed(evaluation.items, share.seed)[share.start : share.stop]


def joined_text_scores(said: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Scores:
    """The scores of a text from the NLL and KL that a plan's shares of it gave."""
    nll, kl = ([value for of_share in column for value in of_share] for column in zip(*said, strict=True))
    return text_scores(nll, kl, primary=True)


def sweep_units(
    units: Sequence[Any],
    source: ModelSource,
    spec: QualitySpec,
    resources: WorkerResources,
    *,
    on_result: Callable[[Any, dict, float, dict], None],
    on_results_end: Callable[[], None] | None = None,
    on_failure: Callable[[UnitFailure], None] | None = None,
    more_units: Callable[[], Sequence[Any]] | None = None,
    n_workers: Callable[[], int] | None = None,
    max_attempts: int = 3,
    watch: Watch = UNWATCHED,
) -> list[UnitFailure]:
    """Runs units of a sweep on the cluster, one model for each worker; see `run_units`.

    Args:
        spec: what units that name none (`EvaluationUnit`) are judged by.
        n_workers: asked now and then for how many workers there may be by now; the resources' number if None.
    """
    threads, activations_gib = resources.threads, resources.activations_gib
    return run_units(
        units,
        actor_maker(SweepWorker, resources, source, spec, threads, activations_gib),
        n_workers=n_workers or resources.n_workers,
        on_result=on_result,
        on_results_end=on_results_end,
        on_failure=on_failure,
        more_units=more_units,
        max_attempts=max_attempts,
        watch=watch,
    )
