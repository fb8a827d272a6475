"""Defines the recipe, which says what to run. It is read and checked once at the start and is frozen afterwards.

A recipe is a YAML file of eight sections. Everything in it changes results, except `placement`, which says where the
work runs, and the fields of `healing` that change only its memory; neither is part of an identity. Every mistake
becomes one `InputError` with field, value and remedy.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import model_validator

from layerboost.evaluation.scores import SCORES
from layerboost.plan import Plan
from orchestrator.recipe.constraints import ConstraintsSection
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import Section
from orchestrator.recipe.healing import HealingSection
from orchestrator.recipe.sections import (
    ModelSection,
    PlacementSection,
    QualitySection,
    SearchSection,
    SensitivitySection,
    ThroughputSection,
)


class Recipe(Section):
    """Describes a whole recipe, checked and frozen. `load_recipe` reads one from a file.

    Attributes:
        model: the pretrained model.
        quality: what the model is judged by.
        sensitivity: which single-layer changes are scored, and by what.
        search: how plans are searched.
        constraints: what the plan to serve must hold.
        healing: how the most promising plans are healed.
        throughput: the serving conditions that plans are timed under.
        placement: where the work runs.
    """

    model: ModelSection
    quality: QualitySection
    sensitivity: SensitivitySection = SensitivitySection()
    search: SearchSection = SearchSection()
    constraints: ConstraintsSection = ConstraintsSection()
    healing: HealingSection = HealingSection()
    throughput: ThroughputSection = ThroughputSection()
    placement: PlacementSection = PlacementSection()

    @model_validator(mode="before")
    @classmethod
    def _objective_from_score(cls, data: Any) -> Any:
        """Sets the default objective to the quality where plans have no score, which is so with cosine."""
        if not isinstance(data, dict):
            return data
        sensitivity, search = data.get("sensitivity") or {}, data.get("search") or {}
        score = sensitivity.get("score") if isinstance(sensitivity, dict) else None
        has_no_plans = isinstance(score, str) and score in SCORES and not SCORES[score].judges_plans
        if has_no_plans and isinstance(search, dict) and search.get("objective") is None:
            return {**data, "search": {**search, "objective": "quality"}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _score_from_quality(cls, data: Any) -> Any:
        """Sets the default score to margin where there is no text, because there is no likelihood to measure."""
        if not isinstance(data, dict):
            return data
        quality, sensitivity = data.get("quality"), data.get("sensitivity") or {}
        has_no_text = isinstance(quality, dict) and quality.get("text") is None
        if has_no_text and isinstance(sensitivity, dict) and sensitivity.get("score") is None:
            return {**data, "sensitivity": {**sensitivity, "score": "margin"}}
        return data

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        score = self.sensitivity.score
        described = SCORES[score]
        if described.source == "text" and self.quality.text is None:
            raise InputError("sensitivity.score", score, f"needs quality.text; give one, or use {_scores_of('tasks')}")
        if described.source == "tasks" and not self.quality.tasks:
            raise InputError("sensitivity.score", score, f"needs quality.tasks; give some, or use {_scores_of('text')}")
        if "none" not in self.sensitivity.treatments:
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "lacks none; the search sorts layers by what removal costs, so add it",
            )
        if self.search.removed not in self.sensitivity.treatments:
            raise InputError(
                "search.removed",
                self.search.removed,
                "is no treatment that layers are tried with; add it to sensitivity.treatments",
            )
        if not described.judges_plans and self.sensitivity.treatments != ("none",):
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                f"the {score} score only says what removal costs; use [none], or the score nll or kl",
            )
        if not described.judges_plans and self.sensitivity.adaptive is not None:
            raise InputError(
                "sensitivity.adaptive", score, f"the {score} score needs no ablation to save; leave adaptive out"
            )
        if not described.judges_plans and self.search.objective == "score":
            raise InputError("search.objective", "score", f"plans have no {score} score; use quality")
        if self.search.refine is not None:
            if not described.judges_plans:
                raise InputError(
                    "search.refine", score, f"plans have no {score} score; choose another sensitivity.score"
                )
            if self.sensitivity.adaptive is not None:
                raise InputError(
                    "search.refine", "adaptive", "needs all layers on the same items; leave one of them out"
                )
            needed = {
                self.search.middle,
                *(t.value for plan in self.search.plans for t in Plan.parse(plan, 1).treatments),
            }
            if lacking := sorted(needed - {"softmax", *self.sensitivity.treatments}):
                raise InputError(
                    "sensitivity.treatments",
                    list(self.sensitivity.treatments),
                    f"lacks {', '.join(lacking)}, whose costs search.refine needs; add it",
                )
        if self.sensitivity.stable_at is not None:
            needs_all = {
                "sensitivity.compare": self.sensitivity.compare,
                "sensitivity.texts": self.sensitivity.texts,
                "sensitivity.context_tokens": self.sensitivity.context_tokens,
                "sensitivity.adaptive": self.sensitivity.adaptive is not None,
                "search.refine": self.search.refine is not None,
            }
            if not described.ranks_texts:
                raise InputError(
                    "sensitivity.stable_at",
                    self.sensitivity.stable_at,
                    f"stops reading a text, which the {score} score does not rank by; leave it out, or use nll",
                )
            if given := [name for name, value in needs_all.items() if value]:
                raise InputError(
                    "sensitivity.stable_at",
                    self.sensitivity.stable_at,
                    f"reads a part of the text, and {given[0]} needs all of it or has a rule of its own; "
                    "leave one of them out",
                )
        if self.sensitivity.adaptive is not None and self.sensitivity.treatments != ("none",):
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "adaptive sorts layers by what removal costs; use [none], or leave sensitivity.adaptive out",
            )
        if self.sensitivity.context_tokens and self.quality.text is None:
            raise InputError(
                "sensitivity.context_tokens", list(self.sensitivity.context_tokens), "needs quality.text; give one"
            )
        for name, source in self.healing.named_sources():
            # Quality reads a hub dataset's default split, `train`, so healing must not train on that split.
            if self.healing.tokens > 0 and (source.path, source.split) == (self.quality.text, "train"):
                raise InputError(
                    name,
                    source.path,
                    "is also quality.text, so models would be judged on training text; give another text or split",
                )
        if self.search.affine.text is not None and self.search.affine.text == self.quality.text:
            raise InputError(
                "search.affine.text",
                self.search.affine.text,
                "is also quality.text, so maps would be judged on the text that they were fitted to; give another text",
            )
        if self.healing.tokens and "cosine" in self.healing.baselines and self.quality.text is None:
            raise InputError(
                "healing.baselines",
                "cosine",
                "ranks layers over quality.text; give one, or leave cosine out",
            )
        return self

    def resolved_yaml(self) -> str:
        """Returns the recipe as YAML with every default written out; it loads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _scores_of(source: str) -> str:
    """Lists the scores that are measured on a text or on tasks, such as `nll, kl or cosine`."""
    *names, last = [score.name for score in SCORES if score.source == source]
    return f"{', '.join(names)} or {last}" if names else last
