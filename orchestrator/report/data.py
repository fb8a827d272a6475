"""Collects all tables and facts that a report shows in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from orchestrator.report.certainty import correlations_table, interactions_table, rankings_table, tiers_table
from orchestrator.report.choice import estimates_table, fidelity_table, halving_table, lengths_table, speed_table
from orchestrator.report.healing import baselines_table, branches_table, healing_table, quality_curve_table
from orchestrator.report.tables import candidates_table, pareto_table, sensitivity_table


@dataclass
class ReportData:
    """Holds everything that a report shows. A run that stopped early leaves the later tables empty."""

    title: str
    recipe_yaml: str
    """The resolved recipe as YAML."""
    sensitivity: pd.DataFrame = field(default_factory=lambda: sensitivity_table([]))
    candidates: pd.DataFrame = field(default_factory=lambda: candidates_table([]))
    pareto: pd.DataFrame = field(default_factory=lambda: pareto_table([]))
    healing_curves: pd.DataFrame = field(default_factory=lambda: healing_table([]))
    quality_curve: pd.DataFrame = field(default_factory=lambda: quality_curve_table([]))
    baselines: pd.DataFrame = field(default_factory=lambda: baselines_table([]))
    branches: pd.DataFrame = field(default_factory=lambda: branches_table([]))
    early_stops: list[dict[str, Any]] = field(default_factory=list)
    """`plan_id`, `tokens` and `budget` of each healed plan that stopped before its budget was spent."""
    healing_paces: list[float] = field(default_factory=list)
    """Tokens per second of the steps of each healing, in the order of the healed plans."""
    stable: dict[str, Any] | None = None
    """`sequences` read `of` all and `reliability` by treatment, if the sweep could end early."""
    rankings: pd.DataFrame = field(default_factory=lambda: rankings_table([]))
    correlations: pd.DataFrame = field(default_factory=lambda: correlations_table([]))
    interactions: pd.DataFrame = field(default_factory=lambda: interactions_table([]))
    tiers: pd.DataFrame = field(default_factory=lambda: tiers_table([]))
    lengths: pd.DataFrame = field(default_factory=lambda: lengths_table([]))
    halving: pd.DataFrame = field(default_factory=lambda: halving_table([]))
    fidelity: pd.DataFrame = field(default_factory=lambda: fidelity_table([]))
    speed: pd.DataFrame = field(default_factory=lambda: speed_table([]))
    estimates: pd.DataFrame = field(default_factory=lambda: estimates_table([]))
    verdict: list[str] = field(default_factory=list)
    """Whole sentences that name the best plan under the recipe's constraints, or the constraints to loosen."""
    best: list[int] = field(default_factory=list)
    """Index labels of the rows of `pareto` that are best under the constraints, at most one for each condition."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions and hardware by name; mappings inside are flattened for the page."""
    cost: pd.DataFrame | None = None
    """The cost of each stage; column names are headings for readers."""
    warnings: list[str] = field(default_factory=list)
