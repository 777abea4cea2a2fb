"""Scores, frequencies and their orders; the arithmetic of the slots is tested in tests/shm/routing."""

from __future__ import annotations

import pytest

from hotset.runtime import AffinityConfig, ExpertAffinity


@pytest.fixture
def affinity() -> ExpertAffinity:
    """Activated three times: 5; twice: 2, lately; twice: 1, earlier; once: 7."""
    made = ExpertAffinity(AffinityConfig(8, 0.5, 0.5, 1.0))
    for ids in ([1, 5], [1, 5], [2, 5], [2], [7]):
        made.update(ids)
    return made


def test_each_update_decays_all_and_boosts_the_activated(affinity: ExpertAffinity) -> None:
    assert affinity.score(7) == pytest.approx(0.5, abs=1e-6)
    assert affinity.score(2) == pytest.approx(0.375, abs=1e-6)
    assert affinity.score(5) == pytest.approx(0.875 / 4, abs=1e-6)
    assert affinity.scores().tolist() == pytest.approx([0, 0.75 / 8, 0.375, 0, 0, 0.875 / 4, 0, 0.5], abs=1e-6)


def test_scores_are_capped(affinity: ExpertAffinity) -> None:
    strong = ExpertAffinity(AffinityConfig(2, 0.99, 1.0, 1.0))
    for _ in range(5):
        strong.update([1])
    assert strong.scores().tolist() == [0.0, 1.0]


def test_counts(affinity: ExpertAffinity) -> None:
    assert affinity.activation_counts().tolist() == [0, 2, 2, 0, 0, 3, 0, 1]
    assert affinity.activation_count(5) == 3


def test_out_of_range_is_nothing_when_read(affinity: ExpertAffinity) -> None:
    assert (affinity.score(8), affinity.activation_count(-1), affinity.frequency_percentile(8)) == (0.0, 0, 0.0)


def test_orders_break_ties_by_the_lowest_id(affinity: ExpertAffinity) -> None:
    assert affinity.top_k_by_affinity(5) == [7, 2, 5, 1, 0]
    assert affinity.top_k_by_frequency(6) == [5, 1, 2, 7, 0, 3]
    assert affinity.top_k_by_affinity(0) == []
    assert len(affinity.top_k_by_affinity(100)) == 8


def test_the_least_affinity_of_candidates(affinity: ExpertAffinity) -> None:
    assert affinity.least_affinity([7, 5, 2]) == 5
    assert affinity.least_affinity([6, 4]) == 4
    assert affinity.least_affinity([]) is None


def test_equal_scores_go_by_the_older_activation() -> None:
    faded = ExpertAffinity(AffinityConfig(4, 0.0, 1.0, 1.0))
    for expert in (2, 1, 0):
        faded.update([expert])
    faded.update([3])  # the others are at 0 now, of different age
    assert faded.least_affinity([0, 1, 2]) == 2


def test_percentiles_are_mid_ranks(affinity: ExpertAffinity) -> None:
    assert affinity.frequency_percentile(5) == 7.5 / 8
    assert affinity.frequency_percentile(1) == affinity.frequency_percentile(2) == 6 / 8
    assert affinity.frequency_percentile(0) == 2 / 8
    assert ExpertAffinity(AffinityConfig(4)).frequency_percentile(2) == 0.5


def test_reset_forgets_scores_and_counts(affinity: ExpertAffinity) -> None:
    affinity.reset()
    assert affinity.scores().max() == 0
    assert affinity.activation_counts().max() == 0
    affinity.update([3])
    assert affinity.top_k_by_affinity(1) == [3]
    assert affinity.activation_count(3) == 1


def test_an_expert_named_twice_is_activated_twice() -> None:
    affinity = ExpertAffinity(AffinityConfig(4, 0.5, 0.25, 1.0))
    affinity.update([1, 1])
    assert (affinity.score(1), affinity.activation_count(1)) == (pytest.approx(0.5, abs=1e-6), 2)


def test_a_snapshot_has_all_layers() -> None:
    affinity = ExpertAffinity(AffinityConfig(4), num_layers=3)
    affinity.update([1], layer=2)
    affinity.update([2], layer=2)
    scores, epochs = affinity.snapshot()
    assert scores.shape == epochs.shape == (3, 4)
    assert epochs[2].tolist() == [0, 1, 2, 0]
    assert scores[2, 1] < scores[2, 2] and scores[:2].max() == 0
