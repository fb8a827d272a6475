"""Exports converted models in their family's own format, for engines that know nothing of plans, if it can say it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .convert import parent_config, plan_of, sharing_parameters
from .families import native_windows
from .modeling import parent_class
from .plan import Treatment

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ExportError(ValueError):
    """The family's own format or code cannot express the plan; the message says why, and what to do."""


def export_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the converted model as its family's own class, with windows in `layer_types`; parameters are shared.

    Such a configuration can only express a plan of `softmax` and `window`, and not every family's code reads it.
    Therefore the logits of both models are compared on random tokens several windows long.

    Raises:
        ExportError: The plan has other treatments, or the family's own code computes something else.
    """
    plan = plan_of(model)
    if plan is None:
        raise ExportError("model: is not a converted one; it is in its family's own format already")
    other = [treatment.value for treatment in Treatment if treatment not in (Treatment.SOFTMAX, Treatment.WINDOW)]
    if found := sorted(name for name in other if plan.count(Treatment(name))):
        raise ExportError(
            f"plan: {plan} has {' and '.join(found)}, which no stock format can say; serve the checkpoint as it is, "
            "with this package or its vLLM plugin"
        )
    if plan.sinks:
        raise ExportError(
            f"plan: its windows keep {plan.sinks} sinks, which no stock format can say; serve the checkpoint as it is, "
            "with this package"
        )
    config = parent_config(model.config)
    native = native_windows(config)
    windows = [plan.window if t is Treatment.WINDOW else native[i] for i, t in enumerate(plan.treatments)]
    if len(set(windows) - {None}) > 1:
        own = sorted({window for window in native if window})
        raise ExportError(
            f"plan: its window {plan.window} differs from the family's own windows {own}, "
            "but a stock format has one for all layers; convert with that window"
        )
    config.layer_types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    config.sliding_window = next((window for window in windows if window is not None), None)
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = config.sliding_window is not None
    stock = sharing_parameters(parent_class(config.model_type), config, model, []).eval()
    _check_logits(model, stock)
    return stock


@torch.inference_mode()
def _check_logits(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    config, plan = model.config.get_text_config(), plan_of(model)
    assert plan is not None
    n_tokens = min(4 * (plan.window or 16) + 8, getattr(config, "max_position_embeddings", None) or 2**31)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, n_tokens), generator=generator).to(model.device)
    expected = model(input_ids=tokens, use_cache=False).logits.float()
    difference = (stock(input_ids=tokens, use_cache=False).logits.float() - expected).norm() / expected.norm()
    if not difference <= _TOLERANCE[model.dtype]:
        raise ExportError(
            f"plan: {plan} is not what {type(stock).__name__} computes from `layer_types` (its logits differ by "
            f"{difference:.1%} in norm); serve the checkpoint as it is, with this package or its vLLM plugin"
        )
