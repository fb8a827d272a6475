"""Defines the recipe, which says what to run. It is read and checked once at the start and is frozen afterwards.

A recipe is a YAML file of eight sections. Everything in it changes results, except `placement`, which says where the
work runs, and the fields of `healing` that change only its memory; neither is part of an identity. Every mistake
becomes one `InputError` with field, value and remedy.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import model_validator

from orchestrator.recipe.constraints import ConstraintsSection
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import Section
from orchestrator.recipe.healing import HealingSection
from orchestrator.recipe.sections import (
    TASK_SCORES,
    TEXT_SCORES,
    TREATMENT_OF_LETTER,
    ModelSection,
    PlacementSection,
    QualitySection,
    SearchSection,
    SensitivitySection,
    ThroughputSection,
)


class Recipe(Section):
    """A whole recipe, checked and frozen. `load_recipe` reads one from a file.

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
        """Sets the default objective to the quality where the score is cosine, because plans have no cosine score."""
        if not isinstance(data, dict):
            return data
        sensitivity, search = data.get("sensitivity") or {}, data.get("search") or {}
        is_cosine = isinstance(sensitivity, dict) and sensitivity.get("score") == "cosine"
        if is_cosine and isinstance(search, dict) and search.get("objective") is None:
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
        if score in TEXT_SCORES and self.quality.text is None:
            raise InputError("sensitivity.score", score, "needs quality.text; give one, or use benchmark or margin")
        if score in TASK_SCORES and not self.quality.tasks:
            raise InputError("sensitivity.score", score, "needs quality.tasks; give some, or use nll, kl or cosine")
        if "none" not in self.sensitivity.treatments:
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "lacks none; the search sorts layers by what removal costs, so add it",
            )
        if score == "cosine" and self.sensitivity.treatments != ("none",):
            raise InputError(
                "sensitivity.treatments",
                list(self.sensitivity.treatments),
                "the cosine score only says what removal costs; use [none], or the score nll or kl",
            )
        if score == "cosine" and self.sensitivity.adaptive is not None:
            raise InputError(
                "sensitivity.adaptive", score, "the cosine score needs no ablation to save; leave adaptive out"
            )
        if score == "cosine" and self.search.objective == "score":
            raise InputError("search.objective", "score", "plans have no cosine score; use quality")
        if self.search.refine is not None:
            if score == "cosine":
                raise InputError("search.refine", score, "plans have no cosine score; choose another sensitivity.score")
            if self.sensitivity.adaptive is not None:
                raise InputError(
                    "search.refine", "adaptive", "needs all layers on the same items; leave one of them out"
                )
            needed = {self.search.middle, *(TREATMENT_OF_LETTER[x] for plan in self.search.plans for x in plan)}
            if lacking := sorted(needed - {"softmax", *self.sensitivity.treatments}):
                raise InputError(
                    "sensitivity.treatments",
                    list(self.sensitivity.treatments),
                    f"lacks {', '.join(lacking)}, whose costs search.refine needs; add it",
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
                    "is what quality.text judges by, so the score would be of text seen; give another text or split",
                )
        if self.healing.tokens and "cosine" in self.healing.baselines and self.quality.text is None:
            raise InputError(
                "healing.baselines",
                "cosine",
                "ranks layers over quality.text; give one, or leave cosine out",
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Returns everything that can change a result, as plain JSON values; where the work runs is left out."""
        return self.model_dump(mode="json", exclude={"placement": True, "throughput": {"environment"}})

    def resolved_yaml(self) -> str:
        """Returns the recipe as YAML with every default written out; it loads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
