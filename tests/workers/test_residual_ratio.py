"""How large a residual is taken to be beside what a layer's experts add to it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment
from hotset.workers.moe import MAX_RESIDUAL_RATIO, residual_ratio


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.private(Geometry(num_layers=2, num_experts=4))
    yield segment
    segment.close()


def test_it_is_measured_in_outputs_of_the_layers_own_experts(segment: Segment) -> None:
    segment.arena.note_expert_norm(0, 2.0, 1)
    segment.arena.note_expert_norm(1, 4.0, 1)
    norms = np.array([1, 3], np.float32)
    assert residual_ratio(segment.arena, 0, norms, 1.0).tolist() == [0.5, 1.5]
    assert residual_ratio(segment.arena, 1, norms, 1.0).tolist() == [0.25, 0.75]


def test_outputs_count_as_they_are_added_times_the_weight_scale(segment: Segment) -> None:
    segment.arena.note_expert_norm(0, 2.0, 1)
    assert residual_ratio(segment.arena, 0, np.array([5, 10], np.float32), 2.5).tolist() == [1, 2]
    assert residual_ratio(segment.arena, 0, np.array([5], np.float32), 0.0).tolist() == [MAX_RESIDUAL_RATIO]


def test_it_is_0_before_an_output_was_seen_so_that_routing_is_exact(segment: Segment) -> None:
    assert residual_ratio(segment.arena, 0, np.array([7.0], np.float32), 1.0).tolist() == [0.0]


def test_however_large_a_residual_is_an_expert_that_is_not_in_memory_can_still_be_chosen(segment: Segment) -> None:
    segment.arena.note_expert_norm(0, 1.0, 1)
    ratios = residual_ratio(segment.arena, 0, np.array([1.5, 20, 1e30], np.float32), 1.0)
    assert ratios.tolist() == [1.5, MAX_RESIDUAL_RATIO, MAX_RESIDUAL_RATIO]
