"""Weights that are no numbers, or infinite: which tensor of the checkpoint they are in, as far as that can be told.

They are looked for only when a row of a batch has become no number, among the tensors that the row has met since it
was one. What it met in experts is not looked at: they lie in slots, and only the layer is known.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.tensors import layer_tensors, model_tensors
from hotset.shm.kv_page_format import KvFormat, decode

CHUNK_VALUES = 1 << 20  # decoded at once


class FailedRow(ValueError):
    """A row of a batch that cannot be computed.

    Attributes:
        row: its index in the batch. The batch without its sequence can be computed.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


class NotANumber(FailedRow):
    """A row whose values are no numbers, or infinite."""

    def __init__(self, row: int, position: int, where: str, reason: str) -> None:
        super().__init__(row, f"position {position} of the text is no number in {where} {reason}")


class BrokenWeights:
    """Of one checkpoint. Each method says in the end of a sentence which model it is and what is wrong with it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._finite: dict[str, bool] = {}  # what was looked at

    def before(self, layer: int) -> str:
        """The state that enters the layer is no number any more, and the keys of the one before were; past the last
        layer, the state that enters the final norm."""
        if layer == 0:  # a row of the embedding is taken as it is
            return self._of([model_tensors(self._checkpoint.config)["embedding"].name], "the embedding")
        parts = layer_tensors(self._checkpoint.config, layer - 1).values()
        return self._of((part.name for part in parts), f"an expert of layer {layer - 1}")

    def within(self, layer: int) -> str:
        """The state that enters the layer is a number, and its keys and values are not."""
        parts = layer_tensors(self._checkpoint.config, layer).values()
        return self._of((part.name for part in parts), f"the attention of layer {layer}")

    def of_logits(self) -> str:
        """The state that enters the final norm is a number, and the logits are not."""
        parts = model_tensors(self._checkpoint.config)
        return self._of([parts["norm"].name, parts["head"].name], "the head")

    def _of(self, names: Iterable[str], otherwise: str) -> str:
        broken = [name for name in names if not self._is_finite(name)]
        what = (
            f"{', '.join(broken)} {'holds' if len(broken) == 1 else 'hold'} values that are not finite"
            if broken
            else f"{otherwise} holds values that are not finite, or sums overflow there"
        )
        return f"of the model in {self._checkpoint.folder}: {what}"

    def _is_finite(self, name: str) -> bool:
        if name not in self._finite:
            location, stored = self._checkpoint.tensors[name], self._checkpoint.dense(name)
            rows = stored.reshape(-1, stored.shape[-1]).view(np.uint8)
            step = max(1, CHUNK_VALUES // location.shape[-1])
            self._finite[name] = all(
                np.isfinite(decode(rows[at : at + step], KvFormat(location.dtype), location.shape[-1])).all()
                for at in range(0, len(rows), step)
            )
        return self._finite[name]
