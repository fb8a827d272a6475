"""Judges many variants of one model: each worker loads it once and shares its weights with every variant."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from layerboost.affine import MapsSpec, save_maps
from layerboost.checkpoint import ModelSource
from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate, text_sequences
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import QualitySpec, Scores, quality
from layerboost.healing.branches import branch_check
from layerboost.healing.spec import HealingSpec
from layerboost.healing.training import student_from
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.storage.publish import read_tensors
from layerboost.sweep.affine_fits import fit_maps, read_sequences
from layerboost.sweep.layer_sweep import DEFAULT_BUDGET_BYTES
from tasks.cluster.resources import WorkerResources
from tasks.pool.actors import actor_maker
from tasks.pool.finished import SHRUNK, Finished, WorkerInfo, worker_info
from tasks.pool.out_of_memory import in_memory
from tasks.pool.pool import UnitFailure, run_units
from tasks.pool.watch import UNWATCHED, Watch

_LEAST_BUDGET_BYTES = 1 << 20


@dataclass(frozen=True)
class EvaluationUnit:
    """Describes one thing to judge.

    Attributes:
        kind: `scores` judges a model; `cosine` gives the cosine distances of all layers, which need no variant;
            `branches` measures what the branches of a model's linear_window layers are worth on the quality's text;
            `maps` fits the map of each layer, for affine layers.
        plan: the plan that is applied to the parent before it is judged; None leaves the parent untouched.
        checkpoint: the folder of a healed model to judge instead of the parent; it has its own plan, so give none.
        trained: a file of the parameters that healing had trained so far; they are put into the parent converted by
            `plan`.
        healing: the spec by which `trained` was trained; it is needed with `trained`.
        maps: what maps are fitted on; it is needed for `maps`.
        output: the file or URL that the fitted maps are written to; it is needed for `maps`.
    """

    kind: Literal["scores", "cosine", "branches", "maps"] = "scores"
    plan: Plan | None = None
    checkpoint: str | None = None
    trained: str | None = None
    healing: HealingSpec | None = None
    maps: MapsSpec | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "maps" and (self.maps is None or self.output is None):
            raise ValueError("maps: without a spec and an output nothing can be fitted; give both")
        if (self.plan is not None or self.kind == "cosine") and self.checkpoint is not None:
            raise ValueError(f"checkpoint: {self.checkpoint} has its own plan; give either a plan or a checkpoint")
        if self.trained is not None and (self.plan is None or self.healing is None):
            raise ValueError(f"trained: {self.trained} says neither plan nor healing; give both")


def plan_unit(plan: Plan) -> EvaluationUnit:
    """Returns the unit that judges a plan on the parent's weights; softmax in every layer means the untouched model."""
    return EvaluationUnit(plan=None if plan.is_untouched else plan)


def base_unit() -> EvaluationUnit:
    """Returns the unit that judges the untouched parent."""
    return EvaluationUnit()


def cosine_unit() -> EvaluationUnit:
    """Returns the unit that measures the cosine distances of all layers of the parent on the quality's text."""
    return EvaluationUnit("cosine")


def maps_unit(spec: MapsSpec, output: str) -> EvaluationUnit:
    """Returns the unit that fits the map of each layer of the parent and writes them to a file."""
    return EvaluationUnit("maps", maps=spec, output=output)


class EvaluationWorker:
    """Holds the parent and judges variants of it. It is a plain class that Ray only wraps.

    Args:
        source: the source of the parent.
        spec: the spec by which variants are judged.
        threads: CPU threads for torch; None leaves them. It is set because a reused Ray worker keeps its old number.
        activations_gib: limit on the activations of a pass in GiB; None takes half of a GPU's free memory, or 1 GiB on
            a CPU.
    """

    def __init__(
        self,
        source: ModelSource,
        spec: QualitySpec,
        threads: int | None = None,
        activations_gib: float | None = None,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.source, self.spec = source, spec
        self.base = source.load()
        self.tokenizer = source.load_tokenizer()
        self.budget_bytes = self._budget_bytes(activations_gib)
        self._evaluations: dict[QualitySpec, PlanEvaluation] = {}
        self._n_halvings = 0

    def info(self) -> WorkerInfo:
        return worker_info()

    def shrink(self) -> bool:
        """Halves the memory used besides the weights; returns False if it is the least already."""
        if self.spec.batch_size >> self._n_halvings <= 1 and self.budget_bytes <= _LEAST_BUDGET_BYTES:
            return False
        self._n_halvings += 1
        self.budget_bytes //= 2
        self._evaluations.clear()
        return True

    def run(self, unit: EvaluationUnit) -> dict[str, Any]:
        """Runs one unit, with smaller batches if memory runs out; the result then holds the key SHRUNK."""
        return self._in_memory(lambda: self._judge(unit))

    def _in_memory(self, do_unit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        result = in_memory(do_unit, self.shrink)
        if self._n_halvings:
            held = {"batch_size": self._smaller(self.spec).batch_size, "activations_gib": self.budget_bytes / 2**30}
            result[SHRUNK] = held
        return result

    def _smaller(self, spec: QualitySpec) -> QualitySpec:
        """Returns a spec with the batch size that this worker has memory for."""
        return replace(spec, batch_size=max(1, spec.batch_size >> self._n_halvings))

    def _judge(self, unit: EvaluationUnit) -> dict[str, Any]:
        """Judges one unit.

        Returns:
            JSON values: `evaluation_s`, and `scores` (`Scores.to_dict()`), `cosine` (for each layer a list of
            distances, one for each sequence), `branches` (a list of `BranchLoss.to_dict()`) or `maps` (for each layer
            the rank, None for a full one, and the error of its map). If the quality has a text, the scores include the
            divergence from the parent.
        """
        start = time.perf_counter()
        result: dict[str, Any]
        if unit.kind == "cosine":
            sequences = text_sequences(self.tokenizer, self.spec)
            batch_size = self._smaller(self.spec).batch_size
            result = {"cosine": cosine_scores(self.base, sequences, batch_size=batch_size).tolist()}
        elif unit.kind == "branches":
            sequences = text_sequences(self.tokenizer, self.spec)
            checked = branch_check(self._variant(unit), sequences, self._smaller(self.spec).batch_size)
            result = {"branches": [branch.to_dict() for branch in checked]}
        elif unit.kind == "maps":
            assert unit.maps is not None and unit.output is not None
            sequences = read_sequences(unit.maps, self.tokenizer)
            maps = fit_maps(self.base, sequences, rank=unit.maps.rank, batch_size=self._smaller(self.spec).batch_size)
            save_maps(maps, unit.output)
            result = {"maps": [{"rank": fitted.rank, "error": fitted.error} for fitted in maps.values()]}
        else:
            result = {"scores": self._scores(unit).to_dict()}
        return {**result, "evaluation_s": time.perf_counter() - start}

    def _scores(self, unit: EvaluationUnit) -> Scores:
        if unit.checkpoint is None and unit.trained is None:
            return self.evaluation(self.spec).run([unit.plan or self.untouched])[0]
        return evaluate(self._variant(unit), self.tokenizer, self._smaller(self.spec), base=self.base)

    def _variant(self, unit: EvaluationUnit) -> PreTrainedModel:
        """Builds the model of a unit as a separate model."""
        if unit.checkpoint is not None:
            return self.source.load(unit.checkpoint)
        if unit.trained is not None:
            assert unit.plan is not None and unit.healing is not None
            trained, _ = read_tensors(unit.trained)
            return student_from(self.base, unit.plan, unit.healing, trained)
        return self.base if unit.plan is None else convert(self.base, unit.plan)

    @property
    def untouched(self) -> Plan:
        """Returns the plan of the untouched parent: softmax in every layer."""
        return Plan.uniform(Treatment.SOFTMAX, self.base.config.num_hidden_layers)

    def evaluation(self, spec: QualitySpec) -> PlanEvaluation:
        """Returns the evaluation of plans by a spec; the requests of its tasks are prepared only once."""
        if spec not in self._evaluations:
            smaller = self._smaller(spec)
            self._evaluations[spec] = PlanEvaluation(self.base, self.tokenizer, smaller, budget_bytes=self.budget_bytes)
        return self._evaluations[spec]

    def _budget_bytes(self, activations_gib: float | None) -> int:
        if activations_gib is not None:
            return int(activations_gib * 2**30)
        return torch.cuda.mem_get_info()[0] // 2 if self.base.device.type == "cuda" else DEFAULT_BUDGET_BYTES


def evaluate_units(
    units: Sequence[EvaluationUnit],
    source: ModelSource,
    spec: QualitySpec,
    resources: WorkerResources,
    *,
    on_result: Callable[[Finished[EvaluationUnit, dict[str, Any]]], None],
    on_failure: Callable[[UnitFailure[EvaluationUnit]], None] | None = None,
    max_attempts: int = 3,
    watch: Watch[EvaluationUnit] = UNWATCHED,
) -> list[UnitFailure[EvaluationUnit]]:
    """Judges all units on the cluster, one model for each worker; see `run_units` for the callbacks and failures."""
    make_actor = actor_maker(EvaluationWorker, resources, source, spec, resources.threads, resources.activations_gib)
    return run_units(
        units,
        make_actor,
        n_workers=resources.n_workers,
        on_result=on_result,
        on_failure=on_failure,
        max_attempts=max_attempts,
        watch=watch,
    )


class PlanEvaluator:
    """Computes the scores and the quality by which the search judges plans."""

    def __init__(
        self,
        source: ModelSource,
        spec: QualitySpec,
        threads: int | None = None,
        activations_gib: float | None = None,
    ):
        self._worker = EvaluationWorker(source, spec, threads, activations_gib)

    def __call__(self, plan: Plan) -> dict[str, Any]:
        """Returns `quality`, `quality_stderr`, `scores` and `evaluation_s`; an all-softmax plan is the base itself."""
        result = self._worker.run(plan_unit(plan))
        value, stderr = quality(Scores.from_dict(result["scores"]))
        return {"quality": value, "quality_stderr": stderr, **result}


def plan_evaluator_maker(
    source: ModelSource, spec: QualitySpec, resources: WorkerResources
) -> Callable[[], PlanEvaluator]:
    """Returns the function that `run_search` calls once in each trial process to load the model there."""
    return functools.partial(PlanEvaluator, source, spec, resources.threads, resources.activations_gib)
