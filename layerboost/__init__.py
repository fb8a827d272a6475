"""LayerBoost: softmax attention where it matters, cheaper attention or none elsewhere, healed by distillation.

Importing this package lets `transformers.AutoModelForCausalLM` load converted checkpoints.
"""

from .cache import PlanCache
from .convert import convert, plan_of, restore
from .families import UnsupportedFamilyError, supported_families
from .modeling import register
from .plan import Plan, PlanError, Treatment, plan_from_thresholds
from .version import __version__

__all__ = [
    "Plan",
    "PlanCache",
    "PlanError",
    "Treatment",
    "UnsupportedFamilyError",
    "__version__",
    "convert",
    "plan_from_thresholds",
    "plan_of",
    "register",
    "restore",
    "supported_families",
]

register()
