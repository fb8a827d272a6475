"""Computes the seconds that units of work take, from the measurements of a calibration."""

from __future__ import annotations

from collections.abc import Sequence

from layerboost.costs.costs import ByTreatment, Costs, DecodeCosts, mixed
from layerboost.evaluation.scores import QualitySpec
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan, Treatment
from layerboost.speed.vllm_bench import ServingCondition
from orchestrator.run.inputs import RunInputs
from tasks.engines import ENGINES
from tasks.timing import ThroughputUnit

# Seconds that do not depend on the model, on the reference machine of `layerboost.costs.probe`. They are multiplied by
# the `slowness` of the machine at hand.
WORKER_START_S = 6.0  # a process, its imports, and the extra time of its first unit
HARNESS_IMPORT_S = 3.0  # importing lm-eval in each worker that asks tasks
TUNE_S = 4.0
_CHECKPOINT_S = 2.0  # loading a healed model, once for each condition under which it is timed
_HEALING_JOB_S = 7.0  # the Train job and its process, the text, the checkpoints, the healed model's folder
_HEALING_PHASE_S = 1.5  # starting an engine and compiling for it
_STEP_S = 0.01  # DeepSpeed's part of a step

BESIDE_OTHERS = 1.15
"""Factor by which a unit takes longer while other workers and the driver share caches, memory and cores with it."""

THREADS_USED = 0.7
"""Share of the ideal speedup by more threads that a healing step reaches."""

SHARED_LAYERS = 0.7
"""Cost of one more plan among plans that are judged together, as a share of judging it alone."""


WARM_UP_PASSES = 0.2
"""Passes that warm a model up before it is timed: two chunks of its prefill and a few steps."""


class UnitSeconds:
    """Computes the seconds of single units of a run on one worker."""

    def __init__(self, inputs: RunInputs, costs: Costs):
        self._inputs, self._costs = inputs, costs
        self._base = Plan.uniform(Treatment.SOFTMAX, inputs.n_layers)

    def mixed(self, costs: ByTreatment, plan: Plan | None) -> float:
        """Returns the cost of a plan; None stands for an average plan of the search."""
        return mixed(costs, plan, middle=self._inputs.recipe.search.middle)

    def judged_s(self, plan: Plan | None, spec: QualitySpec) -> float:
        """Returns the seconds of judging a plan on the parent's weights; None stands for an average plan.

        Args:
            plan: The plan.
            spec: What it is judged by; without tasks or text, those cost nothing.
        """
        costs = self._costs.evaluation
        of_text = costs.likelihood_s if spec.likelihood_only else costs.text_s
        text_s = 0.0 if spec.text is None else self.mixed(of_text, plan)
        return text_s + (self.mixed(costs.tasks_s, plan) + costs.score_s if spec.tasks else 0.0)

    def maps_s(self) -> float:
        """Returns the seconds of fitting the map of each layer: a pass of the model over the text, and as much again.

        The pass is taken from what it costs a teacher or a judged text; it counts nothing where neither was timed.
        """
        spec, costs = self._inputs.maps_spec, self._costs
        if spec is None:
            return 0.0
        token_s = 0.0
        if costs.healing is not None:
            token_s = costs.healing.teacher_step_s / self._inputs.healing_spec.tokens_per_step
        elif (judged := self._inputs.full_spec).text is not None:
            n_tokens = (judged.n_sequences or 1) * judged.sequence_tokens
            token_s = self.mixed(costs.evaluation.text_s, self._base) / n_tokens
        return 2 * spec.tokens * token_s

    def branches_s(self) -> float:
        """Returns the seconds of judging a healed plan's branches: with both, and with each of them zeroed."""
        return 3 * self.mixed(self._costs.evaluation.text_s, None)

    def healed_s(
        self, spec: HealingSpec, plan: Plan | None, slower: float = 1.0, *, found_states: float = 0.0
    ) -> float:
        """Returns the seconds of healing a plan; None stands for an average plan.

        Steps take `slower` times as long as with all threads. `found_states` is the share of the text for which the
        teacher's states of an earlier healing are found, so that it does not run.
        """
        costs = self._costs.healing
        assert costs is not None
        is_transferred = plan is None or plan.is_transferred
        transfer = int(spec.steps * spec.transfer_fraction) if costs.transfer_step_s and is_transferred else 0
        step_s = self.mixed(costs.step_s, plan) + _STEP_S * self._costs.slowness
        step_s -= found_states * min(step_s, costs.teacher_step_s)
        n_phases = 2 if transfer else 1
        overhead_s = (_HEALING_JOB_S + n_phases * _HEALING_PHASE_S) * self._costs.slowness + 2 * self._costs.load_s
        if plan is not None and plan.count(Treatment.AFFINE):
            overhead_s += 2 * self.maps_s()  # the untouched model and the treated one go through the layers
        return overhead_s + slower * (transfer * costs.transfer_step_s + (spec.steps - transfer) * step_s)

    def timed_s(self, unit: ThroughputUnit) -> float:
        """Returns the seconds of timing a model; a healed checkpoint counts as an average plan beside its parent."""
        at = unit.concurrency, unit.prompt_tokens
        plan = None if unit.checkpoint is not None else unit.plan or self._base
        if ENGINES[self._inputs.recipe.throughput.engine].serves:
            return self._served_s(plan, *at)
        if unit.checkpoint is None:
            return self._decoded_s(plan, *at)
        loaded_s = self._costs.load_s + _CHECKPOINT_S * self._costs.slowness
        return self._decoded_s(None, *at) + self._decoded_s(self._base, *at) + loaded_s

    def server_s(self) -> float:
        """Returns the seconds of starting a server; with a serving engine every model has one."""
        return ENGINES[self._inputs.recipe.throughput.engine].start_s * self._costs.slowness

    def _served_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        """Returns the seconds of a server's waves of requests, as if it decoded as fast as the transformers engine."""
        recipe = self._inputs.recipe.throughput
        asked = ServingCondition(concurrency, prompt_tokens, recipe.new_tokens)
        waves = 1 + recipe.repeats * asked.n_requests / concurrency
        return waves * self._pass_s(plan, concurrency, prompt_tokens)

    def _decoded_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        n_passes = WARM_UP_PASSES + self._inputs.recipe.throughput.repeats
        return n_passes * self._pass_s(plan, concurrency, prompt_tokens)

    def _pass_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        recipe, middle = self._inputs.recipe.throughput, self._inputs.recipe.search.middle
        prefill_s, step_s = decode_s(self._costs.decode, plan, concurrency, prompt_tokens, middle=middle)
        return prefill_s + (recipe.new_tokens - 1) * step_s


def decode_s(
    costs: Sequence[DecodeCosts], plan: Plan | None, concurrency: int, prompt_tokens: int, *, middle: str
) -> tuple[float, float]:
    """Returns the seconds of a plan's prefill and decode step, inter- or extrapolated from the timed conditions."""

    def at(values: ByTreatment) -> float:
        return mixed(values, plan, middle=middle)

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
