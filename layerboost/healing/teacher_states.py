"""Keeps what a frozen teacher computes for a text, so that all healings on that text compute it once."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..storage.errors import is_disk_full

log = logging.getLogger(__name__)

_STATES = "states"


class TeacherStates:
    """Holds a teacher's final hidden states in a folder, one file for each sequence.

    A file is named by the hash of its sequence, so that healings of different budgets and orders share it. States keep
    the dtype in which they were computed; a stored sequence is what the teacher would compute again in the same batch.
    Several processes may use a folder at the same time, and it may be deleted at any time.

    Args:
        folder: A local folder for one teacher in one dtype.
        max_bytes: Size of the folder's files from which on no more are added.
    """

    def __init__(self, folder: str | Path, max_bytes: float):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._n_bytes = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

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
        """Returns the states (T, d) in a file; None if there is none, or a damaged one."""
        try:
            states = load_file(file)[_STATES]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            log.warning("stored teacher states: %s is damaged (%s) and written again", file, error)
            return None
        return states if len(states) == n_tokens else None

    def _write(self, file: Path, states: torch.Tensor) -> None:
        n_bytes = states.numel() * states.element_size()
        if self._n_bytes + n_bytes > self.max_bytes:
            return
        part = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.folder, suffix=".writing")
            os.close(handle)
            save_file({_STATES: states.detach().cpu().contiguous()}, part)
            os.replace(part, file)
            self._n_bytes += n_bytes
        except Exception as error:
            if part is not None:
                with suppress(FileNotFoundError):
                    os.unlink(part)
            if not is_disk_full(error):
                raise
            self.max_bytes = 0  # healing needs the room that is left for its checkpoints
            log.warning("stored teacher states: %s is full, so no more of them are kept", self.folder)
