"""Checks whether a model can be used. It reads files and config only, so it takes seconds and loads no weights."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from layerboost.gguf import is_gguf
from orchestrator.recipe.errors import InputError, first_line, nearest
from orchestrator.recipe.load import looks_local
from orchestrator.run.model_facts import ModelFacts, is_converted_type

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX_NAME = "model.safetensors.index.json"


def check_model(
    path: str,
    *,
    field: str = "model.path",
    revision: str | None = None,
    revision_field: str = "model.revision",
    trust_remote_code: bool = False,
    allow_converted: bool = True,
    any_family: bool = False,
    cache: Path | None = None,
) -> ModelFacts:
    """Checks that a model exists, is a decoder of a convertible family, and has its weights in safetensors.

    A GGUF file is unpacked into a folder once its header is checked; everything else stays as it is.

    Args:
        path: a local folder, a GGUF file, or a hub name.
        field: the name of the model in errors.
        revision: a branch, tag or commit on the hub.
        revision_field: the name of the revision in errors.
        trust_remote_code: whether code that comes with the model may run.
        allow_converted: whether a model that is converted already is accepted.
        any_family: whether a decoder of a family that cannot be converted is accepted.
        cache: the folder in which the unpacked model of a GGUF file is kept; None for the user's cache folder.

    Raises:
        InputError: the model cannot be used; the message names it, its fault and the remedy.
    """
    gguf_content = None
    if is_gguf(path):
        folder, gguf_content = _unpack(Path(path).expanduser(), field, cache or user_cache(), any_family)
        path = str(folder)
    folder = Path(path).expanduser()
    commit, local_files_only = None, False
    if folder.exists() or looks_local(path):
        path = str(folder)
        _check_folder(folder, field)
    else:
        commit, local_files_only = _check_hub(path, revision, field, revision_field)
    config = _load_config(path, field, commit or revision, trust_remote_code, local_files_only)
    if is_converted_type(config.model_type) and not allow_converted:
        parent = getattr(config, "layerboost", None) or {}
        hint = f" {parent['parent']}" if isinstance(parent, dict) and parent.get("parent") else ""
        raise InputError(field, path, f"is converted already; give its untouched parent{hint}")
    _check_decoder(config, path, field, any_family)
    text_config = config.get_text_config()
    return ModelFacts(
        path=path,
        commit=commit,
        local_files_only=local_files_only,
        config=config,
        n_layers=text_config.num_hidden_layers,
        context_tokens=getattr(text_config, "max_position_embeddings", None),
        gguf_content=gguf_content,
    )


def user_cache() -> Path:
    """Returns the folder in which the user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerboost"


def _unpack(file: Path, field: str, cache: Path, any_family: bool) -> tuple[Path, str]:
    """Returns the folder with the unpacked model of a GGUF file, and the file's content; it is made only once."""
    from layerboost import gguf

    if not file.is_file():
        siblings = [str(path) for path in file.parent.glob(f"*{gguf.SUFFIX}")] if file.parent.is_dir() else []
        raise InputError(field, file, f"no such file; {nearest(str(file), siblings) or 'give a GGUF file'}")
    try:
        gguf.check_package()
        gguf.check_whole(file)
        content = gguf.content_of(file)
        folder = gguf.folder_for(file, cache, content)
        if not folder.is_dir():
            _check_decoder(gguf.read_config(file), str(file), field, any_family)
            sys.stderr.write(f"{field}: unpacking {file.name} into {cache}, which is done once\n")
            gguf.unpack(file, folder)
    except gguf.GgufError as error:
        raise InputError(field, file, str(error)) from error
    return folder, content


def check_tokenizer(
    facts: ModelFacts, *, field: str = "model.path", revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Loads the model's tokenizer.

    Raises:
        InputError: no tokenizer of the model loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            facts.path,
            revision=facts.commit or revision,
            trust_remote_code=trust_remote_code,
            local_files_only=facts.local_files_only,
        )
    except Exception as error:
        raise InputError(
            field,
            facts.path,
            f"its tokenizer does not load ({first_line(error)}); put the tokenizer's files beside the weights",
        ) from error


def _check_folder(folder: Path, field: str) -> None:
    if not folder.is_dir():
        if folder.exists():
            raise InputError(field, folder, "is a file; give the folder that holds config.json, or a GGUF file")
        siblings = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(str(folder), siblings) or "give a folder with config.json and safetensors, or a hub name"
        raise InputError(field, folder, f"no such folder; {hint}")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(field, folder, "holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(field, config, f"is not a JSON config ({error}); download or save the model again") from None
    _check_weights(folder, field)


def _check_weights(folder: Path, field: str) -> None:
    names = {path.name for path in folder.iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    if _INDEX_NAME in names:
        try:
            shards = sorted(set(json.loads((folder / _INDEX_NAME).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError):
            raise InputError(field, folder / _INDEX_NAME, "is damaged; download or save the model again") from None
    _refuse_pickles(shards, names, folder, field)
    if missing := [shard for shard in shards if shard not in names]:
        raise InputError(
            field, folder, f"lacks {missing[0]} of its {len(shards)} weight files; download or save the model again"
        )
    from safetensors import SafetensorError, safe_open

    for shard in shards:
        try:
            # Opening reads the header and compares it with the size of the file, so a broken download fails here.
            with safe_open(folder / shard, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(
                field, folder / shard, f"is damaged ({first_line(error)}); download or save the model again"
            ) from None


def _refuse_pickles(shards: list[str], names: set[str], path: object, field: str) -> None:
    if shards:
        return
    if pickled := sorted(name for name in names if name.endswith(_PICKLED_SUFFIXES)):
        raise InputError(
            field,
            path,
            f"has its weights as {pickled[0]}, a pickle, which can run code when it is loaded; "
            "save it again with safe_serialization=True or take a revision with safetensors",
        )
    raise InputError(field, path, "holds no weights (*.safetensors); give the folder of a whole checkpoint")


def _check_hub(name: str, revision: str | None, field: str, revision_field: str) -> tuple[str | None, bool]:
    """Returns the commit of the revision, and whether the model has to come from the cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        # Ask with a short timeout: transformers retries for half a minute before it reports a missing connection.
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise InputError(field, name, "no such folder, and no hub name (owner/name) either; check the path") from None
    except GatedRepoError:
        raise InputError(
            field, name, "is gated on the hub; accept its terms there and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(
            revision_field, revision, f"{name} has no such revision on the hub; give a branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            field, name, "no such folder, and the hub has no such model (or it is private); check the name, or log in"
        ) from None
    except Exception as error:
        if isinstance(cached, str):
            logger.warning("the hub cannot be reached (%s); using %s from the cache", first_line(error), name)
            # The path is .../snapshots/<commit>/config.json. The run needs the commit to find its records.
            return Path(cached).parent.name, True
        raise InputError(
            field,
            name,
            f"no such folder, not in the cache, and the hub cannot be reached ({first_line(error)}); "
            "give a local folder or connect",
        ) from None
    names = {sibling.rfilename for sibling in info.siblings or []}
    if "config.json" not in names:
        raise InputError(field, name, "has no config.json on the hub; give a transformers checkpoint")
    _refuse_pickles([n for n in names if n.endswith(".safetensors")], names, name, field)
    return info.sha, False


def _load_config(path: str, field: str, revision: str | None, trust_remote_code: bool, local_files_only: bool) -> Any:
    from transformers import AutoConfig

    import layerboost  # noqa: F401 - registers the classes of converted models

    try:
        return AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except Exception as error:
        remedy = "check the file or the transformers version"
        if "trust_remote_code" in str(error):
            remedy = "it needs code of its own: set model.trust_remote_code if you trust it"
        raise InputError(field, path, f"its config.json does not load ({first_line(error)}); {remedy}") from error


def _check_decoder(config: Any, path: str, field: str, any_family: bool) -> None:
    from layerboost.families import UnsupportedFamilyError, check_family, supported_families

    architectures = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False) or not any("CausalLM" in name for name in architectures):
        what = architectures[0] if architectures else config.model_type
        raise InputError(
            field,
            path,
            f"{what} is not a decoder for causal language modelling; give a *ForCausalLM model of one of "
            f"{', '.join(supported_families())}",
        )
    if any_family:
        return
    try:
        check_family(config)
    except UnsupportedFamilyError as error:
        raise InputError(field, path, str(error)) from None
