"""The seconds that units of work take, from what a calibration has measured."""

from __future__ import annotations

from collections.abc import Sequence

from layerboost.costs.costs import ByTreatment, Costs, DecodeCosts, mixed
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan, Treatment
from layerboost.speed.vllm_bench import ServingCondition
from orchestrator.run.inputs import RunInputs
from tasks.engines import ENGINES
from tasks.timing import ThroughputUnit

# Seconds that no model changes, on the machine that `layerboost.costs.probe` calls the reference; times `slowness`.
WORKER_START_S = 6.0  # a process, its imports, what only its first unit does
HARNESS_IMPORT_S = 3.0  # lm-eval, in each worker that asks tasks
TUNE_S = 4.0
_CHECKPOINT_S = 2.0  # a healed model, loaded for each condition that it is timed under
_HEALING_JOB_S = 7.0  # the Train job and its process, the text, the checkpoints, the healed model's folder
_HEALING_PHASE_S = 1.5  # an engine and what it compiles
_STEP_S = 0.01  # DeepSpeed's part of a step

BESIDE_OTHERS = 1.15
"""How much longer a unit takes while other workers share the caches, the memory and the cores with the driver."""

THREADS_USED = 0.7
"""Of what more threads could save of a healing step, the share that they do save."""

SHARED_LAYERS = 0.7
"""What one more plan costs of a pass of its own, among plans that are judged together."""


class UnitSeconds:
    """What single units of a run take on one worker."""

    def __init__(self, inputs: RunInputs, costs: Costs):
        self._inputs, self._costs = inputs, costs
        self._base = Plan.uniform(Treatment.SOFTMAX, inputs.n_layers)

    def judged_s(self, plan: Plan | None, *, with_text: bool = True) -> float:
        """Judging a plan on the parent's weights; an average one if None."""
        costs = self._costs.evaluation
        text_s = mixed(costs.text_s, plan) if with_text else 0.0
        return mixed(costs.tasks_s, plan) + text_s + (costs.score_s if self._inputs.full_spec.tasks else 0.0)

    def branches_s(self) -> float:
        """Judging a healed plan's branches: with both, and with either zeroed."""
        return 3 * mixed(self._costs.evaluation.text_s, None)

    def healed_s(self, spec: HealingSpec, plan: Plan | None, slower: float = 1.0) -> float:
        """Healing a plan, an average one if None; its steps take `slower` times as long as with all threads."""
        costs = self._costs.healing
        assert costs is not None
        transfer = int(spec.steps * spec.transfer_fraction) if costs.transfer_step_s else 0
        step_s = mixed(costs.step_s, plan) + _STEP_S * self._costs.slowness
        n_phases = 2 if transfer else 1
        overhead_s = (_HEALING_JOB_S + n_phases * _HEALING_PHASE_S) * self._costs.slowness + 2 * self._costs.load_s
        return overhead_s + slower * (transfer * costs.transfer_step_s + (spec.steps - transfer) * step_s)

    def timed_s(self, unit: ThroughputUnit) -> float:
        """Timing a model; a healed checkpoint has an average plan, and its parent beside it."""
        at = unit.concurrency, unit.prompt_tokens
        plan = None if unit.checkpoint is not None else unit.plan or self._base
        if ENGINES[self._inputs.recipe.throughput.engine].serves:
            return self._served_s(plan, *at)
        if unit.checkpoint is None:
            return self._decoded_s(plan, *at)
        loaded_s = self._costs.load_s + _CHECKPOINT_S * self._costs.slowness
        return self._decoded_s(None, *at) + self._decoded_s(self._base, *at) + loaded_s

    def server_s(self) -> float:
        """Starting a server, which every model has one of where the engine serves."""
        return ENGINES[self._inputs.recipe.throughput.engine].start_s * self._costs.slowness

    def _served_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        """What the client asks of a server in waves; it decodes as fast as the transformers engine."""
        recipe = self._inputs.recipe.throughput
        asked = ServingCondition(concurrency, prompt_tokens, recipe.new_tokens)
        waves = 1 + recipe.repeats * asked.n_requests / concurrency
        return waves * self._decoded_s(plan, concurrency, prompt_tokens) / (1 + recipe.repeats)

    def _decoded_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        recipe = self._inputs.recipe.throughput
        prefill_s, step_s = decode_s(self._costs.decode, plan, concurrency, prompt_tokens)
        return (1 + recipe.repeats) * (prefill_s + (recipe.new_tokens - 1) * step_s)


def decode_s(
    costs: Sequence[DecodeCosts], plan: Plan | None, concurrency: int, prompt_tokens: int
) -> tuple[float, float]:
    """Seconds of a prefill and of a step of a plan, between and beyond the conditions that were timed."""

    def at(values: ByTreatment) -> float:
        return mixed(values, plan)

    alike = [cost for cost in costs if cost.prompt_tokens == prompt_tokens]
    low, high = (alike or costs)[0], (alike or costs)[-1]
    if alike and low.concurrency < high.concurrency:
        share = (concurrency - low.concurrency) / (high.concurrency - low.concurrency)
        return tuple(  # type: ignore[return-value]
            at(getattr(low, name)) + share * (at(getattr(high, name)) - at(getattr(low, name)))
            for name in ("prefill_s", "step_s")
        )
    tokens = concurrency * prompt_tokens / (high.concurrency * high.prompt_tokens)
    return at(high.prefill_s) * tokens, at(high.step_s)
