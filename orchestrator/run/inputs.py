"""Holds everything that changes the results of a run, and derives from it the identity of each unit of work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerboost.affine import MapsSpec
from layerboost.checkpoint import ModelSource
from layerboost.evaluation.evaluate import spec_fingerprint
from layerboost.evaluation.scores import SCORES, QualitySpec
from layerboost.evaluation.shares import Share
from layerboost.healing.divergences import DIVERGENCES
from layerboost.healing.spec import HealingSpec
from layerboost.plan import TREATMENTS, Plan, Treatment
from layerboost.registry import Registry, used_plugins
from layerboost.search.loop import SearchSpec
from layerboost.search.methods import METHODS
from layerboost.search.plan_space import Limit, PlanSpace
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.byte_model import kv_bytes_of_layers, predicted_speedup
from layerboost.text.sampling import SamplingSpec
from layerboost.text.sources import TextSource, sources_identity
from layerboost.version import __version__
from orchestrator.recipe.fields import resolve_sequence_tokens
from orchestrator.recipe.healing import SAMPLED, HealingText
from orchestrator.recipe.recipe import Recipe
from orchestrator.recipe.sections import LEAST_DOCUMENTS, LEAST_SEQUENCES
from orchestrator.run.content import model_content, shipped
from orchestrator.run.identity import LINEAR_WINDOW_ONLY, MEMORY_ONLY, plan_identity, plugin_identity
from orchestrator.run.model_facts import ModelFacts
from tasks.engines import ENGINES
from tasks.evaluation import EvaluationUnit, plan_unit
from tasks.sampling import SampleUnit
from tasks.timing import ThroughputUnit

TASKS_SOURCE, TEXT_SOURCE = "tasks", "text"


@dataclass(frozen=True)
class SpeedCondition:
    """Describes the serving condition for which a plan's speed is predicted."""

    concurrency: int
    context_tokens: int


@dataclass(frozen=True)
class SweepSource:
    """Names items on which single layers are judged: the quality's `tasks`, its `text`, or another text's file."""

    name: str
    spec: QualitySpec

    @property
    def context_tokens(self) -> int | None:
        """The tokens of a sequence; None for tasks, whose items differ in length."""
        return None if self.spec.tasks else self.spec.sequence_tokens


@dataclass(frozen=True)
class RunInputs:
    """Combines a recipe and its model, for use by every stage."""

    recipe: Recipe
    facts: ModelFacts

    @property
    def n_layers(self) -> int:
        return self.facts.n_layers

    @cached_property
    def model(self) -> dict[str, Any]:
        """The identity of the parent: its content for a folder, its commit for a hub name."""
        content = model_content(self.facts, self.recipe.model.revision)
        return {**content, "dtype": self.recipe.model.dtype, "layerboost": __version__}

    @cached_property
    def source(self) -> ModelSource:
        model = self.recipe.model
        revision = self.facts.commit or model.revision
        return ModelSource(shipped(self.facts.path), revision, model.dtype, model.device, model.trust_remote_code)

    @cached_property
    def full_spec(self) -> QualitySpec:
        """The quality by which finalists are judged, with everything in it."""
        spec = self.recipe.quality.spec(self.facts.context_tokens)
        text = None if spec.text is None else shipped(spec.text)
        return replace(spec, tasks=tuple(shipped(task) for task in spec.tasks), text=text)

    @cached_property
    def _searched_spec(self) -> QualitySpec:
        """The quality by which many plans are judged, without the parts that only finalists get."""
        n_tasks = len(self.recipe.quality.tasks)
        return replace(self.full_spec, tasks=self.full_spec.tasks[:n_tasks], retrieval=())

    @cached_property
    def text_spec(self) -> QualitySpec:
        """The quality with its text only."""
        return replace(self.full_spec, tasks=(), retrieval=())

    @property
    def search_quality_spec(self) -> QualitySpec:
        """The quality by which the search judges: the text if its objective is measured on it, else the tasks.

        The text is also read if there are no tasks, and with `sensitivity.compare` the tasks are asked beside the text.
        Where finalists are judged by more than the text, and the likelihood alone is the objective, nothing else is
        measured, because their scores are other records anyway.
        """
        spec, recipe = self._searched_spec, self.recipe
        by_text = recipe.search.objective == "score" and SCORES[recipe.sensitivity.score].source == "text"
        if not by_text:
            return replace(spec, text=None) if spec.tasks else spec
        if recipe.sensitivity.compare:
            return spec
        by_likelihood = recipe.sensitivity.score == "nll" and self.full_spec != self.text_spec
        return replace(spec, tasks=(), likelihood_only=by_likelihood)

    @cached_property
    def first_quality_spec(self) -> QualitySpec:
        """The quality by which the search judges each plan that it proposes: with a race, the first items alone."""
        spec, race = self.search_quality_spec, self.recipe.search.race
        if race is None:
            return spec

        def first(n: int | None, least: int) -> int | None:
            return None if n is None else min(n, max(least, math.ceil(race.first * n)))

        if spec.text is not None:
            spec = replace(spec, n_sequences=first(spec.n_sequences, LEAST_SEQUENCES))
        return replace(spec, limit=first(spec.limit, LEAST_DOCUMENTS)) if spec.tasks else spec

    @property
    def first_share(self) -> float:
        """The share of all items that the first ones are, by number."""
        first, spec = self.first_quality_spec, self.search_quality_spec
        counts = [(first.n_sequences, spec.n_sequences)] if spec.text is not None else []
        counts += [(first.limit, spec.limit)] * len(spec.tasks)
        shares = [1.0 if not n or not of_all else n / of_all for n, of_all in counts]
        return sum(shares) / len(shares)

    @property
    def n_healed(self) -> int:
        """The largest number of the search's plans that are healed, or tried by halving."""
        healing = self.recipe.healing
        return max(healing.candidates, 0 if healing.halving is None else healing.halving.plans)

    @property
    def n_leaders(self) -> int:
        """The number of the search's plans that a race judges on all items."""
        race = self.recipe.search.race
        return 0 if race is None else max(self.n_healed, race.leaders * self.recipe.healing.candidates)

    @property
    def races(self) -> bool:
        """Whether plans race: with few items, and benchmarks without a limit, the first ones are all of them."""
        return self.first_quality_spec != self.search_quality_spec

    @cached_property
    def sweep_sources(self) -> tuple[SweepSource, ...]:
        """The sources on which single layers are judged, each with either tasks or a text.

        The source of the chosen score comes first.
        """
        sensitivity, spec = self.recipe.sensitivity, self._searched_spec
        by_text = SCORES[sensitivity.score].source == "text"
        sources = []
        if spec.text is not None and (by_text or sensitivity.compare):
            sources.append(SweepSource(TEXT_SOURCE, self.text_spec))
        if spec.tasks and (not by_text or sensitivity.compare):
            sources.append(SweepSource(TASKS_SOURCE, replace(spec, text=None)))
        sources.sort(key=lambda source: (source.name == TEXT_SOURCE) != by_text)
        for tokens in sensitivity.context_tokens:
            if tokens != spec.sequence_tokens:
                # The total number of tokens stays the same, so that only the length differs.
                n_sequences = None if spec.n_sequences is None else spec.n_sequences * spec.sequence_tokens // tokens
                of_length = replace(self.text_spec, sequence_tokens=tokens, n_sequences=max(1, n_sequences or 1))
                sources.append(SweepSource(TEXT_SOURCE, of_length))
        sources += [
            SweepSource(Path(text).name, replace(self.text_spec, text=shipped(text))) for text in sensitivity.texts
        ]
        return tuple(sources)

    @cached_property
    def sweep_plans(self) -> dict[str, tuple[Plan, ...]]:
        """The plans of the sweep by treatment, first layer first; the untouched model under `softmax`."""
        n_layers, search = self.n_layers, self.recipe.search
        return {Treatment.SOFTMAX.value: (Plan.uniform(Treatment.SOFTMAX, n_layers),)} | {
            treatment: tuple(
                single_layer_plan(n_layers, layer, Treatment(treatment), search.window, search.sinks)
                for layer in range(n_layers)
            )
            for treatment in self.recipe.sensitivity.treatments
        }

    @cached_property
    def search_spec(self) -> SearchSpec:
        search = self.recipe.search
        return SearchSpec(
            self.plan_space,
            method=search.method,
            trials=search.trials,
            middle=Treatment(search.middle),
            seed=search.seed,
            sampler=search.sampler,
            remove_below=search.remove_below,
            keep_above=search.keep_above,
            plans=tuple(Plan.parse(plan, search.window, search.sinks) for plan in search.plans),
            removed=Treatment(search.removed),
        )

    @cached_property
    def plan_space(self) -> PlanSpace:
        """The plans that a search over whole plans may propose, given the measured treatments, pins and limits."""
        constraints, n_layers = self.recipe.constraints, self.n_layers
        treatments = tuple(Treatment(treatment) for treatment in self.recipe.sensitivity.treatments)
        kv_bytes = kv_bytes_of_layers(self.facts.config, self._dtype_bytes)
        limits = []
        for name, bound in constraints.at_most.items():
            counted = {t: tuple(float(name == f"n_{t.value}") for _ in range(n_layers)) for t in Treatment}
            if name == "kv_bytes_per_token":
                limits.append(Limit(name, kv_bytes, bound))
            elif any(any(of_layers) for of_layers in counted.values()):
                limits.append(Limit(name, counted, bound))
        return PlanSpace(
            n_layers,
            (Treatment.SOFTMAX, *treatments),
            self.recipe.search.window,
            {layer: Treatment(treatment) for layer, treatment in constraints.pin.items()},
            tuple(limits),
            self.recipe.search.sinks,
        )

    @property
    def condition(self) -> SpeedCondition:
        """The serving condition for which the search predicts speed: the highest concurrency, the longest context."""
        throughput = self.recipe.throughput
        return SpeedCondition(max(throughput.concurrency), throughput.prompt_tokens + throughput.new_tokens)

    def predicted_speedup(self, plan: Plan) -> float:
        """Returns the decode bytes of the base divided by those of the plan, under `condition`."""
        return predicted_speedup(
            self.facts.config,
            plan,
            concurrency=self.condition.concurrency,
            context_tokens=self.condition.context_tokens,
            dtype_bytes=self._dtype_bytes,
            # Nobody knows ahead which ranks `auto` will choose, so whole matrices are counted, which are the largest.
            affine_rank=rank if isinstance(rank := self.recipe.search.affine.rank, int) else None,
        )

    @property
    def _dtype_bytes(self) -> int:
        named = self.recipe.model.dtype
        dtype = (self.facts.config.dtype or torch.float32) if named == "auto" else getattr(torch, named)
        return dtype.itemsize

    @cached_property
    def healing_spec(self) -> HealingSpec:
        return self.recipe.healing.spec(self.facts.context_tokens)

    def healing_spec_at(self, share: float) -> HealingSpec:
        """Returns the spec of a separate healing on a share of the budget, with at least one step."""
        spec = self.healing_spec
        return replace(spec, tokens=max(spec.tokens_per_step, round(share * spec.tokens)))

    @cached_property
    def healing_texts(self) -> tuple[HealingText, ...]:
        """The texts to heal on, with paths as the workers see them."""
        texts = [text for _, text in self.recipe.healing.named_sources()]
        return tuple(
            text if text.path is None else text.model_copy(update={"path": shipped(text.path)}) for text in texts
        )

    @cached_property
    def sampling(self) -> SamplingSpec | None:
        """The settings for sampling text from the parent; None if the recipe asks for no sampled text."""
        sampled = next((text for text in self.healing_texts if text.format == SAMPLED), None)
        if sampled is None:
            return None
        return SamplingSpec(
            max_tokens=self.healing_spec.sequence_tokens,
            seed=self.healing_spec.seed,
            temperature=sampled.temperature or 1.0,
            batch_size=self.recipe.quality.batch_size,
        )

    @property
    def sampled_tokens(self) -> int:
        """The number of tokens that fill the sampled text's share of the budget, whatever the documents' lengths.

        The mixture is at most one document ahead of a source's share, so one extra document suffices to never read the
        text twice.
        """
        spec = self.healing_spec
        held_out = 0 if spec.stop_when_flat is None else spec.held_out_sequences
        n_tokens = (spec.steps * spec.batch_sequences + held_out) * spec.sequence_tokens
        weights = {text.format == SAMPLED: 0.0 for text in self.healing_texts}
        for text in self.healing_texts:
            weights[text.format == SAMPLED] += text.weight or 1.0
        return math.ceil(n_tokens * weights[True] / sum(weights.values())) + spec.sequence_tokens

    @cached_property
    def maps_spec(self) -> MapsSpec | None:
        """How the maps of affine layers are fitted, as the recipe says; None if it names no such layers."""
        affine = self.recipe.search.affine
        if Treatment.AFFINE not in self.treatments:
            return None
        if affine.text is not None:
            source = TextSource(shipped(affine.text))
        else:
            source = replace(next(t for t in self.healing_texts if t.format != SAMPLED).source(), weight=1.0)
        sequence_tokens = resolve_sequence_tokens(None, self.facts.context_tokens)
        return MapsSpec(source, affine.tokens, sequence_tokens, affine.rank)

    # Identities of units

    @cached_property
    def _maps(self) -> dict[str, Any] | None:
        """The identity of what the maps of affine layers are fitted on."""
        spec = self.maps_spec
        if spec is None:
            return None
        return {
            "text": sources_identity([spec.source])[0],
            **{name: getattr(spec, name) for name in ("tokens", "sequence_tokens", "rank")},
        }

    def maps(self) -> dict[str, Any]:
        """Returns the identity of the maps of all layers, each fitted on its own."""
        return {"unit": "maps", "model": self.model, "maps": self._maps}

    def _plan(self, plan: Plan | None) -> dict[str, Any] | None:
        return plan_identity(plan, self._maps)

    def scores(self, unit: EvaluationUnit, spec: QualitySpec, healed_key: str | None = None) -> dict[str, Any]:
        """Returns the identity of an evaluation; `healed_key` is the key of the healing that made the checkpoint."""
        if unit.kind == "maps":
            return self.maps()
        return {
            "unit": unit.kind,
            "model": self.model,
            "plan": self._plan(unit.plan),
            "healed": healed_key,
            "quality": self._fingerprint(spec),
        }

    def plan_scores(self, plan: Plan, spec: QualitySpec, sample: Sequence[Share] | None = None) -> dict[str, Any]:
        """Returns the identity of a plan's evaluation; softmax in every layer means the untouched model.

        Args:
            plan, spec: The plan, and the quality by which it is judged.
            sample: Consecutive shares of the items that it is judged on; None means all items.
        """
        identity = self.scores(plan_unit(plan), spec)
        if sample is None:
            return identity
        return {**identity, "sample": [sample[0].start, sample[-1].stop, sample[0].seed]}

    def count(self, spec: QualitySpec) -> dict[str, Any]:
        return {"unit": "count", "model": self.model, "quality": self._fingerprint(spec)}

    def sweep(self, spec: QualitySpec, share: Share, plans: Sequence[Plan]) -> dict[str, Any]:
        """Returns the identity of some plans' answers for one share of the items."""
        return {
            "unit": "sweep",
            "model": self.model,
            "quality": self._fingerprint(spec),
            "share": [share.start, share.stop, share.seed],
            "plans": [self._plan(plan) for plan in plans],
        }

    def search(
        self, costs: Mapping[Treatment, Sequence[float]], speed_models: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Returns the identity of a search's trials, which depend on the layers' costs and the fitted speed models."""
        spec, space, recipe = self.search_spec, self.plan_space, self.recipe
        return {
            "unit": "search",
            "model": self.model,
            "quality": self._fingerprint(self.first_quality_spec),
            "objective": recipe.sensitivity.score if recipe.search.objective == "score" else "quality",
            "costs": {treatment.value: list(of_layers) for treatment, of_layers in costs.items()},
            "speed": {"models": list(speed_models), "condition": vars(self.condition)},
            "space": {
                "treatments": [treatment.value for treatment in space.treatments],
                "window": space.window,
                "pinned": {str(layer): treatment.value for layer, treatment in sorted(space.pinned.items())},
                "limits": {limit.name: limit.at_most for limit in space.limits},
                **({"sinks": space.sinks} if space.sinks else {}),
            },
            "spec": {
                **{name: getattr(spec, name) for name in ("method", "trials", "seed", "sampler", "lag")},
                "middle": spec.middle.value,
                "remove_below": spec.remove_below and list(spec.remove_below),
                "keep_above": spec.keep_above and list(spec.keep_above),
                "plans": [str(plan) for plan in spec.plans],
                **({} if spec.removed is Treatment.NONE else {"removed": spec.removed.value}),
            },
            **plugin_identity(self._plugins_of_search),
        }

    @cached_property
    def treatments(self) -> tuple[Treatment, ...]:
        """All treatments that the recipe names, and softmax and none, which every search uses."""
        recipe = self.recipe
        planned = (treatment for plan in self.search_spec.plans for treatment in plan.treatments)
        named = (
            *recipe.sensitivity.treatments,
            recipe.search.middle,
            recipe.search.removed,
            *recipe.constraints.pin.values(),
            *planned,
        )
        wanted = {Treatment.SOFTMAX, Treatment.NONE, *map(Treatment, named)}
        return tuple(treatment for treatment in Treatment if treatment in wanted)

    @property
    def _plugins_of_search(self) -> dict[str, str]:
        used: list[tuple[Registry[Any], str]] = [(TREATMENTS, treatment.value) for treatment in self.treatments]
        used.append((METHODS, self.recipe.search.method))
        if self.recipe.search.objective == "score":
            used.append((SCORES, self.recipe.sensitivity.score))
        return used_plugins(used)

    @cached_property
    def _healing(self) -> dict[str, Any]:
        """The part of a healing's identity that all plans share; it is cached, so that the texts are read once."""
        healing, teacher = self.recipe.healing, self.facts.teacher
        return {
            "texts": [self._text(text) for text in self.healing_texts],
            "documents": healing.documents,
            "teacher": None if teacher is None else model_content(teacher, healing.teacher_revision),
        }

    def _text(self, text: HealingText) -> dict[str, Any]:
        if text.format == SAMPLED:
            return {"sampled": self._sampling(), "weight": text.weight}
        return sources_identity([text.source()])[0]

    def _sampling(self) -> dict[str, Any]:
        assert self.sampling is not None
        return {name: getattr(self.sampling, name) for name in ("max_tokens", "seed", "temperature")}

    @property
    def teacher(self) -> dict[str, Any]:
        """Returns the identity of what the teacher of all healings computes for a text."""
        return {"model": self.model, "teacher": self._healing["teacher"]}

    def healing(self, plan: Plan, spec: HealingSpec | None = None) -> dict[str, Any]:
        """Returns the identity of healing a plan by a spec; None means the recipe's spec.

        It does not contain the number of workers nor how much each of them holds in memory at once.
        """
        # Settings that concern only feature maps change nothing for a plan without feature maps.
        left_out = MEMORY_ONLY if plan.is_transferred else (*MEMORY_ONLY, *LINEAR_WINDOW_ONLY)
        settings = (spec or self.healing_spec).to_dict()
        return {
            "unit": "heal",
            "model": self.model,
            "plan": self._plan(plan),
            "spec": {name: value for name, value in settings.items() if name not in left_out},
            **self._healing,
            **plugin_identity(used_plugins([(DIVERGENCES, settings["divergence"])])),
        }

    def sampled_text(self) -> dict[str, Any]:
        """Returns the identity of all text that the parent may write with the recipe's settings."""
        return {"unit": "sampled text", "model": self.model, "sampling": self._sampling()}

    def sample(self, unit: SampleUnit) -> dict[str, Any]:
        return {**self.sampled_text(), "unit": "sample", "first": unit.first, "n_documents": unit.n_documents}

    def throughput(self, unit: ThroughputUnit, hardware: str, healed_key: str | None) -> dict[str, Any]:
        return {
            "unit": "throughput",
            "engine": self.recipe.throughput.engine,
            **({} if unit.environment is None else {"engine_versions": unit.environment.versions}),
            "hardware": hardware,
            "model": self.model,
            "plan": self._plan(unit.plan),
            "healed": healed_key,
            "concurrency": unit.concurrency,
            "prompt_tokens": unit.prompt_tokens,
            "new_tokens": unit.new_tokens,
            "repeats": unit.repeats,
            **plugin_identity(used_plugins([(ENGINES, self.recipe.throughput.engine)])),
        }

    def _fingerprint(self, spec: QualitySpec) -> str:
        cache = self.__dict__.setdefault("_fingerprints", {})
        if spec not in cache:
            cache[spec] = spec_fingerprint(spec)
        return cache[spec]
