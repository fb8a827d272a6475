"""Implements a plug-in as another project would write it: one treatment, score, searcher, divergence and engine.

Putting its folder on `PYTHONPATH` installs it, because the folder has the dist-info that pip would write.
"""

from __future__ import annotations

import math

from layerboost.evaluation.scores import SCORES, MetricScore, Score, Scores, mean_score
from layerboost.healing.divergences import DIVERGENCES, DivergenceEntry
from layerboost.plan import TREATMENTS, TreatmentEntry
from layerboost.search.methods import METHODS, Method
from tasks.engines import ENGINES, Engine


def likelihoods(scores: Scores) -> list[MetricScore]:
    """Returns the likelihood of a token instead of its NLL, sequence by sequence."""
    found = [score for score in scores.metrics if score.metric == "nll" and score.items]
    return [mean_score(s.task, "likelihood", [math.exp(-nll) for nll in s.items or ()], True) for s in found]


def register() -> None:
    TREATMENTS.add(
        TreatmentEntry(
            "gated_mean",
            "G",
            "the mean of all values so far, gated by head",
            "layerboost_testplugin.mechanism:GATED_MEAN",
            "#123456",
            has_weights=True,
            depth=0.7,
        )
    )
    SCORES.add(Score("likelihood", "of a token", "text", likelihoods, kept=lambda gained, base: 1 + gained))
    METHODS.add(Method("alternating", "every other layer", "layerboost_testplugin.searcher:alternating", "none"))
    DIVERGENCES.add(
        DivergenceEntry("total_variation", "half the differences", "layerboost_testplugin.losses:total_variation")
    )
    ENGINES.add(
        Engine(
            "stopwatch",
            "transformers under another name",
            "layerboost_testplugin.engine:StopwatchWorker",
            "layerboost.speed.decoding:DecodeMeasurement",
        )
    )
