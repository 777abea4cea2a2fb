"""Source "affinity": the experts that were used most lately, for the layer's next step."""

from __future__ import annotations

from collections.abc import Callable

from hotset.workers.prefetch.source import Float32, LayerStep


class Affinity:
    """The score is the affinity, 0 to 1.

    Args:
        affinity: layer -> scores now, [num_experts].
    """

    edges = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

    def __init__(self, affinity: Callable[[int], Float32]) -> None:
        self._affinity = affinity

    def scores(self, step: LayerStep) -> tuple[int, Float32]:
        return step.layer, self._affinity(step.layer).copy()
