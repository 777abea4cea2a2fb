"""The table of transitions from one instance to the next: a file of its own beside the model's heat file."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from hotset.runtime.model.model_cache import model_cache, replace_file
from hotset.workers.background_writer import BackgroundWriter
from hotset.workers.prefetch.transitions import Transitions

SAVE_SECONDS = 60.0  # what a kill can lose


class KeptTable:
    """Begins with what an earlier instance of the model has learned, and writes what this one does.

    The file is a cache: without it, or if it cannot be written, the table is learned anew. It is written beside the
    worker's steps: for a large model it is tens of MB.

    Args:
        table: of one worker; only one of an instance may be kept.
        model: the folder or file served.
    """

    def __init__(self, table: Transitions, model: Path) -> None:
        self._table = table
        self._next_save = time.monotonic() + SAVE_SECONDS
        self._writer = BackgroundWriter(f"what transitions learned of {model}")
        try:
            self._file: Path | None = model_cache(model) / "transitions"
        except OSError:
            self._file = None
        else:
            table.load(self._file)

    def save_if_due(self) -> None:
        if time.monotonic() >= self._next_save:
            self._next_save = time.monotonic() + SAVE_SECONDS
            self._begin()

    def save(self) -> None:
        """It is written when this returns."""
        self._writer.wait()
        self._begin()
        self._writer.wait()

    def _begin(self) -> None:
        if self._file is not None and self._writer.is_free():
            self._writer.begin(partial(replace_file, self._file, self._table.content()))
