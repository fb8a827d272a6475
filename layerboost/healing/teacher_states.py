"""Keeps what a frozen teacher computes for a text, so that all healings on that text compute it once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..storage.errors import is_disk_full, retried
from ..storage.publish import publish_tensors

log = logging.getLogger(__name__)

_STATES = "states"
_WRITES_PER_SCAN = 32
"""Number of files that a process writes before it counts again what all processes have written."""


class TeacherStates:
    """Holds a teacher's final hidden states in a folder, one file for each sequence.

    A file is named by the hash of its sequence, so that healings of different budgets and orders share it. States keep
    the dtype in which they were computed; a stored sequence is what the teacher would compute again in the same batch.
    Several processes may use a folder at the same time, and it may be deleted at any time.

    Args:
        folder: A local folder for one teacher in one dtype.
        max_bytes: Size of the folder's files from which on no more are added.
        reserved_bytes: Free space of the disk below which no more are added, because healing needs it for checkpoints.
    """

    def __init__(self, folder: str | Path, max_bytes: float, *, reserved_bytes: float = 2**31):
        self.folder, self.max_bytes, self.reserved_bytes = Path(folder), max_bytes, reserved_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._n_bytes, self._writes = 0, 0

    def states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Returns the states (B, T, d) of sequences, from the folder if it has all of them.

        Args:
            input_ids, position_ids: (B, T), as in `PackedText`.
            compute: Has the teacher compute the states of all rows.
        """
        files = self._files(input_ids, position_ids)
        stored = [self._read(file, input_ids.shape[1]) for file in files]
        if all(states is not None for states in stored):
            return torch.stack([states for states in stored if states is not None]).to(input_ids.device)
        computed = compute()
        for file, of_row, before in zip(files, computed, stored, strict=True):
            if before is None:
                self._write(file, of_row)
        return computed

    def _files(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> list[Path]:
        given = [input_ids] if position_ids is None else [input_ids, position_ids]
        rows = torch.stack([x.long() for x in given], dim=1).cpu().numpy()
        return [self.folder / f"{hashlib.sha256(row.tobytes()).hexdigest()}.safetensors" for row in rows]

    def _read(self, file: Path, n_tokens: int) -> torch.Tensor | None:
        """Returns the states (T, d) in a file; None if there is none, or a damaged one, which is removed."""
        try:
            states = load(retried(file.read_bytes)())[_STATES]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            log.warning("stored teacher states: %s is damaged (%s) and written again", file, error)
            file.unlink(missing_ok=True)
            return None
        return states if len(states) == n_tokens else None

    def _write(self, file: Path, states: torch.Tensor) -> None:
        n_bytes = states.numel() * states.element_size()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._has_room(n_bytes) or file.exists():
                return
            publish_tensors({_STATES: states.detach().cpu()}, str(file))
        except FileNotFoundError:
            return  # another process has just deleted the folder
        except Exception as error:
            if not is_disk_full(error):
                raise
            self.max_bytes = 0
            log.warning("stored teacher states: the disk of %s is full, so no more of them are kept", self.folder)
        else:
            self._n_bytes += n_bytes
            self._writes += 1

    def _has_room(self, n_bytes: int) -> bool:
        if self._writes % _WRITES_PER_SCAN == 0 and self.max_bytes:
            self._n_bytes = 0
            for file in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    self._n_bytes += file.stat().st_size
        has_space = shutil.disk_usage(self.folder).free - n_bytes >= self.reserved_bytes
        return has_space and self._n_bytes + n_bytes <= self.max_bytes
