"""Runs the sensitivity sweep on a cluster: each worker takes a share of the items and runs all plans on it.

Items are shared out and plans never, because one pass over an item's context serves all plans. How many fit into memory
together is decided by the worker (`LayerSweep`). Workers return answers and not scores: lm-eval's metrics are computed
when all shares of a plan are there, so they do not depend on how the items were shared out.
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
from tasks.evaluation import EvaluationUnit, EvaluationWorker
from tasks.pool.actors import actor_maker
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure, run_units
from tasks.pool.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class CountUnit:
    """Asks how many items a spec has."""

    spec: QualitySpec


@dataclass(frozen=True)
class SweepUnit:
    """Asks for all plans on one share of the items of a spec, which has either tasks or a text."""

    spec: QualitySpec
    share: Share
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class ScoreUnit:
    """Asks for the scores of one plan from the answers that its sweeps gave.

    Attributes:
        shares: the swept shares of the tasks' items; together they hold all items or some of them.
        answers: for each share the plan's `log_p` and `greedy` from `SweepWorker`.
    """

    spec: QualitySpec
    plan: Plan
    shares: tuple[Share, ...]
    answers: tuple[tuple[tuple[float, ...], tuple[bool, ...]], ...]


@dataclass(frozen=True)
class PlansUnit:
    """Asks to judge some plans together by a whole spec."""

    spec: QualitySpec
    plans: tuple[Plan, ...]


PLANS_OF_A_UNIT = 8
"""Number of plans that one worker judges together: enough for them to share most of their layers."""


def plans_units(spec: QualitySpec, plans: Sequence[Plan]) -> list[PlansUnit]:
    """Returns the units that judge some plans, those with the same first layers together, because they share these."""
    plans = sorted(plans, key=str)
    return [
        PlansUnit(spec, tuple(plans[first : first + PLANS_OF_A_UNIT]))
        for first in range(0, len(plans), PLANS_OF_A_UNIT)
    ]


SweepWork = CountUnit | SweepUnit | ScoreUnit | PlansUnit | EvaluationUnit
"""Everything that a `SweepWorker` does."""


class SweepWorker(EvaluationWorker):
    """Also runs sweeps. It is a plain class that Ray only wraps."""

    def run(self, unit: SweepWork) -> dict[str, Any]:
        """Runs one unit.

        Returns:
            JSON values with `evaluation_s` for every unit. A CountUnit gives `tasks`, the number of items of each task
            (`text` for the sequences of a text); `costs`, the tokens that each item adds to those before it; and
            `generating`, the tasks in which the model generates. A SweepUnit gives lists with one entry for each plan,
            under `log_p` and `greedy` (one value for each request of the share, in order) or under `nll` and `kl` (one
            value for each sequence). A ScoreUnit gives `scores`, and a PlansUnit a list of `scores`.
        """
        return self._in_memory(lambda: self._do(unit))

    def _do(self, unit: SweepWork) -> dict[str, Any]:
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
            return self._judge(unit)
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
            assert text.kl is not None
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
    """Computes a plan's scores of a text from the NLL and KL of its shares."""
    nll, kl = ([value for of_share in column for value in of_share] for column in zip(*said, strict=True))
    return text_scores(nll, kl, primary=True)


def sweep_units(
    units: Sequence[SweepWork],
    source: ModelSource,
    spec: QualitySpec,
    resources: WorkerResources,
    *,
    on_result: Callable[[Finished[SweepWork, dict[str, Any]]], None],
    on_results_end: Callable[[], None] | None = None,
    on_failure: Callable[[UnitFailure[SweepWork]], None] | None = None,
    more_units: Callable[[], Sequence[SweepWork]] | None = None,
    n_workers: Callable[[], int] | None = None,
    max_attempts: int = 3,
    watch: Watch[SweepWork] = UNWATCHED,
) -> list[UnitFailure[SweepWork]]:
    """Runs units of a sweep on the cluster, one model for each worker; see `run_units`.

    Args:
        spec: the spec that judges units without one (`EvaluationUnit`).
        n_workers: called now and then for the number of workers that may run now; None takes the resources' number.
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
