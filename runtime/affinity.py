"""Affinity: how much each expert was used lately, as an exponential moving average shared by all processes.

`score = min(score * decay + activation_boost, max_score)` per epoch, without the boost for experts that were not
activated. The slots, and why merging them from many processes does not depend on the order, are in
shm/core/affinity.h.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import check_field_types, check_instance, integer, integers
from hotset.runtime.settings import Settings, takes
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment


class AffinityConfig(Settings, frozen=True):
    """How scores grow and fade.

    Processes agree with one float64 EMA (within 1e-4) when `activation_boost <= (1 - decay) * max_score` or
    `activation_boost >= max_score`. In between, the cap makes the order of activations visible.

    Attributes:
        num_experts: per layer.
        decay: factor per epoch, 0 to 1.
        activation_boost: added by an activation.
        max_score: what a score is capped at.
    """

    num_experts: int = 8
    decay: float = 31 / 32
    activation_boost: float = 1 / 32
    max_score: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}, expected at least 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}, expected a number from 0 to 1")
        if not 0 <= self.activation_boost < float("inf"):
            raise ValueError(f"activation_boost is {self.activation_boost}, expected a number >= 0")
        if not 0 < self.max_score < float("inf"):
            raise ValueError(f"max_score is {self.max_score}, expected a number > 0")


class ExpertAffinity:
    """The affinity of every expert, on the instance's arena or on private memory.

    Ids out of range are a `ValueError` when written and have no score and no activations when read.

    Args:
        config: num_experts must be the arena's.
        num_layers: of private memory; an arena has its own.
        segment: the arena; None makes private memory.
        process: whose row counts this object's activations.
    """

    @takes("config", AffinityConfig)
    def __init__(
        self, config: AffinityConfig, *, num_layers: int = 1, segment: Segment | None = None, process: int = 0
    ) -> None:
        check_instance("config", config, AffinityConfig)
        num_layers, process = integer("num_layers", num_layers, 1), integer("process", process, 0)
        if segment is not None:
            check_instance("segment", segment, Segment)
        else:
            segment = Segment.private(Geometry(num_layers=num_layers, num_experts=config.num_experts))
        geometry = segment.layout.geometry
        if config.num_experts != geometry.num_experts:
            raise ValueError(f"num_experts is {config.num_experts}, expected {geometry.num_experts} as in the arena")
        self.config = config
        self.num_layers = geometry.num_layers
        self._segment = segment
        self.core = _core.Affinity(segment.arena, process, config.decay, config.activation_boost, config.max_score)
        self._shape = (geometry.num_layers, geometry.num_experts)
        self._baseline = np.zeros(self._shape, np.uint64)

    def update(self, ids: Iterable[int], layer: int = 0) -> None:
        """One epoch: everything decays, then `ids` are boosted. Changes nothing if one of them is out of range."""
        experts = integers("ids", ids)
        for expert in experts:
            if not self._known(expert):
                raise ValueError(f"expert id is {expert}, expected 0 <= id < {self.config.num_experts}")
        self.core.update(self._layer(layer), np.array(experts, np.int32))

    def snapshot(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]]:
        """Scores decayed to now and epochs of the last activation, both [layers, experts]."""
        scores, epochs = np.empty(self._shape, np.float32), np.empty(self._shape, np.uint64)
        self.core.snapshot(scores, epochs)
        return scores, epochs

    def scores(self, layer: int = 0) -> npt.NDArray[np.float32]:
        """Scores now, [experts]."""
        return self.snapshot()[0][self._layer(layer)]

    def score(self, expert: int, layer: int = 0) -> float:
        return float(self.scores(layer)[expert]) if self._known(expert) else 0.0

    def activation_counts(self, layer: int = 0) -> npt.NDArray[np.uint64]:
        """How often each expert was activated by any process since the last `reset`, [experts]."""
        totals = np.empty(self._shape, np.uint64)
        self._segment.arena.activation_totals(totals)
        return (totals - self._baseline)[self._layer(layer)]

    def activation_count(self, expert: int, layer: int = 0) -> int:
        return int(self.activation_counts(layer)[expert]) if self._known(expert) else 0

    def top_k_by_affinity(self, k: int, layer: int = 0) -> list[int]:
        """The `k` experts with the largest scores, largest first, ties to the lowest id."""
        return np.argsort(-self.scores(layer), kind="stable")[: max(integer("k", k), 0)].tolist()

    def top_k_by_frequency(self, k: int, layer: int = 0) -> list[int]:
        """The `k` most activated experts, ties to the lowest id."""
        return np.argsort(-self.activation_counts(layer).astype(np.int64), kind="stable")[
            : max(integer("k", k), 0)
        ].tolist()

    def least_affinity(self, candidates: Iterable[int], layer: int = 0) -> int | None:
        """The candidate to evict: smallest score, then oldest activation, then lowest id. None without candidates."""
        scores, epochs = self.snapshot()
        layer = self._layer(layer)
        known = [e for e in integers("candidates", candidates) if self._known(e)]
        return min(known, key=lambda e: (scores[layer, e], epochs[layer, e], e), default=None)

    def frequency_percentile(self, expert: int, layer: int = 0) -> float:
        """Mid-rank of the expert's activation count among all, 0 to 1: 0.5 when all are equal."""
        if not self._known(expert):
            return 0.0
        counts = self.activation_counts(layer)
        below = np.count_nonzero(counts < counts[expert])
        equal = np.count_nonzero(counts == counts[expert])
        return (below + equal / 2) / counts.size

    def reset(self) -> None:
        """All scores and, as this object counts them, all activations are 0 again."""
        for layer in range(self.num_layers):
            self.core.reset(layer)
        self._segment.arena.activation_totals(self._baseline)

    def _known(self, expert: int) -> bool:
        return 0 <= integer("expert", expert) < self.config.num_experts

    def _layer(self, layer: int) -> int:
        layer = integer("layer", layer)
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer is {layer}, expected 0 <= layer < {self.num_layers}")
        return layer
