"""Seconds that judging, healing and decoding take, by treatment: what the probe measures and the estimate reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan

_UNKNOWN_PLAN = (0.4, 0.4, 0.2)


ByTreatment = dict[str, float]
"""Of the plan that treats every layer alike, by the treatment's name; other plans lie between.

Softmax, none and the middle treatment of searched plans come first.
"""


@dataclass(frozen=True)
class EvaluationCosts:
    """Seconds on one worker, for everything in the spec unless said otherwise.

    Attributes:
        prepare_s: to learn what the tasks ask.
        score_s: lm-eval's scores of a plan from its answers.
        tasks_s, text_s: to judge a plan by the tasks and by the text, as `PlanEvaluation` does.
        direct_s: to judge a model of its own, as `evaluate` does.
        sweep_s: of all single-layer plans, by the tasks and by the text.
    """

    prepare_s: float
    score_s: float
    tasks_s: ByTreatment
    text_s: ByTreatment
    direct_s: float
    sweep_s: dict[str, float]


@dataclass(frozen=True)
class HealingCosts:
    """Seconds of a step of one worker in each phase, and the numbers that are trained."""

    step_s: ByTreatment
    transfer_step_s: float
    n_trained: int


@dataclass(frozen=True)
class DecodeCosts:
    """Seconds of a prefill and of a decode step under one condition."""

    concurrency: int
    prompt_tokens: int
    prefill_s: ByTreatment
    step_s: ByTreatment


@dataclass(frozen=True)
class Costs:
    """All of it. `slowness` is this machine's time for plain Python over that of the one fixed costs come from."""

    slowness: float
    load_s: float
    n_parameters: int
    dtype_bytes: int
    evaluation: EvaluationCosts
    healing: HealingCosts | None
    decode: tuple[DecodeCosts, ...]
    sample_token_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Costs:
        healing = data["healing"]
        parts = {
            "evaluation": EvaluationCosts(**data["evaluation"]),
            "healing": None if healing is None else HealingCosts(**healing),
            "decode": tuple(DecodeCosts(**costs) for costs in data["decode"]),
        }
        return cls(**data | parts)


def mixed(costs: ByTreatment, plan: Plan | None = None) -> float:
    """The cost of a plan from those of the uniform ones.

    One that is not known yet has softmax and none in two fifths of its layers each, the middle treatment in the rest:
    about what searches propose.
    """
    if plan is None:
        return sum(share * cost for share, cost in zip(_UNKNOWN_PLAN, costs.values()))
    return sum(costs[treatment.value] for treatment in plan.treatments) / len(plan)
