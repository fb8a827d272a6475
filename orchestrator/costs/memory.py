"""Estimates the memory of workers and the disk space that the stages of a run need."""

from __future__ import annotations

from layerboost.costs.costs import Costs
from layerboost.healing.spec import HealingSpec, mark_steps
from layerboost.speed.byte_model import decode_bytes
from layerboost.sweep.layer_sweep import DEFAULT_BUDGET_BYTES
from orchestrator.run.inputs import RunInputs
from tasks.healing.job import TeacherCache

_ACTIVATION_VALUES = 34
"""Values that a layer keeps for the backward pass, per token and hidden dimension (Korthikanti et al. 2022)."""

MIB = 2**20


class Room:
    """Computes the memory and disk space that the stages of a run occupy, in MiB.

    Args:
        inputs: Inputs of the run.
        costs: Measured costs of its model.
        n_healers: Number of workers that heal one plan together.
    """

    def __init__(self, inputs: RunInputs, costs: Costs, n_healers: int):
        self._inputs, self._costs, self._n_healers = inputs, costs, n_healers
        self.weights_mib = costs.n_parameters * costs.dtype_bytes / MIB

    def judging_mib(self, copies: int = 1) -> float:
        """Returns the memory of a judging worker: `copies` of the weights, and the activations of a pass."""
        activations = self._inputs.recipe.placement.activations_gib
        budget_bytes = activations * 2**30 if isinstance(activations, float) else DEFAULT_BUDGET_BYTES
        return copies * self.weights_mib + budget_bytes / MIB

    def timing_mib(self, conditions: list[tuple[int, int]]) -> float:
        """Returns the memory of a timing worker under the largest of some pairs of concurrency and prompt tokens."""
        held = (
            decode_bytes(
                self._inputs.facts.config,
                None,
                concurrency=concurrency,
                context_tokens=tokens + self._inputs.recipe.throughput.new_tokens,
                dtype_bytes=self._costs.dtype_bytes,
            )
            for concurrency, tokens in conditions
        )
        return max(held) / MIB

    def healing_mib(self, spec: HealingSpec) -> float:
        """Returns the memory of a healing worker.

        It holds the weights, the gradients and optimizer state of trained parameters (partitioned by the ZeRO stage),
        and the activations of one pass.
        """
        costs, healing, n_workers = self._costs, self._inputs.recipe.healing, self._n_healers
        n_trained = 0 if costs.healing is None else costs.healing.n_trained
        stage = max(1, healing.zero_stage)
        weights = costs.n_parameters * costs.dtype_bytes / (n_workers if stage == 3 else 1)
        trained = n_trained * costs.dtype_bytes / (n_workers if stage == 3 else 1)
        gradients = n_trained * costs.dtype_bytes / (n_workers if stage >= 2 else 1)
        masters = 0 if costs.dtype_bytes == 4 else 4
        optimizer = 0.0 if healing.offload_optimizer else n_trained * (8 + masters) / n_workers
        config = self._inputs.facts.config.get_text_config()
        batch = min(spec.micro_batch_sequences or spec.batch_sequences, -(-spec.batch_sequences // n_workers))
        values = batch * spec.sequence_tokens * config.hidden_size
        kept = self._inputs.n_layers + _ACTIVATION_VALUES
        if not spec.activation_checkpointing:
            kept = self._inputs.n_layers * _ACTIVATION_VALUES
        return (weights + trained + gradients + optimizer + values * kept * costs.dtype_bytes) / MIB

    def trained_mib(self) -> float:
        """Returns the size of a snapshot of the trained parameters."""
        costs = self._costs
        return 0.0 if costs.healing is None else costs.healing.n_trained * costs.dtype_bytes / MIB

    def teacher_states_mib(self, spec: HealingSpec, cache: TeacherCache | None) -> tuple[float, float]:
        """Returns the size of the teacher's hidden states that healings on the same text share, and of all of them."""
        taught_by = self._inputs.facts.teacher or self._inputs.facts
        width = taught_by.config.get_text_config().hidden_size
        n_tokens = spec.steps * spec.tokens_per_step
        needed_mib = n_tokens * width * self._costs.dtype_bytes / MIB
        return (0.0 if cache is None else min(cache.max_gib * 1024, needed_mib)), needed_mib

    def snapshots_mib(self, spec: HealingSpec) -> float:
        return len(mark_steps(spec, self._inputs.recipe.healing.curve)) * self.trained_mib()

    def checkpoints_mib(self) -> float:
        """Returns the size of three checkpoints, because two are kept while a third one is written.

        Each holds the master weights and two moments of the trained parameters in fp32.
        """
        costs = self._costs.healing
        return 0.0 if costs is None else 3 * 12 * costs.n_trained / MIB
