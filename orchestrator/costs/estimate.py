"""What a run will cost, before it: units, seconds, tokens and memory of each stage, from a calibration of its steps.

Names are those of progress: `search` stands for its plans, `refine`, `curve` and the like for themselves. What is
recorded already costs nothing, and says better than a calibration what its stage's other units cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerboost.costs.costs import ByTreatment, Costs, DecodeCosts, mixed
from layerboost.healing.rungs import Rung, rungs, total_tokens
from layerboost.healing.spec import HealingSpec, mark_steps
from layerboost.plan import Plan, Treatment
from layerboost.search.baselines import is_of_same_budget, n_baseline_plans
from layerboost.search.loop import fixed_points
from layerboost.search.methods import METHODS
from layerboost.speed.byte_model import decode_bytes
from layerboost.speed.vllm_bench import ServingCondition
from layerboost.sweep.layer_sweep import DEFAULT_BUDGET_BYTES
from orchestrator.costs.measure import healing_workers, nodes_of
from orchestrator.run.context import RunContext
from orchestrator.run.folder import unit_key
from orchestrator.run.inputs import TASKS_SOURCE
from orchestrator.run.kinds import CURVE, HALVING, LENGTHS, REFINE, SAMPLE, SCORE_STAGES, SPEED, SWEEP, THROUGHPUT
from orchestrator.run.placement import Placement
from orchestrator.run.records import find_record
from orchestrator.stages.sampled import n_sample_units
from orchestrator.stages.sensitivity import Sweep
from orchestrator.stages.speed import designed_plans
from orchestrator.text_tables import duration, format_table
from tasks.engines import ENGINES
from tasks.evaluation import base_unit

# Seconds that no model changes, on the machine that `layerboost.costs.probe` calls the reference; times `slowness`.
_WORKER_START_S = 6.0  # a process, its imports, what only its first unit does
_HARNESS_IMPORT_S = 3.0  # lm-eval, in each worker that asks tasks
_TUNE_S = 4.0
_CHECKPOINT_S = 2.0  # a healed model, loaded for each condition that it is timed under
_HEALING_JOB_S = 7.0  # the Train job and its process, the text, the checkpoints, the healed model's folder
_HEALING_PHASE_S = 1.5  # an engine and what it compiles
_STEP_S = 0.01  # DeepSpeed's part of a step

_BESIDE_OTHERS = 1.15
"""How much longer a unit takes while other workers share the caches, the memory and the cores with the driver."""

_THREADS_USED = 0.7
"""Of what more threads could save of a healing step, the share that they do save."""

_SHARED_LAYERS = 0.7
"""What one more plan costs of a pass of its own, among plans that are judged together."""

_ACTIVATION_VALUES = 34
"""Numbers that a layer keeps for the backward pass, for each of a token's hidden ones (Korthikanti et al. 2022)."""

_MIB = 2**20


@dataclass(frozen=True)
class StageEstimate:
    """What a stage is expected to take.

    Attributes:
        units, recorded: units of work, and those of them that are recorded already.
        seconds: of wall clock, for the rest.
        tokens: that the rest is healed on.
        gpus: at work at the same time.
        memory_mib: of one worker.
        disk_mib: of what the rest leaves in the run folder, and of checkpoints while it is under way.
    """

    stage: str
    units: int
    recorded: int
    seconds: float
    tokens: int = 0
    gpus: float = 0.0
    memory_mib: float = 0.0
    disk_mib: float = 0.0

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate_stages(run: RunContext, costs: Costs) -> list[StageEstimate]:
    """The estimate of every stage that the recipe asks for.

    Searched plans and baselines are counted as if all were distinct, adaptive sweeps as if no layer stopped early,
    healing as if none was flat, sampled documents as if all were of full length.
    """
    return _Estimator(run, costs).stages()


def estimate_table(stages: Sequence[StageEstimate], device_mib: float | None) -> str:
    """The estimate as text: a line for each stage, the total, and what will not fit into memory."""
    columns = ["stage", "units", "recorded", "seconds left", "GPU hours", "healing tokens", "MiB of a worker"]
    rows: list[list[Any]] = [
        [s.stage, s.units, s.recorded, round(s.seconds, 1), s.gpu_hours or None, s.tokens or None, round(s.memory_mib)]
        for s in stages
    ]
    total = [sum(getattr(s, name) for s in stages) for name in ("units", "recorded", "seconds", "gpu_hours", "tokens")]
    rows.append(["total", total[0], total[1], round(total[2], 1), total[3] or None, total[4] or None, None])
    lines = [format_table(columns, rows).rstrip()]
    lines += [
        f"memory: {s.stage} needs about {s.memory_mib:,.0f} MiB, the device has {device_mib:,.0f}; {_REMEDY[s.stage]}"
        for s in stages
        if device_mib is not None and s.seconds and s.memory_mib > device_mib and s.stage in _REMEDY
    ]
    return "\n".join(lines)


_LESS_TO_JUDGE = "lower placement.activations_gib or quality.batch_size"
_LESS_TO_HEAL = "lower healing.micro_batch_sequences, or set healing.activation_checkpointing or zero_stage: 3"
_REMEDY = {
    **dict.fromkeys(("evaluate", "sensitivity", "search", REFINE, CURVE, "measure"), _LESS_TO_JUDGE),
    **dict.fromkeys(("heal", HALVING), _LESS_TO_HEAL),
    **dict.fromkeys((SPEED, THROUGHPUT, LENGTHS), "lower throughput.concurrency or prompt_tokens"),
}


def expected_line(stages: Sequence[StageEstimate]) -> str:
    """`5 min 10 s in all; heal 2 min 3 s, search 40 s, ...`: the stages that take longest."""
    longest = sorted((s for s in stages if s.seconds >= 1), key=lambda s: -s.seconds)[:4]
    parts = ", ".join(f"{s.stage} {duration(s.seconds)}" for s in longest)
    return f"expected: {duration(sum(s.seconds for s in stages))} in all" + (f"; {parts}" if parts else "")


class _Estimator:
    def __init__(self, run: RunContext, costs: Costs):
        self.run, self.costs, self.inputs = run, costs, run.inputs
        self.nodes = nodes = nodes_of(run)
        self.placement = Placement(self.inputs.recipe, nodes)
        self.workers = self.placement.evaluating()
        self.healers = healing_workers(self.placement)
        self.gpus_to_measure = min(1.0, max(node.gpus for node in nodes))
        self.fixed = [plan for _, plan in fixed_points(self.inputs.search_spec, self.inputs.n_layers)]
        self.healing = self.inputs.recipe.healing
        self.weights_mib = costs.n_parameters * costs.dtype_bytes / _MIB

    def stages(self) -> list[StageEstimate]:
        recipe = self.inputs.recipe
        found = [self._evaluate(), self._sensitivity()]
        if recipe.search.speed == "measured":
            found.append(self._speed())
        found.append(self._search())
        if recipe.search.refine is not None:
            found.append(self._refine())
        if self.healing.tokens:
            found += self._heal()
        return [*found, self._measure(), *self._throughput()]

    # Stages

    def _evaluate(self) -> StageEstimate:
        identity = self.inputs.scores(base_unit(), self.inputs.full_spec)
        recorded = find_record(self.run.folder, unit_key(identity), SCORE_STAGES) is not None
        return self._judging("evaluate", 1, int(recorded), self._plan_s(self._uniform(Treatment.SOFTMAX)))

    def _sensitivity(self) -> StageEstimate:
        inputs, spec = self.inputs, self.inputs.full_spec
        sources = inputs.sweep_sources[:1] if inputs.recipe.sensitivity.adaptive is not None else inputs.sweep_sources
        sweep = Sweep(self.run, sources)
        sweep_s = self.costs.evaluation.sweep_s
        n_plans = sum(map(len, inputs.sweep_plans.values()))
        seconds = 0.0
        for source in sources:
            if source.name == TASKS_SOURCE:
                seconds += sweep_s["tasks"] + n_plans * self.costs.evaluation.score_s
            else:
                of_text = max(1, (spec.n_sequences or 1) * spec.sequence_tokens)
                tokens = (source.spec.n_sequences or 1) * source.spec.sequence_tokens
                seconds += sweep_s["text"] * tokens / of_text
        n_units = sweep.n_units()
        has_tasks = any(source.name == TASKS_SOURCE for source in sources)
        return self._judging("sensitivity", n_units, sweep.n_recorded(), seconds / max(1, n_units), has_tasks=has_tasks)

    def _speed(self) -> StageEstimate:
        conditions = self._conditions()
        plans = designed_plans(self.run)
        n = len(plans) * len(conditions)
        return self._timing(SPEED, n, min(n, len(self.run.folder.records(THROUGHPUT))), plans, conditions)

    def _search(self) -> StageEstimate:
        search, spec = self.inputs.recipe.search, self.inputs.search_quality_spec
        n_layers, trials = self.inputs.n_layers, search.trials
        if METHODS[search.method].counts_repeats:
            # Drawn evenly, so many of the pairs of thresholds give a plan of their own.
            n_pairs = (n_layers + 1) * (n_layers + 2) // 2
            trials = round(n_pairs * (1 - (1 - 1 / n_pairs) ** trials))
        fixed = [plan for plan in self.fixed if not self._is_judged(plan)]
        n = len(fixed) + trials
        with_text = spec.text is not None
        total = sum(self._plan_s(plan, with_text) for plan in fixed) + trials * self._plan_s(None, with_text)
        return self._judging(
            "search", n, min(n, len(self.run.folder.records("search"))), total / max(1, n), start_s=_TUNE_S
        )

    def _refine(self) -> StageEstimate:
        source = self.inputs.sweep_sources[0]
        has_tasks = source.name == TASKS_SOURCE
        costs = self.costs.evaluation.tasks_s if has_tasks else self.costs.evaluation.text_s
        n = self.inputs.recipe.search.refine.plans  # type: ignore[union-attr]
        each_s = _SHARED_LAYERS * mixed(costs)
        return self._judging(REFINE, n, len(self.run.folder.records(REFINE)), each_s, has_tasks=has_tasks)

    def _heal(self) -> list[StageEstimate]:
        spec, halving, found = self.inputs.healing_spec, self.healing.halving, []
        n_recorded = len(self.run.folder.records("heal"))
        if self.inputs.sampling is not None:
            n = n_sample_units(self.run)
            tokens_s = (self.costs.sample_token_s or 0.0) * self.inputs.sampling.max_tokens
            each_s = -(-32 // self.inputs.sampling.batch_size) * tokens_s
            found.append(self._judging(SAMPLE, n, len(self.run.folder.records(SAMPLE)), each_s, has_tasks=False))
        if halving is not None:
            steps = rungs(halving.plans, self.healing.candidates, halving.first, halving.rungs)
            found.append(self._halving(steps, len(self.run.folder.records(HALVING))))
        n_healed = self._n_healed()
        n_left = max(0, n_healed - n_recorded)
        each_s = self._recorded_s("heal") or self._mean_healing_s(spec)
        found.append(
            StageEstimate(
                "heal",
                n_healed,
                min(n_recorded, n_healed),
                n_left * each_s,
                n_left * spec.steps * spec.tokens_per_step,
                self.healers.gpus * self.healers.n_workers,
                self._healing_mib(spec),
                self._checkpoints_mib() + n_left * (self.weights_mib + self._snapshots_mib(spec)) if n_left else 0.0,
            )
        )
        n_points = n_healed * len(mark_steps(spec, self.healing.curve)) + self._n_baselines()
        if self.healing.curve and not self._search_judges_fully():
            n_points += self.healing.candidates
        found.append(self._judging(CURVE, n_points, len(self.run.folder.records(CURVE)), self._direct_s()))
        return found

    def _halving(self, steps: Sequence[Rung], n_recorded: int) -> StageEstimate:
        """All rungs before the whole budget; judging what each has healed is part of it."""
        most = max((rung.n_plans for rung in steps), default=1)
        each = healing_workers(self.placement, most)
        n_at_once = max(1, min(most, int(sum(node.cpus for node in self.nodes) // (each.n_workers * each.cpus))))
        if each.gpus:
            n_at_once = max(1, int(sum(node.gpus for node in self.nodes) // (each.n_workers * each.gpus)))
        # Threads that a job has fewer of than a healing of its own: not all of their time is lost.
        slower = max(1.0, _THREADS_USED * self.healers.threads / each.threads)
        seconds, n_units = 0.0, 0
        for rung in steps:
            spec = self.inputs.healing_spec_at(rung.share)
            waves = -(-rung.n_plans // n_at_once)
            judged = self._judging(HALVING, rung.n_plans, 0, self._direct_s()).seconds
            seconds += _TUNE_S * self.costs.slowness + waves * self._healing_s(spec, None, slower) + judged
            n_units += rung.n_plans

        def tokens_at(share: float) -> int:
            spec = self.inputs.healing_spec_at(share)
            return spec.steps * spec.tokens_per_step

        n_done = min(n_recorded, n_units)
        left = 1 - n_done / max(1, n_units)
        return StageEstimate(
            HALVING,
            n_units,
            n_done,
            left * seconds,
            round(left * total_tokens(steps, 0, tokens_at)),
            each.gpus * each.n_workers * n_at_once,
            self._healing_mib(self.inputs.healing_spec),
            n_at_once * self._checkpoints_mib() + most * self._trained_mib() if n_done < n_units else 0.0,
        )

    def _measure(self) -> StageEstimate:
        n_healed, n_branches = 0, 0.0
        uniform = {self.inputs.recipe.search.middle} & set(self.healing.baselines) if self.healing.tokens else set()
        if self.healing.tokens:
            n_healed = self._n_healed()
            # Of the candidates, which are not known yet, about half have a layer with branches.
            n_branches = len(uniform & {Treatment.LINEAR_WINDOW.value}) + self.healing.candidates / 2
        if self.inputs.full_spec.text is None:
            n_branches = 0.0
        n_fixed = 0 if self._search_judges_fully() else len(self.fixed) - 1
        if n_fixed and self.healing.curve:  # a quality curve begins with the plan before it is healed
            n_fixed -= len(uniform)
        n = n_healed + round(n_branches) + n_fixed
        # Branches are read with both, and with either zeroed.
        branches_s = 3 * mixed(self.costs.evaluation.text_s, None)
        all_s = (n_healed + n_fixed) * self._direct_s() + n_branches * branches_s + n * self.costs.load_s
        return self._judging("measure", n, len(self.run.folder.records("measure")), all_s / max(1, n), copies=2)

    def _throughput(self) -> list[StageEstimate]:
        lengths = self.inputs.recipe.throughput.lengths
        healed: list[Plan | None] = [None] * (self._n_healed() if self.healing.tokens else 0)
        was_timed = self.inputs.recipe.search.speed == "measured"
        n_recorded = len(self.run.folder.records(THROUGHPUT))
        conditions = self._conditions()
        plans = healed if was_timed else [*self.fixed, *healed]
        n = len(plans) * len(conditions)
        n_before = len(designed_plans(self.run)) * len(conditions) if was_timed else 0
        found = [self._timing(THROUGHPUT, n, min(n, max(0, n_recorded - n_before)), plans, conditions)]
        if lengths is not None:
            over = [(lengths.concurrency, tokens) for tokens in lengths.prompt_tokens]
            n_before += n
            plans = [*self.fixed, *healed]
            n = len(plans) * len(over)
            found.append(self._timing(LENGTHS, n, min(n, max(0, n_recorded - n_before)), plans, over))
        return found

    # Parts

    def _judging(
        self,
        stage: str,
        n_units: int,
        n_recorded: int,
        each_s: float,
        *,
        has_tasks: bool | None = None,
        start_s: float = 0.0,
        copies: int = 1,
    ) -> StageEstimate:
        """A stage of actors: each loads the model and learns what the tasks ask, then all share the units."""
        n_left, costs = max(0, n_units - n_recorded), self.costs
        n_workers = min(self.workers.n_workers, max(1, n_left))
        beside = _BESIDE_OTHERS if n_workers > 1 and not self.workers.gpus else 1.0
        if has_tasks is None:
            has_tasks = bool(self.inputs.full_spec.tasks)
        first_s = (start_s + _WORKER_START_S + (_HARNESS_IMPORT_S if has_tasks else 0.0)) * costs.slowness
        first_s += (costs.load_s + (costs.evaluation.prepare_s if has_tasks else 0.0)) * beside
        recorded_s = self._recorded_s(stage)
        unit_s = recorded_s if recorded_s is not None else each_s * beside
        # Some worker has half a unit more than its share, and the others wait for it.
        shared_s = unit_s * (n_left / n_workers + (0.5 if n_left > n_workers > 1 else 0.0))
        seconds = first_s + max(unit_s, shared_s) if n_left else 0.0
        activations = self.inputs.recipe.placement.activations_gib
        budget_bytes = activations * 2**30 if isinstance(activations, float) else DEFAULT_BUDGET_BYTES
        return StageEstimate(
            stage,
            n_units,
            min(n_recorded, n_units),
            seconds,
            gpus=self.workers.gpus * n_workers,
            memory_mib=copies * self.weights_mib + budget_bytes / _MIB,
        )

    def _timing(
        self,
        stage: str,
        n_units: int,
        n_recorded: int,
        plans: Sequence[Plan | None],
        conditions: Sequence[tuple[int, int]],
    ) -> StageEstimate:
        """Timings one after the other on a worker of their own; a healed checkpoint stands beside its parent."""
        base = self._uniform(Treatment.SOFTMAX)
        pairs = [(plan, condition) for plan in plans for condition in conditions]
        seconds = sum(self._timing_s(plan, *at) for plan, at in pairs)
        loaded_s = self.costs.load_s + _CHECKPOINT_S * self.costs.slowness
        seconds += sum(self._timing_s(base, *at) + loaded_s for plan, at in pairs if plan is None)
        if ENGINES[self.inputs.recipe.throughput.engine].serves:
            seconds = self._serving_s([*plans, base], conditions)  # the parent once more, for the machine drifts
        recorded_s = None if stage == LENGTHS else self._recorded_s(THROUGHPUT)
        if recorded_s is not None:
            seconds = recorded_s * n_units
        left = 1 - n_recorded / max(1, n_units)
        started_s = _WORKER_START_S * self.costs.slowness + self.costs.load_s if left else 0.0
        seconds = left * seconds + started_s if n_units else 0.0
        recipe, config = self.inputs.recipe.throughput, self.inputs.facts.config
        held = max(
            decode_bytes(
                config,
                None,
                concurrency=concurrency,
                context_tokens=tokens + recipe.new_tokens,
                dtype_bytes=self.costs.dtype_bytes,
            )
            for concurrency, tokens in conditions
        )
        return StageEstimate(
            stage,
            n_units,
            n_recorded,
            seconds,
            gpus=self.gpus_to_measure,
            memory_mib=held / _MIB,
        )

    def _serving_s(self, plans: Sequence[Plan | None], conditions: Sequence[tuple[int, int]]) -> float:
        """A server for each model, which the client asks in waves; as fast as the transformers engine decodes."""
        recipe = self.inputs.recipe.throughput
        seconds = len(plans) * ENGINES[recipe.engine].start_s * self.costs.slowness
        for concurrency, tokens in conditions:
            asked = ServingCondition(concurrency, tokens, recipe.new_tokens)
            waves = 1 + recipe.repeats * asked.n_requests / concurrency
            each_s = sum(self._timing_s(plan, concurrency, tokens) for plan in plans) / (1 + recipe.repeats)
            seconds += waves * each_s
        return seconds

    def _timing_s(self, plan: Plan | None, concurrency: int, prompt_tokens: int) -> float:
        recipe = self.inputs.recipe.throughput
        prefill_s, step_s = _decode_s(self.costs.decode, plan, concurrency, prompt_tokens)
        return (1 + recipe.repeats) * (prefill_s + (recipe.new_tokens - 1) * step_s)

    def _conditions(self) -> list[tuple[int, int]]:
        recipe = self.inputs.recipe.throughput
        return [(concurrency, recipe.prompt_tokens) for concurrency in recipe.concurrency]

    def _plan_s(self, plan: Plan | None, with_text: bool = True) -> float:
        """Worker seconds to judge a plan on the parent's weights."""
        costs = self.costs.evaluation
        text_s = mixed(costs.text_s, plan) if with_text else 0.0
        return mixed(costs.tasks_s, plan) + text_s + (costs.score_s if self.inputs.full_spec.tasks else 0.0)

    def _direct_s(self) -> float:
        return self.costs.evaluation.direct_s

    def _mean_healing_s(self, spec: HealingSpec) -> float:
        """Of the candidates, which are not known yet, and the baselines, of which the uniform ones are."""
        plans: list[Plan | None] = [None] * self.healing.candidates
        for name in self.healing.baselines:
            n = n_baseline_plans(name) * (self.healing.candidates if is_of_same_budget(name) else 1)
            is_uniform = name == self.inputs.recipe.search.middle
            plans += [self._uniform(Treatment(name)) if is_uniform else None] * n
        return statistics.fmean(self._healing_s(spec, plan) for plan in plans)

    def _healing_s(self, spec: HealingSpec, plan: Plan | None, slower: float = 1.0) -> float:
        costs = self.costs.healing
        assert costs is not None
        transfer = int(spec.steps * spec.transfer_fraction) if costs.transfer_step_s else 0
        step_s = mixed(costs.step_s, plan) + _STEP_S * self.costs.slowness
        n_phases = 2 if transfer else 1
        overhead_s = (_HEALING_JOB_S + n_phases * _HEALING_PHASE_S) * self.costs.slowness + 2 * self.costs.load_s
        return overhead_s + slower * (transfer * costs.transfer_step_s + (spec.steps - transfer) * step_s)

    def _healing_mib(self, spec: HealingSpec) -> float:
        """Weights, what the optimizer holds of what is trained (by ZeRO stage), and activations of one pass."""
        costs, healing, n_workers = self.costs, self.healing, self.healers.n_workers
        n_trained = 0 if costs.healing is None else costs.healing.n_trained
        stage = max(1, healing.zero_stage)
        weights = costs.n_parameters * costs.dtype_bytes / (n_workers if stage == 3 else 1)
        trained = n_trained * costs.dtype_bytes / (n_workers if stage == 3 else 1)
        gradients = n_trained * costs.dtype_bytes / (n_workers if stage >= 2 else 1)
        masters = 0 if costs.dtype_bytes == 4 else 4
        optimizer = 0.0 if healing.offload_optimizer else n_trained * (8 + masters) / n_workers
        config = self.inputs.facts.config.get_text_config()
        batch = min(spec.micro_batch_sequences or spec.batch_sequences, -(-spec.batch_sequences // n_workers))
        values = batch * spec.sequence_tokens * config.hidden_size
        kept = self.inputs.n_layers + _ACTIVATION_VALUES
        if not spec.activation_checkpointing:
            kept = self.inputs.n_layers * _ACTIVATION_VALUES
        return (weights + trained + gradients + optimizer + values * kept * costs.dtype_bytes) / _MIB

    def _trained_mib(self) -> float:
        """What a snapshot of the trained parameters takes."""
        costs = self.costs
        return 0.0 if costs.healing is None else costs.healing.n_trained * costs.dtype_bytes / _MIB

    def _snapshots_mib(self, spec: HealingSpec) -> float:
        return len(mark_steps(spec, self.healing.curve)) * self._trained_mib()

    def _checkpoints_mib(self) -> float:
        """Masters and two moments in fp32: two checkpoints are kept while a third one is written."""
        costs = self.costs.healing
        return 0.0 if costs is None else 3 * 12 * costs.n_trained / _MIB

    def _n_healed(self) -> int:
        return self.healing.candidates + self._n_baselines()

    def _n_baselines(self) -> int:
        return sum(
            n_baseline_plans(name) * (self.healing.candidates if is_of_same_budget(name) else 1)
            for name in self.healing.baselines
        )

    def _search_judges_fully(self) -> bool:
        """Whether the search judges plans by all that finalists are judged by, so that they need it no second time."""
        return self.inputs.search_quality_spec == self.inputs.full_spec

    def _is_judged(self, plan: Plan) -> bool:
        """Whether the search finds a fixed point judged already: the base, by the first stage."""
        return plan.count(Treatment.SOFTMAX) == len(plan) and self._search_judges_fully()

    def _uniform(self, treatment: Treatment) -> Plan:
        return Plan.uniform(treatment, self.inputs.n_layers, self.inputs.recipe.search.window)

    def _recorded_s(self, stage: str) -> float | None:
        """Mean worker seconds of the recorded units of a stage; None where there are none."""
        records = self.run.folder.records(SWEEP if stage == "sensitivity" else stage)
        found = [record.result["duration_s"] for record in records if "costs" not in record.result]
        # A share of a sweep is recorded once for each treatment.
        of_a_unit = len(self.inputs.sweep_plans) if stage == "sensitivity" else 1
        return of_a_unit * statistics.fmean(found) if found else None


def _decode_s(
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


def device_mib() -> float:
    """Memory of this machine's first GPU, or of the machine where there is none."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / _MIB
    return psutil.virtual_memory().total / _MIB
