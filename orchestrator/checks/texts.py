"""Checks that texts can be used: it reads and packs one sequence of each, in the way the run will."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checks.model import HUB_TIMEOUT_S
from orchestrator.recipe.errors import InputError, first_line, without_prefix
from orchestrator.recipe.fields import resolve_sequence_tokens
from orchestrator.recipe.healing import SAMPLED, HealingSection, HealingText
from orchestrator.run.model_facts import ModelFacts

if TYPE_CHECKING:
    from layerboost.affine import MapsSpec


def check_plain_text(name: str, text: str, sequence_tokens: int, tokenizer: Any, facts: ModelFacts) -> None:
    """Checks that a file or dataset exists and gives at least one sequence of tokens that the model knows.

    Raises:
        InputError: the text cannot be used; the error calls the field `name`.
    """

    def packed() -> Any:
        from layerboost.text.documents import pack, read_documents

        return pack(read_documents(text), tokenizer, sequence_tokens, limit_sequences=1)

    _check_text(name, text, packed, facts)


def check_healing_texts(healing: HealingSection, facts: ModelFacts, tokenizer: Any) -> None:
    """Checks each source of healing's text by reading it in the way the run will.

    Raises:
        InputError: a source cannot be used; it names the first one.
    """
    tokens = resolve_sequence_tokens(healing.sequence_tokens, facts.context_tokens)
    for name, text in healing.named_sources() if healing.tokens else ():
        if text.format == SAMPLED:
            if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
                raise InputError(
                    "healing.text", SAMPLED, "the tokenizer has neither BOS nor EOS to start with; give a file instead"
                )
            continue
        assert text.path is not None

        def packed(name: str = name, text: HealingText = text) -> Any:
            from layerboost.healing.spec import HealingSpec
            from layerboost.text.sources import pack_sources

            # A single text is not repeated, and its last sequences may be held out, so it must be longer than those.
            n_held_out = HealingSpec.held_out_sequences if healing.stop_when_flat and len(healing.text) == 1 else 0
            sequences = pack_sources([text.source()], tokenizer, tokens, 1 + n_held_out).input_ids
            if len(sequences) <= n_held_out:
                raise InputError(
                    name,
                    text.path,
                    f"gives {len(sequences)} sequences of {tokens} tokens, of which healing.stop_when_flat holds "
                    f"{n_held_out} out; give a longer text or leave stop_when_flat out",
                )
            return sequences

        _check_text(name, text.path, packed, facts)


def check_maps_text(name: str, spec: MapsSpec, tokenizer: Any, facts: ModelFacts) -> None:
    """Checks that a text gives at least the two sequences that maps of affine layers need.

    Raises:
        InputError: the text cannot be used; the error calls the field `name`.
    """

    def packed() -> Any:
        from layerboost.sweep.affine_fits import read_sequences

        return read_sequences(replace(spec, tokens=2 * spec.sequence_tokens), tokenizer)

    _check_text(name, str(spec.source.path), packed, facts)


def _check_text(name: str, text: str, packed: Callable[[], Any], facts: ModelFacts) -> None:
    """Reads and packs one sequence in the way the run will, and turns what fails into InputError."""
    from layerboost.text.documents import TextSourceError, TextTooShortError

    _check_dataset_reachable(name, text)
    try:
        sequence = packed()
    except (TextSourceError, TextTooShortError) as error:
        raise InputError(name, text, without_prefix(error, "text")) from None
    except UnicodeDecodeError as error:
        raise InputError(name, text, f"is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise InputError(name, text, f"cannot be read ({first_line(error)}); check the path and the rights") from None
    except ValueError as error:
        raise InputError("model.path", facts.path, without_prefix(error, "tokenizer")) from None
    vocabulary = facts.config.get_text_config().vocab_size
    if int(sequence.max()) >= vocabulary:
        raise InputError(
            "model.path",
            facts.path,
            f"its tokenizer gives the token {int(sequence.max())}, its vocabulary has {vocabulary}; "
            "give the tokenizer that the model was trained with",
        )


def _check_dataset_reachable(field: str, text: str) -> None:
    """Asks the hub with a short timeout; `datasets` retries for half a minute before it reports no connection."""
    if Path(text).suffix or Path(text).exists() or "://" in text:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repository = text.partition(":")[0]
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
            return
        except HFValidationError:
            raise InputError(field, text, "no such file, and no hub name (owner/name) either; check the path") from None
        except RepositoryNotFoundError:
            raise InputError(
                field, text, "no such file, and the hub has no such dataset; check the name, or log in"
            ) from None
        except Exception as error:
            reason = first_line(error)
    import datasets

    if not (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir():
        raise InputError(
            field,
            text,
            f"no such file, not in the cache, and the hub cannot be reached ({reason}); give a local file or connect",
        )
