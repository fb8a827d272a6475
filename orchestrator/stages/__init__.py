"""The stages of a run, in order. Each file has a function that does what is not recorded, given the run's context."""

from orchestrator.stages.evaluate import evaluate
from orchestrator.stages.heal import heal
from orchestrator.stages.measure import measure
from orchestrator.stages.search import search
from orchestrator.stages.sensitivity import sensitivity

STAGES = {
    "evaluate": evaluate,
    "sensitivity": sensitivity,
    "search": search,
    "heal": heal,
    "report": measure,
}
"""Stage names as the command line has them; `report` measures the finalists, the report follows from the records."""

__all__ = ["STAGES", "evaluate", "heal", "measure", "search", "sensitivity"]
