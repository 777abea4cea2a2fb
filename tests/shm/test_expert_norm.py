"""The running mean of the norms of experts' outputs: what seeds it, what moves it, and how far."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment

RATE = 0.01


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.private(Geometry(num_layers=2, num_experts=8))
    yield segment
    segment.close()


def test_nothing_is_known_before_the_first_row_which_seeds_it(segment: Segment) -> None:
    assert segment.arena.expert_norm(1) == 0
    segment.arena.note_expert_norm(1, 3.5, 1)
    assert (segment.arena.expert_norm(0), segment.arena.expert_norm(1)) == (0, 3.5)


def test_rows_at_once_move_it_as_far_as_the_same_rows_one_by_one(segment: Segment) -> None:
    for layer in (0, 1):
        segment.arena.note_expert_norm(layer, 2.0, 1)
    segment.arena.note_expert_norm(0, 4.0, 5)
    for _ in range(5):
        segment.arena.note_expert_norm(1, 4.0, 1)
    expected = 4 - 2 * (1 - RATE) ** 5
    assert segment.arena.expert_norm(0) == pytest.approx(expected, rel=1e-5)
    assert segment.arena.expert_norm(1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_norm_is_left_out(segment: Segment, mean: float) -> None:
    segment.arena.note_expert_norm(0, 2.0, 1)
    segment.arena.note_expert_norm(0, mean, 3)
    assert segment.arena.expert_norm(0) == 2


def test_a_layer_that_is_not_there_is_refused(segment: Segment) -> None:
    with pytest.raises(IndexError, match="layer is 2, expected 0 <= layer < 2"):
        segment.arena.expert_norm(2)
    with pytest.raises(IndexError, match="layer is 2, expected 0 <= layer < 2"):
        segment.arena.note_expert_norm(2, 1.0, 1)
