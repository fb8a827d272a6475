"""Lists the units of every stage before a run, by asking each stage in the order of a run."""

from __future__ import annotations

import io

from orchestrator.run.context import RunContext
from orchestrator.run.kinds import PARTS_OF_STAGES
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.run.units import StageUnits
from orchestrator.stages import evaluate, heal, measure, search, sensitivity


def units_ahead(run: RunContext) -> dict[str, StageUnits]:
    """Returns the units of each stage, by the names of `PARTS_OF_STAGES` and in their order.

    A stage names the units that follow from the records; units that depend on results still missing are open. The run's
    own state stays unchanged, and nothing is started or written.
    """
    state = RunState(run.state.model, run.inputs.n_layers, run.state.score, run.state.environment)
    ahead = RunContext(run.inputs, run.folder, state, Progress(io.StringIO()), run.address, is_ahead=True)
    for stage in (evaluate, sensitivity, search, heal, measure):
        stage.units(ahead)
    return {stage: ahead.listings[stage] for stage in PARTS_OF_STAGES if stage in ahead.listings}
