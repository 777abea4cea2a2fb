"""What a source of prefetch candidates is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

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
        foresee: another layer and gate logits [rows, num_experts] for it -> what these rows would miss there, as
            `MemoryAwareRouter.foresee` says it.
    """

    layer: int
    experts: Int32
    gate_logits: Float32
    residual: Float32
    foresee: Callable[[int, Float32], Mapping[int, float]]


class Source(ABC):
    """Names experts that a layer's next step may use, with scores: the higher, the likelier.

    A score is comparable only with others of the same source. What it is worth is measured (confidence.py), in
    buckets that begin at `edges`, ascending; experts below the first are no candidates.
    """

    edges: ClassVar[tuple[float, ...]]

    @abstractmethod
    def target(self, layer: int) -> int | None:
        """The layer whose next step can be foreseen when `layer` has been routed, if there is one."""

    def observe(self, step: LayerStep) -> None:  # noqa: B027 - most have nothing to learn
        """Learns, if it can. Called for every layer of every decode step, in order, before `candidates`."""

    @abstractmethod
    def candidates(self, step: LayerStep, most: int) -> Mapping[int, float]:
        """Experts of the target with their scores, `most` at most."""


class RankedSource(Source):
    """A source that has a score for every expert of its target."""

    @abstractmethod
    def scores(self, step: LayerStep) -> Float32:
        """[num_experts]."""

    def candidates(self, step: LayerStep, most: int) -> Mapping[int, float]:
        scores = self.scores(step)
        best = np.flatnonzero(scores >= self.edges[0])
        if len(best) > most:
            best = best[np.argpartition(scores[best], -most)[-most:]]
        return dict(zip(best.tolist(), scores[best].tolist(), strict=True))
