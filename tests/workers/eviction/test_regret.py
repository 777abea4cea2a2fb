"""The regret helper: what it replays is what the workers wrote, in the order in which they wrote it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.shm.demands import DemandReader, demand_of_set
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.segment import Segment
from hotset.workers.eviction.replay import replay
from hotset.workers.regret import DemandWindow

GEOMETRY = Geometry(
    num_layers=2, num_experts=8, num_processes=2, slot_classes=(SlotClass(6, 64),), max_sequences=2, max_model_len=16,
    demand_words=4096,
)  # fmt: skip


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.private(GEOMETRY)
    yield segment
    segment.close()


def test_two_workers_demands_are_replayed_in_the_order_of_time(segment: Segment) -> None:
    reader, window = DemandReader(segment), DemandWindow()
    random = np.random.default_rng(0)
    expected = []
    for number in range(100):
        process, layer = number % 2, number // 2 % 2
        experts = random.choice(8, 3, replace=False).astype(np.int32)
        segment.arena.write_demand(process, layer, experts[np.newaxis], np.array([process], np.int32))
        expected.append(demand_of_set(layer, experts.tolist()))
    assert window.read(reader)
    assert not window.read(reader)
    regret = window.measure(GEOMETRY)
    assert regret is not None
    records = np.concatenate(expected)
    lru, ceiling = (
        replay(records, policy, num_layers=2, num_experts=8, slots=6, shared=True) for policy in ("lru", "min")
    )
    assert (regret.demands, regret.lru_hit_rate, regret.min_hit_rate) == (100, lru.hit_rate, ceiling.hit_rate)
    assert 0 < regret.lru_hit_rate < regret.min_hit_rate
    assert regret.crowd == pytest.approx(3 / (6 / 2))


def test_the_window_slides_and_can_be_emptied(segment: Segment) -> None:
    reader, window = DemandReader(segment), DemandWindow(10)
    for number in range(25):
        segment.arena.write_demand(0, 0, np.array([[number % 8]], np.int32), np.array([0], np.int32))
    window.read(reader)
    regret = window.measure(GEOMETRY)
    assert regret is not None and regret.demands == 10
    window.forget()
    assert window.measure(GEOMETRY) is None


def test_a_prefill_alone_is_nothing_to_regret(segment: Segment) -> None:
    reader, window = DemandReader(segment), DemandWindow()
    segment.arena.write_demand(0, 0, np.array([[1, 2, 3]], np.int32), None)
    window.read(reader)
    assert window.measure(GEOMETRY) is None
