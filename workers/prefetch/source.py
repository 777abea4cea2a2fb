"""What a source of prefetch candidates is."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class LayerStep(msgspec.Struct, frozen=True):
    """A layer of a decode step that has just been routed, its experts not yet computed.

    Attributes:
        layer: index.
        experts: int32 [rows, top_k], what each row's token uses.
        gate_logits: float32 [rows, num_experts], unmodified.
        residual: float32 [rows, hidden_size], the hidden state before its norm.
    """

    layer: int
    experts: Int32
    gate_logits: Float32
    residual: Float32


class Source(Protocol):
    """Scores the experts of a layer by how likely its next step uses them.

    A score is comparable only with others of the same source. What it is worth is measured (confidence.py), in
    buckets that `edges` separates, ascending.
    """

    @property
    def edges(self) -> tuple[float, ...]: ...

    def scores(self, step: LayerStep) -> tuple[int, Float32] | None:
        """A layer and a score for each of its experts, -inf for those that are no candidates; None: no idea.

        Called once for every layer of every decode step, in order. The array is the caller's.
        """
        ...
