"""Loads any model, and saves a converted one with everything that belongs to it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .affine import load_maps
from .convert import attach_maps, plan_of
from .plan import TREATMENTS, Treatment
from .storage.publish import local_folder


class CheckpointError(ValueError):
    """A checkpoint cannot be read safely; the message says what to do."""


def check_no_pickle(path: str) -> None:
    """Raises CheckpointError if a local folder holds weights only as pickles."""
    folder = Path(path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise CheckpointError(
            f"model.path: '{path}' holds pickled weights (.bin), which can run code when read; "
            "save the model again as safetensors"
        )


def load_model(
    path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model, converted or not, in evaluation mode from a folder or a hub name.

    Only safetensors are read, because pickles can run code.

    Args:
        dtype: "auto" (as saved), a torch dtype, or its name.

    Raises:
        CheckpointError: The weights are pickles.
    """
    check_no_pickle(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return model.to(device).eval()


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a checkpoint's tokenizer and has it pad on the left, with the end token if it has no padding token."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    card: dict | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Saves weights (safetensors, sharded), configuration, generation configuration, tokenizer, code and model card.

    The folder is written under another name and renamed when it is complete, so that it never holds half a model.

    Args:
        card: Facts for the model card, from label to value (healing tokens, quality, speed, ...).
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(model_card(model, card or {}), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def model_card(model: PreTrainedModel, facts: dict) -> str:
    """Returns the README of a checkpoint: what was done to which parent, how to load it, and the given facts."""
    plan = plan_of(model)
    record = getattr(model.config, "layerboost", None) or {}
    parent = record.get("parent")
    is_hub_name = parent is not None and not Path(parent).is_absolute() and parent.count("/") == 1
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [layerboost]"]
    if is_hub_name:
        header.append(f"base_model: {parent}")
    lines = ["---", *header, "---", "", f"# {Path(parent).name if parent else type(model).__name__}, converted", ""]
    if plan is not None:
        counts = ", ".join(f"{plan.count(t)} {t.value}" for t in Treatment if plan.count(t))
        lines += [
            f"Attention was treated layer by layer with LayerBoost (plan `{record['plan_id']}`): {counts}.",
            "",
            "| | |",
            "|---|---|",
            f"| plan, first layer first | `{plan}` |",
            f"| window, tokens | {plan.window or 'none'} |",
            *([f"| of them sinks, the first tokens | {plan.sinks} |"] if plan.sinks else []),
            f"| parent | {parent or 'unknown'} |",
            f"| parent revision | {record.get('parent_revision') or 'unknown'} |",
            *(f"| {label} | {value} |" for label, value in facts.items()),
            "",
            *(f"{entry.letter}: {entry.name}, {entry.summary}." for entry in TREATMENTS if entry.letter in str(plan)),
            *(f"Loading it needs the plug-in {name} {version}." for name, version in plan.plugins.items()),
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        "import layerboost  # or pass trust_remote_code=True",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class ModelSource:
    """Says where the parent model comes from and how to load it.

    Attributes:
        path, revision, dtype, trust_remote_code: As in `load_model`.
        device: As in `load_model`; "auto" is the worker's GPU if it has one.
        maps: File or URL of the maps for affine layers (`affine.save_maps`), which conversions of the parent get.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    maps: str | None = None

    def load(self, path: str | None = None) -> PreTrainedModel:
        """Loads the parent, or the checkpoint at `path`, with the same dtype and device."""
        with local_folder(path or self.path) as folder:
            loaded = load_model(
                folder,
                dtype=self.dtype,
                device=self.resolved_device(),
                revision=None if path else self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        if path is None and self.maps is not None:
            attach_maps(loaded, load_maps(self.maps))
        return loaded

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"
