"""Which resident expert goes when a slot is needed: the pager's side of the policies in core/policy.h.

The policy learns from the rings of demands that the workers write (shm/core/demand_ring.h). A worker writes a step's
demand before it asks for what it misses, so that the demand is known when its misses are served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.eviction import parse_eviction
from hotset.runtime.prefetch import LEAST_PRECISION
from hotset.shm.demands import DemandReader, Records, split_records, stamp_of
from hotset.shm.segment import Segment
from hotset.workers.eviction.learned import LearnedKeeper
from hotset.workers.eviction.replay import make_policy

MOSTLY_ENOUGH = 8  # victims to look for at first: further ones are needed only when these are pinned


class Eviction:
    """Orders resident experts from the one to evict first to the one to keep longest.

    Experts are global ids. All layers share the slots; a layer that is down to its floor (core/policy.h) loses
    experts only when no other has one to give.

    Args:
        policy: as `parse_eviction` takes it.
        segment: the arena. What an earlier pager of the instance knew of affinity is there still.
        process: the pager's row.
        affinity: [layers, experts], what is known of it; None is what the arena says.
        model: whose kept learning to begin with and to go on keeping; None keeps nothing.

    Attributes:
        learned: what is kept of a policy that learns.
    """

    def __init__(
        self,
        policy: str,
        segment: Segment,
        process: int,
        affinity: npt.NDArray[np.float32] | None = None,
        model: Path | None = None,
    ) -> None:
        geometry = segment.layout.geometry
        self._num_experts = geometry.num_experts
        slots_per_layer = max(geometry.num_slots, 1) / geometry.num_layers
        settings = parse_eviction(policy)
        self._has_probabilities = settings.base in ("affinity", "td")
        self._policy = make_policy(
            settings,
            num_layers=geometry.num_layers,
            num_experts=geometry.num_experts,
            num_streams=max(geometry.max_sequences, 1),
            slots_per_layer=slots_per_layer,
        )
        self._ordered: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._protected: list[int] = []  # indices into `_ordered`
        self._demands = DemandReader(segment)
        self._values = np.zeros((geometry.num_layers, geometry.num_experts))
        if affinity is None:
            shared = ExpertAffinity(AffinityConfig(geometry.num_experts), segment=segment, process=process)
            affinity, _ = shared.snapshot()
        self._policy.seed_affinity(affinity.astype(np.float64))
        self.learned = LearnedKeeper(model or Path(), self._policy, enabled=model is not None)

    def learn(self) -> None:
        """Takes in what the workers have wanted since the last call, in the order in which they wanted it."""
        rings: list[Records] = []
        for records, lost in self._demands.read():
            if lost:
                self._policy.forget_streams()
            rings.append(records.copy())
        if len(rings) > 1:
            rings = list(heapq.merge(*map(split_records, rings), key=stamp_of))
        for records in rings:
            self._policy.observe(records)

    def order(
        self,
        experts: npt.NDArray[np.int64],
        newcomer: int | None = None,
        among: npt.NDArray[np.bool_] | None = None,
    ) -> Iterator[int]:
        """Indices into `experts`, which are resident (or -1: none); the first victim first. `newcomer` is who needs the
        slot, and will be one of its layer's. `among`: which of them have a slot that it fits."""
        self.learn()
        given = 0
        for most in (MOSTLY_ENOUGH, len(experts)):
            order, unprotected = self._policy.victims(experts, among, newcomer, most)
            self._ordered, self._protected = experts, order[unprotected:]
            yield from order[given:]
            if len(order) < most:
                return
            given = len(order)

    def yields(self, victim: int) -> bool:
        """Whether a resident expert, of those last ordered, is worth less than one that its layer's next step uses with
        a probability of LEAST_PRECISION, as prefetches are.

        The values of "affinity" and "td" are such probabilities. Those of the others only say which goes first.
        """
        if victim in self._ordered[self._protected]:
            return False
        if not self._has_probabilities:
            return True
        self._policy.values(self._values)
        return bool(self._values.ravel()[victim] < LEAST_PRECISION)
