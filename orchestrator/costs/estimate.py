"""Estimates the cost of a run before it starts: units, seconds, tokens and memory of each stage, from a calibration.

The units are those that the stages list (`orchestrator.costs.ahead`), under the names that progress uses: `search`
counts its plans, while `refine`, `curve` and the like are listed separately. Recorded units cost nothing more. The
ratio of their actual to their expected time corrects the expectation for the remaining units of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerboost.costs.costs import Costs
from layerboost.plan import Plan, Treatment
from orchestrator.costs.ahead import units_ahead
from orchestrator.costs.measure import healing_workers, nodes_of
from orchestrator.costs.memory import MIB, Room
from orchestrator.costs.seconds import (
    BESIDE_OTHERS,
    HARNESS_IMPORT_S,
    SHARED_LAYERS,
    THREADS_USED,
    TUNE_S,
    WORKER_START_S,
    UnitSeconds,
)
from orchestrator.run.context import RunContext
from orchestrator.run.entries import StageEstimate
from orchestrator.run.inputs import TASKS_SOURCE, SweepSource
from orchestrator.run.kinds import CURVE, HALVING, LENGTHS, RACE, REFINE, SAMPLE, SPEED, THROUGHPUT
from orchestrator.run.placement import Placement
from orchestrator.run.units import StageUnits, Unit
from orchestrator.stages.halving import ladder_for
from orchestrator.stages.healing_jobs import teacher_cache
from orchestrator.text_tables import duration, format_table
from tasks.engines import ENGINES
from tasks.timing import ThroughputUnit


def estimate_stages(run: RunContext, costs: Costs) -> list[StageEstimate]:
    """Estimates every stage that the recipe asks for.

    Units that cannot be named yet are counted by their expected number. It assumes that all baselines are distinct,
    that no layer of an adaptive sweep and no healing stops early, and that all sampled documents have full length.
    """
    return _Estimator(run, costs).stages()


def estimate_table(stages: Sequence[StageEstimate], device_mib: float | None) -> str:
    """Formats the estimate as text: a line for each stage, the total, and the stages that will not fit into memory.

    The column `open` counts units that depend on results still missing; there may be fewer or more of them.
    """
    columns = ["stage", "units", "recorded", "open", "seconds left", "GPU hours", "healing tokens", "MiB of a worker"]
    rows: list[list[Any]] = [
        [
            *(s.stage, s.units, s.recorded, s.n_open or None, round(s.seconds, 1)),
            *(s.gpu_hours or None, s.tokens or None, round(s.memory_mib)),
        ]
        for s in stages
    ]
    names = ("units", "recorded", "n_open", "seconds", "gpu_hours", "tokens")
    total = {name: sum(getattr(s, name) for s in stages) for name in names}
    rows.append(
        [
            *("total", total["units"], total["recorded"], total["n_open"] or None, round(total["seconds"], 1)),
            *(total["gpu_hours"] or None, total["tokens"] or None, None),
        ]
    )
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
    **dict.fromkeys(("evaluate", "sensitivity", "search", RACE, REFINE, CURVE, "measure"), _LESS_TO_JUDGE),
    **dict.fromkeys(("heal", HALVING), _LESS_TO_HEAL),
    **dict.fromkeys((SPEED, THROUGHPUT, LENGTHS), "lower throughput.concurrency or prompt_tokens"),
}


def expected_line(stages: Sequence[StageEstimate]) -> str:
    """Writes a line such as `expected: 5 min 10 s in all; heal 2 min 3 s, search 40 s` with the longest stages."""
    longest = sorted((s for s in stages if s.seconds >= 1), key=lambda s: -s.seconds)[:4]
    parts = ", ".join(f"{s.stage} {duration(s.seconds)}" for s in longest)
    return f"expected: {duration(sum(s.seconds for s in stages))} in all" + (f"; {parts}" if parts else "")


class _Estimator:
    def __init__(self, run: RunContext, costs: Costs):
        self.run, self.costs, self.inputs = run, costs, run.inputs
        self.nodes = nodes_of(run)
        self.placement = Placement(self.inputs.recipe, self.nodes)
        self.workers = self.placement.evaluating()
        self.healers = healing_workers(self.placement)
        self.gpus_to_measure = min(1.0, max(node.gpus for node in self.nodes))
        self.seconds = UnitSeconds(self.inputs, costs)
        self.room = Room(self.inputs, costs, self.healers.n_workers)
        self.listed = units_ahead(run)

    def stages(self) -> list[StageEstimate]:
        estimates: dict[str, Callable[[StageUnits], StageEstimate]] = {
            "evaluate": self._evaluate,
            "sensitivity": self._sensitivity,
            SPEED: self._timing,
            "search": self._search,
            RACE: self._race,
            REFINE: self._refine,
            SAMPLE: self._sample,
            HALVING: self._halving,
            "heal": self._heal,
            CURVE: self._curve,
            "measure": self._measure,
            THROUGHPUT: self._timing,
            LENGTHS: self._timing,
        }
        return [estimates[stage](listing) for stage, listing in self.listed.items()]

    # Stages

    def _evaluate(self, listing: StageUnits) -> StageEstimate:
        base = Plan.uniform(Treatment.SOFTMAX, self.inputs.n_layers)
        judged_s, maps_s = self.seconds.judged_s(base, self.inputs.full_spec), self.seconds.maps_s()
        return self._judging(listing, lambda unit: maps_s if unit.work.kind == "maps" else judged_s)

    def _sensitivity(self, listing: StageUnits) -> StageEstimate:
        inputs = self.inputs
        ends_early = inputs.recipe.sensitivity.stable_at is not None
        is_adaptive = inputs.recipe.sensitivity.adaptive is not None or ends_early
        sources = inputs.sweep_sources[:1] if is_adaptive else inputs.sweep_sources
        of_source: dict[tuple[Any, Any], list[Unit]] = {}
        for unit in listing.units:
            of_source.setdefault((unit.name.get("source"), unit.name.get("context_tokens")), []).append(unit)
        unit_s: dict[str, float] = {}  # cosine distances count as 0: one pass is negligible beside those of a sweep
        uncounted_s = 0.0
        for source in sources:
            of_this = of_source.get((source.name, source.context_tokens), [])
            if is_adaptive or not of_this:
                uncounted_s += self._swept_s(source)
            else:
                unit_s |= dict.fromkeys((unit.key for unit in of_this), self._swept_s(source) / len(of_this))
        if is_adaptive:
            uncounted_s *= listing.n_open / max(1, listing.n_expected)
            unit_s = dict.fromkeys((u.key for u in listing.units), self._swept_s(sources[0]) / listing.n_expected)
        return self._judging(
            listing,
            lambda unit: unit_s.get(unit.key, 0.0),
            uncounted_s / max(1, listing.n_open),
            has_tasks=any(source.name == TASKS_SOURCE for source in sources),
        )

    def _swept_s(self, source: SweepSource) -> float:
        """Returns the worker seconds of sweeping all items of a source."""
        costs, spec = self.costs.evaluation, self.inputs.full_spec
        if source.name == TASKS_SOURCE:
            return costs.sweep_s["tasks"] + sum(map(len, self.inputs.sweep_plans.values())) * costs.score_s
        of_text = max(1, (spec.n_sequences or 1) * spec.sequence_tokens)
        return costs.sweep_s["text"] * (source.spec.n_sequences or 1) * source.spec.sequence_tokens / of_text

    def _search(self, listing: StageUnits) -> StageEstimate:
        spec, share = self.inputs.first_quality_spec, self.inputs.first_share

        def judged_s(plan: Any) -> float:
            return share * self.seconds.judged_s(plan, spec)

        return self._judging(
            listing, lambda unit: judged_s(unit.work), judged_s(None), has_tasks=bool(spec.tasks), start_s=TUNE_S
        )

    def _race(self, listing: StageUnits) -> StageEstimate:
        spec = self.inputs.search_quality_spec

        def judged_s(plan: Plan | None) -> float:
            return SHARED_LAYERS * self.seconds.judged_s(plan, spec)

        return self._judging(listing, lambda unit: judged_s(unit.work), judged_s(None), has_tasks=bool(spec.tasks))

    def _refine(self, listing: StageUnits) -> StageEstimate:
        has_tasks = self.inputs.sweep_sources[0].name == TASKS_SOURCE
        costs = self.costs.evaluation.tasks_s if has_tasks else self.costs.evaluation.text_s
        each_s = SHARED_LAYERS * self.seconds.mixed(costs, None)
        return self._judging(listing, lambda unit: each_s, each_s, has_tasks=has_tasks)

    def _sample(self, listing: StageUnits) -> StageEstimate:
        sampling = self.inputs.sampling
        assert sampling is not None
        tokens_s = (self.costs.sample_token_s or 0.0) * sampling.max_tokens

        def sampled_s(unit: Unit) -> float:
            return -(-unit.work.n_documents // sampling.batch_size) * tokens_s

        return self._judging(listing, sampled_s, has_tasks=False)

    def _halving(self, listing: StageUnits) -> StageEstimate:
        """Estimates all rungs, including the judging of their healed plans."""
        settings = self.inputs.recipe.healing.halving
        assert settings is not None
        n_first = sum(unit.name["rung"] == 1 for unit in listing.units)
        ladder = ladder_for(self.run, n_first or settings.plans)
        most = max((rung.n_plans for rung in ladder), default=1)
        each = healing_workers(self.placement, most)
        n_at_once = max(1, min(most, int(sum(node.cpus for node in self.nodes) // (each.n_workers * each.cpus))))
        if each.gpus:
            n_at_once = max(1, int(sum(node.gpus for node in self.nodes) // (each.n_workers * each.gpus)))
        # Jobs side by side have fewer threads each than a healing alone; a step slows down by only part of that factor.
        slower = max(1.0, THREADS_USED * self.healers.threads / each.threads)
        ratio = self._ratio(listing, lambda unit: self.seconds.healed_s(unit.work[1], None, slower)) or 1.0
        named = {unit.name["rung"] for unit in listing.units}
        quality = self.inputs.search_quality_spec
        judge_s = self.costs.evaluation.direct_s if quality.tasks else self.seconds.judged_s(None, quality)
        seconds, n_tokens = 0.0, 0
        for number, rung in enumerate(ladder, start=1):
            n_left = sum(unit.name["rung"] == number for unit in listing.todo) if number in named else rung.n_plans
            if not n_left:
                continue
            spec = self.inputs.healing_spec_at(rung.share)
            judged_s = self._workers_s(n_left, n_left * judge_s, has_tasks=bool(quality.tasks))
            healed_s = -(-n_left // n_at_once) * self.seconds.healed_s(spec, None, slower)
            seconds += TUNE_S * self.costs.slowness + ratio * healed_s + judged_s
            n_tokens += n_left * spec.steps * spec.tokens_per_step
        checkpoints_mib = n_at_once * self.room.checkpoints_mib() + most * self.room.trained_mib()
        return StageEstimate(
            HALVING,
            listing.n_expected,
            listing.n_recorded,
            seconds,
            n_tokens,
            each.gpus * each.n_workers * n_at_once,
            self.room.healing_mib(self.inputs.healing_spec),
            0.0 if listing.is_complete else checkpoints_mib,
            listing.n_open,
        )

    def _heal(self, listing: StageUnits) -> StageEstimate:
        spec, n_left = self.inputs.healing_spec, len(listing.todo) + listing.n_open
        kept_mib, needed_mib = self.room.teacher_states_mib(spec, teacher_cache(self.run))
        # The first healing keeps the teacher's states for the others, as far as there is room.
        first = listing.todo[0] if listing.todo else None
        found = kept_mib / needed_mib

        def healed_s(unit: Unit) -> float:
            return self.seconds.healed_s(spec, unit.work, found_states=0.0 if unit is first else found)

        first_s, open_s = (self.seconds.healed_s(spec, None, found_states=share) for share in (0.0, found))
        expected_s = sum(map(healed_s, listing.todo)) + listing.n_open * open_s
        if first is None and listing.n_open:
            expected_s += first_s - open_s
        each_mib = self.room.weights_mib + self.room.snapshots_mib(spec)
        return StageEstimate(
            "heal",
            listing.n_expected,
            listing.n_recorded,
            (self._ratio(listing, healed_s) or 1.0) * expected_s,
            n_left * spec.steps * spec.tokens_per_step,
            self.healers.gpus * self.healers.n_workers,
            self.room.healing_mib(spec),
            self.room.checkpoints_mib() + kept_mib + n_left * each_mib if n_left else 0.0,
            listing.n_open,
        )

    def _curve(self, listing: StageUnits) -> StageEstimate:
        return self._judging(listing, self._judged_alone_s, self.costs.evaluation.direct_s)

    def _measure(self, listing: StageUnits) -> StageEstimate:
        def measured_s(unit: Unit) -> float:
            is_scores = unit.work.kind == "scores"
            return (self._judged_alone_s(unit) if is_scores else self.seconds.branches_s()) + self.costs.load_s

        open_s = self.costs.evaluation.direct_s + self.costs.load_s
        return self._judging(listing, measured_s, open_s, copies=2)

    def _judged_alone_s(self, unit: Unit) -> float:
        """Returns the seconds of judging one model: a plan on the parent's weights, or a model with its own weights."""
        if unit.work.checkpoint is None and unit.work.trained is None:
            plan = unit.work.plan or Plan.uniform(Treatment.SOFTMAX, self.inputs.n_layers)
            return self.seconds.judged_s(plan, self.inputs.full_spec)
        return self.costs.evaluation.direct_s

    def _timing(self, listing: StageUnits) -> StageEstimate:
        """Estimates timings, which run one after the other on an exclusive worker."""
        recipe = self.inputs.recipe.throughput
        conditions = [(concurrency, recipe.prompt_tokens) for concurrency in recipe.concurrency]
        if listing.stage == LENGTHS:
            assert recipe.lengths is not None
            conditions = [(recipe.lengths.concurrency, tokens) for tokens in recipe.lengths.prompt_tokens]
        seconds = self.seconds
        healed = [self._timed(tokens, concurrency, is_healed=True) for concurrency, tokens in conditions]
        open_s = sum(map(seconds.timed_s, healed)) / len(conditions)
        n_left = len(listing.todo) + listing.n_open
        models = {(unit.work.plan, unit.work.checkpoint) for unit in listing.todo}
        expected_s = sum(seconds.timed_s(unit.work) for unit in listing.todo) + listing.n_open * open_s
        ratio = self._ratio(listing, lambda unit: seconds.timed_s(unit.work))
        if ratio is None and listing.stage == THROUGHPUT and SPEED in self.listed:  # timed under the same conditions
            ratio = self._ratio(self.listed[SPEED], lambda unit: seconds.timed_s(unit.work))
        if n_left and ENGINES[recipe.engine].serves:
            # Each model has a server, and the parent has one more, because the speed of the machine drifts.
            expected_s += (len(models) + listing.n_open / len(conditions) + 1) * seconds.server_s()
            base = [self._timed(tokens, concurrency) for concurrency, tokens in conditions]
            expected_s += sum(map(seconds.timed_s, base))
        started_s = WORKER_START_S * self.costs.slowness + self.costs.load_s if n_left else 0.0
        return StageEstimate(
            listing.stage,
            listing.n_expected,
            listing.n_recorded,
            (ratio or 1.0) * expected_s + started_s,
            gpus=self.gpus_to_measure,
            memory_mib=self.room.timing_mib(conditions),
            n_open=listing.n_open,
        )

    # Parts

    def _judging(
        self,
        listing: StageUnits,
        unit_s: Callable[[Unit], float],
        open_s: float = 0.0,
        *,
        has_tasks: bool | None = None,
        start_s: float = 0.0,
        copies: int = 1,
    ) -> StageEstimate:
        """Estimates a stage of actors: each loads the model and prepares the tasks, then all share the units.

        Args:
            listing: Units of the stage.
            unit_s: Returns the worker seconds of a unit that is named.
            open_s: Worker seconds of an open unit.
            has_tasks: Whether tasks are asked; None follows the recipe's quality.
            start_s: Seconds to start the stage, without its workers, on the reference machine.
            copies: Number of copies of the weights that a worker holds.
        """
        n_left = len(listing.todo) + listing.n_open
        expected_s = sum(map(unit_s, listing.todo)) + listing.n_open * open_s
        ratio = self._ratio(listing, unit_s)
        return StageEstimate(
            listing.stage,
            listing.n_expected,
            listing.n_recorded,
            self._workers_s(n_left, expected_s, ratio, has_tasks=has_tasks, start_s=start_s),
            gpus=self.workers.gpus * min(self.workers.n_workers, max(1, n_left)),
            memory_mib=self.room.judging_mib(copies),
            n_open=listing.n_open,
        )

    def _workers_s(
        self,
        n_units: int,
        total_s: float,
        ratio: float | None = None,
        *,
        has_tasks: bool | None = None,
        start_s: float = 0.0,
    ) -> float:
        """Returns the seconds in which the judging workers start and share some units.

        Args:
            n_units: Number of units.
            total_s: Worker seconds of all units, if only one ran at a time.
            ratio: Actual over expected seconds of recorded units; None if none is recorded.
            has_tasks, start_s: As in `_judging`.
        """
        if not n_units:
            return 0.0
        n_workers, costs = min(self.workers.n_workers, n_units), self.costs
        beside = BESIDE_OTHERS if n_workers > 1 and not self.workers.gpus else 1.0
        if has_tasks is None:
            has_tasks = bool(self.inputs.full_spec.tasks)
        started_s = (start_s + WORKER_START_S + (HARNESS_IMPORT_S if has_tasks else 0.0)) * costs.slowness
        loaded_s = (costs.load_s + (costs.evaluation.prepare_s if has_tasks else 0.0)) * beside
        each_s = (beside if ratio is None else ratio) * total_s / n_units
        # On average one worker has half a unit more than its share, and the others wait for it.
        shared_s = each_s * (n_units / n_workers + (0.5 if n_units > n_workers > 1 else 0.0))
        return started_s + loaded_s + max(each_s, shared_s)

    def _ratio(self, listing: StageUnits, unit_s: Callable[[Unit], float]) -> float | None:
        """Returns actual over expected seconds of a stage's recorded units; None if there are none to compare."""
        taken = [(listing.seconds[unit.key], unit_s(unit)) for unit in listing.recorded if listing.seconds[unit.key]]
        expected_s = sum(expected for _, expected in taken)
        return sum(took for took, _ in taken) / expected_s if expected_s else None

    def _timed(self, prompt_tokens: int, concurrency: int, *, is_healed: bool = False) -> ThroughputUnit:
        """Returns the timing of the untouched parent under a condition, or of a healed model that is not known yet."""
        recipe = self.inputs.recipe.throughput
        checkpoint = "healed" if is_healed else None
        return ThroughputUnit(concurrency, prompt_tokens, recipe.new_tokens, checkpoint=checkpoint)


def device_mib() -> float:
    """Returns the memory of this machine's first GPU in MiB, or of the machine if it has no GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / MIB
    return psutil.virtual_memory().total / MIB
