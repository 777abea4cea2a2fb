"""Counts of an instance since a reset."""

from __future__ import annotations

from hotset.runtime.stats import InstanceCounters
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import PrefetchSource, WeightFormat
from hotset.shm.segment import Segment


def test_what_was_prefetched_before_a_reset_is_no_hit_after_it() -> None:
    """Or more of what was read ahead would be used than was read ahead."""
    segment = Segment.private(
        Geometry(num_layers=1, num_experts=8, num_processes=2, slot_classes=(SlotClass(2, 4096),))
    )
    arena, counters = segment.arena, InstanceCounters(segment)

    def prefetch(slot: int, expert: int) -> None:
        arena.prefetch_begin(slot, expert)
        arena.load_publish(slot, 0, 4096, WeightFormat.FLOAT32, PrefetchSource.GATE_AHEAD)

    prefetch(0, 3)
    counters.reset()
    prefetch(1, 5)
    assert not arena.take_prefetched(3)
    assert arena.take_prefetched(5)
