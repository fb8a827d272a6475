"""Holds the seconds that judging, healing and decoding take by treatment, as measured by the probe for the estimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan, Treatment

ByTreatment = dict[str, float]
"""Cost of the plan that treats every layer alike, by the treatment's name; other plans' costs lie between these."""


@dataclass(frozen=True)
class EvaluationCosts:
    """Holds seconds on one worker, for everything in the spec unless said otherwise.

    Attributes:
        prepare_s: To collect what the tasks ask.
        score_s: To compute lm-eval's scores of a plan from its answers.
        tasks_s, text_s: To judge a plan by the tasks and by the text, as `PlanEvaluation` does.
        direct_s: To judge a separate model, as `evaluate` does.
        sweep_s: To judge all single-layer plans, by source: `tasks` and `text`.
        likelihood_s: To measure only the likelihood of the text under a plan.
    """

    prepare_s: float
    score_s: float
    tasks_s: ByTreatment
    text_s: ByTreatment
    direct_s: float
    sweep_s: dict[str, float]
    likelihood_s: ByTreatment


@dataclass(frozen=True)
class HealingCosts:
    """Holds the seconds of one worker's step in each phase, and the number of trained parameters.

    `step_s` includes the teacher's forward pass, which takes `teacher_step_s`; healings that share it do without.
    """

    step_s: ByTreatment
    transfer_step_s: float
    n_trained: int
    teacher_step_s: float


@dataclass(frozen=True)
class DecodeCosts:
    """Holds the seconds of a prefill and of a decode step under one condition."""

    concurrency: int
    prompt_tokens: int
    prefill_s: ByTreatment
    step_s: ByTreatment


@dataclass(frozen=True)
class Costs:
    """Holds all measured costs.

    `slowness` is the time of plain Python on this machine, relative to the machine that fixed costs were measured on.
    """

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


def mixed(costs: ByTreatment, plan: Plan | None, *, middle: str) -> float:
    """Returns the cost of a plan as a mean over its layers of the uniform plans' costs.

    A plan that is not known yet (None) is taken to have softmax and none in two fifths of its layers each and the
    middle treatment of searched plans in the rest, which is about what searches propose.
    """
    if plan is None:
        return 0.4 * costs[Treatment.SOFTMAX.value] + 0.4 * costs[Treatment.NONE.value] + 0.2 * costs[middle]
    return sum(costs[treatment.value] for treatment in plan.treatments) / len(plan)
