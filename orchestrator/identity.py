"""What changes the result of a unit of work, and nothing else: the content that record keys are hashed from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerboost.data import text_identity
from layerboost.decoding import predicted_speedup
from layerboost.distillation import HealingSpec
from layerboost.evaluation import QualitySpec, spec_fingerprint
from layerboost.plan import Plan, Treatment
from layerboost.version import __version__
from orchestrator.model_check import ModelFacts
from orchestrator.recipe import TEXT_SCORES, Recipe, resolve_sequence_tokens
from tasks.ablation import EvaluationUnit, ModelSource, SpeedCondition
from tasks.measurement import ThroughputUnit
from tasks.search import SearchSpec

_WHOLE_FILE_BYTES = 1 << 30
_SAMPLE_BYTES, _N_SAMPLES = 1 << 20, 64


@dataclass(frozen=True)
class RunInputs:
    """A recipe and its model, as every stage needs them."""

    recipe: Recipe
    facts: ModelFacts

    @property
    def n_layers(self) -> int:
        return self.facts.n_layers

    @cached_property
    def model(self) -> dict[str, Any]:
        """Identity of the parent: its content for a folder, its commit for a hub name."""
        content = model_fingerprint(Path(self.facts.path)) if Path(self.facts.path).is_dir() else None
        hub = None if content else {"name": self.facts.path, "commit": self.facts.commit or self.recipe.model.revision}
        return {"content": content, "hub": hub, "dtype": self.recipe.model.dtype, "layerboost": __version__}

    @cached_property
    def source(self) -> ModelSource:
        model = self.recipe.model
        revision = self.facts.commit or model.revision
        return ModelSource(shipped(self.facts.path), revision, model.dtype, model.device, model.trust_remote_code)

    @cached_property
    def full_spec(self) -> QualitySpec:
        """Everything that finalists are judged by."""
        spec = self.recipe.quality.spec(self.facts.context_tokens)
        text = None if spec.text is None else shipped(spec.text)
        return replace(spec, tasks=tuple(shipped(task) for task in spec.tasks), text=text)

    @property
    def search_quality_spec(self) -> QualitySpec:
        """What the search judges by: the tasks, or the text where there are none."""
        return replace(self.full_spec, text=None) if self.full_spec.tasks else self.full_spec

    @property
    def ablation_spec(self) -> QualitySpec:
        """What single layers are judged by: only what the score needs."""
        if self.recipe.sensitivity.score in TEXT_SCORES:
            return replace(self.full_spec, tasks=())
        return replace(self.full_spec, text=None)

    @cached_property
    def search_spec(self) -> SearchSpec:
        search = self.recipe.search
        return SearchSpec(
            trials=search.trials,
            middle=Treatment(search.middle),
            window=search.window,
            seed=search.seed,
            sampler=search.sampler,
            remove_below=search.remove_below,
            keep_above=search.keep_above,
            plans=tuple(Plan.parse(plan, search.window) for plan in search.plans),
        )

    @property
    def condition(self) -> SpeedCondition:
        """The serving condition that the search predicts speed for: the highest concurrency, the longest context."""
        throughput = self.recipe.throughput
        return SpeedCondition(max(throughput.concurrency), throughput.prompt_tokens + throughput.new_tokens)

    def predicted_speedup(self, plan: Plan) -> float:
        """Decode bytes of the base over those of the plan, under `condition`."""
        named = self.recipe.model.dtype
        dtype = (self.facts.config.dtype or torch.float32) if named == "auto" else getattr(torch, named)
        return predicted_speedup(
            self.facts.config,
            plan,
            concurrency=self.condition.concurrency,
            context_tokens=self.condition.context_tokens,
            dtype_bytes=dtype.itemsize,
        )

    @cached_property
    def healing_spec(self) -> HealingSpec:
        healing = self.recipe.healing
        return HealingSpec(
            tokens=healing.tokens,
            sequence_tokens=resolve_sequence_tokens(healing.sequence_tokens, self.facts.context_tokens),
            batch_sequences=healing.batch_sequences,
            method=healing.method,
            rank=healing.rank,
            alpha=healing.alpha,
            learning_rate=healing.learning_rate,
            transfer_fraction=healing.transfer_fraction,
            temperature=healing.temperature,
            activation_checkpointing=healing.activation_checkpointing,
            seed=healing.seed,
        )

    # Identities of units

    def scores(self, unit: EvaluationUnit, spec: QualitySpec, healed_key: str | None = None) -> dict[str, Any]:
        """Of an evaluation; `healed_key` is the key of the healing that made the checkpoint."""
        return {
            "unit": unit.kind,
            "model": self.model,
            "plan": _plan_identity(unit.plan),
            "healed": healed_key,
            "quality": self._fingerprint(spec),
        }

    def search(self, drops: list[float]) -> dict[str, Any]:
        spec = self.search_spec
        return {
            "unit": "search",
            "model": self.model,
            "quality": self._fingerprint(self.search_quality_spec),
            "drops": drops,
            "spec": {
                **{name: getattr(spec, name) for name in ("trials", "window", "seed", "sampler", "lag")},
                "middle": spec.middle.value,
                "remove_below": spec.remove_below and list(spec.remove_below),
                "keep_above": spec.keep_above and list(spec.keep_above),
                "plans": [str(plan) for plan in spec.plans],
            },
            "condition": vars(self.condition),
        }

    def healing(self, plan: Plan) -> dict[str, Any]:
        healing = self.recipe.healing
        assert healing.text is not None
        return {
            "unit": "heal",
            "model": self.model,
            "plan": _plan_identity(plan),
            "spec": self.healing_spec.to_dict(),
            "text": text_identity(healing.text, split=healing.split, field=healing.field),
            "zero_stage": healing.zero_stage,
        }

    def throughput(self, unit: ThroughputUnit, hardware: str, healed_key: str | None) -> dict[str, Any]:
        return {
            "unit": "throughput",
            "engine": self.recipe.throughput.engine,
            "hardware": hardware,
            "model": self.model,
            "plan": _plan_identity(unit.plan),
            "healed": healed_key,
            "concurrency": unit.concurrency,
            "prompt_tokens": unit.prompt_tokens,
            "new_tokens": unit.new_tokens,
            "repeats": unit.repeats,
        }

    def _fingerprint(self, spec: QualitySpec) -> str:
        cache = self.__dict__.setdefault("_fingerprints", {})
        if spec not in cache:
            cache[spec] = spec_fingerprint(spec)
        return cache[spec]


def _plan_identity(plan: Plan | None) -> dict[str, Any] | None:
    return None if plan is None else plan.to_dict()


def shipped(path: str) -> str:
    """A local path as the workers of a Ray job see it: relative, where it lies in the job's working directory.

    Every node unpacks the working directory at a place of its own. Elsewhere the path is what it was.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job and Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return f"./{Path(path).relative_to(Path.cwd())}"
    return path


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's content: configuration, tokenizer, weights.

    Files above 1 GiB count by their size, their first MiB (names, types and shapes of all tensors) and 64 samples.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in {".json", ".safetensors", ".py", ".jinja", ".model", ".txt"}:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for sample in range(_N_SAMPLES):
                file.seek(sample * (size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
