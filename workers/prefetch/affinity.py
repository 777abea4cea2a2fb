"""Source "affinity": the experts that were used most lately, for the layer's next step."""

from __future__ import annotations

from collections.abc import Callable

from hotset.workers.prefetch.source import Float32, LayerStep, RankedSource


class Affinity(RankedSource):
    """The score is the affinity, 0 to 1, as it was before the step's first layer.

    Args:
        snapshot: scores now, [layers, num_experts].
    """

    edges = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

    def __init__(self, snapshot: Callable[[], Float32]) -> None:
        self._snapshot = snapshot
        self._scores = snapshot()
        self._layer = -1

    def target(self, layer: int) -> int:
        return layer

    def observe(self, step: LayerStep) -> None:
        if step.layer <= self._layer:
            self._scores = self._snapshot()
        self._layer = step.layer

    def scores(self, step: LayerStep) -> Float32:
        return self._scores[step.layer]
