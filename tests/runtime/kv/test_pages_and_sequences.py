"""Section A of the acceptance cases: pages and sequences, stand-alone."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import ExceedsArena, OutOfBounds, OutOfPages, UnknownSequence


@pytest.fixture
def scattered() -> tuple[PagedKvCache, int]:
    """A cache and a sequence whose block table is [4, 1, 8]."""
    cache = PagedKvCache(10, 16)
    singles = [cache.allocate(16) for _ in range(8)]
    for page in (8, 1, 4):
        cache.free(singles[page - 1])
    return cache, cache.allocate(48)


def test_A1_allocation_takes_whole_pages() -> None:
    cache = PagedKvCache(100, 16)
    sequence = cache.allocate(32)
    assert cache.block_table(sequence) == [1, 2]
    assert cache.num_free_pages == 98
    assert cache.stats().active_sequences == 1


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (250, 16)])
def test_A2_pages_per_token_count(tokens: int, pages: int) -> None:
    cache = PagedKvCache(100, 16)
    sequence = cache.allocate(tokens)
    assert cache.length(sequence) == tokens
    assert cache.num_free_pages == 100 - pages
    cache.free(sequence)
    assert cache.num_free_pages == 100


def test_A3_a_full_arena_refuses_and_recovers() -> None:
    cache = PagedKvCache(5, 16)
    sequences = [cache.allocate(16) for _ in range(5)]
    with pytest.raises(OutOfPages):
        cache.allocate(1)
    assert cache.num_free_pages == 0
    for sequence in sequences:
        cache.free(sequence)
    assert len(cache.block_table(cache.allocate(80))) == 5
    assert cache.num_free_pages == 0


def test_A4_the_refusal_carries_both_numbers_and_changes_nothing() -> None:
    cache = PagedKvCache(2, 16)
    cache.allocate(16)
    with pytest.raises(OutOfPages, match="2 pages are needed and 1 are available") as refused:
        cache.allocate(32)
    assert (refused.value.needed, refused.value.available) == (2, 1)
    assert cache.num_free_pages == 1
    assert cache.stats().active_sequences == 1
    cache.check()


def test_A5_appending_takes_a_page_at_each_boundary() -> None:
    cache = PagedKvCache(100, 16)
    sequence = cache.allocate(0)
    taken_at = []
    for token in range(1, 101):
        before = cache.num_free_pages
        cache.append(sequence)
        if cache.num_free_pages < before:
            taken_at.append(token)
    assert taken_at == [1, 17, 33, 49, 65, 81, 97]
    assert len(cache.block_table(sequence)) == 7
    assert cache.slot(sequence, 99)[1] == 3  # four tokens in the last page


def test_A6_reservations_add_up() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(0)
    added = [cache.extend(sequence, 16) for _ in range(3)]
    assert added == [[1], [2], [3]]
    assert cache.slot(sequence, 47) == (3, 15)
    assert cache.num_free_pages == 5
    for _ in range(48):
        cache.append(sequence)
    assert cache.num_free_pages == 5


def test_A6_a_reservation_counts_from_the_reserved_tokens() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(8)
    assert cache.extend(sequence, 8) == []
    assert cache.extend(sequence, 1) == [2]


def test_A6_a_refused_reservation_changes_nothing() -> None:
    cache = PagedKvCache(2, 16)
    sequence = cache.allocate(16)
    with pytest.raises(OutOfPages) as refused:
        cache.extend(sequence, 17)
    assert (refused.value.needed, refused.value.available) == (2, 1)
    assert cache.extend(sequence, 16) == [2]


def test_A7_truncation_returns_the_pages_behind() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(48)
    assert cache.truncate(sequence, 16) == [2, 3]
    assert (cache.length(sequence), cache.num_free_pages) == (16, 7)
    assert cache.truncate(sequence, 0) == [1]
    assert (cache.length(sequence), cache.num_free_pages) == (0, 8)
    cache.check()


def test_A7_truncation_cannot_lengthen() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(20)
    with pytest.raises(OutOfBounds):
        cache.truncate(sequence, 21)


def test_A8_a_length_beyond_the_pages_is_refused() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(16)
    with pytest.raises(OutOfBounds) as refused:
        cache.commit(sequence, 100)
    assert (refused.value.position, refused.value.allocated) == (100, 16)
    assert cache.length(sequence) == 16


@pytest.mark.parametrize(("position", "slot"), [(0, (4, 0)), (15, (4, 15)), (16, (1, 0)), (47, (8, 15))])
def test_A9_slots_follow_the_block_table(
    scattered: tuple[PagedKvCache, int], position: int, slot: tuple[int, int]
) -> None:
    cache, sequence = scattered
    assert cache.block_table(sequence) == [4, 1, 8]
    assert cache.slot(sequence, position) == slot
    assert cache.page_for(sequence, position) == slot[0]
    assert cache.slot_mapping(sequence, position, position + 1).tolist() == [slot[0] * 16 + slot[1]]


@pytest.mark.parametrize("position", [48, 1000, -1])
def test_A9_positions_without_a_page_are_refused(scattered: tuple[PagedKvCache, int], position: int) -> None:
    cache, sequence = scattered
    for call in (cache.slot, cache.page_for, cache.writable_page):
        with pytest.raises(OutOfBounds, match=f"position {position} of sequence {sequence} .* 48 tokens"):
            call(sequence, position)
    with pytest.raises(OutOfBounds):
        cache.slot_mapping(sequence, position, position + 2)


def test_A9_slot_mapping_of_many_positions(scattered: tuple[PagedKvCache, int]) -> None:
    cache, sequence = scattered
    mapping = cache.slot_mapping(sequence, 0, 48)
    assert mapping.dtype == np.int64
    expected = [page * 16 + offset for page in (4, 1, 8) for offset in range(16)]
    assert mapping.tolist() == expected
    assert cache.slot_mapping(sequence, 48, 48).size == 0


def test_A10_every_call_names_an_unknown_sequence() -> None:
    cache = PagedKvCache(8, 16)
    freed = cache.allocate(16)
    cache.free(freed)
    before = cache.stats()
    for sequence in (freed, 77):
        for call in (
            lambda s: cache.free(s),
            lambda s: cache.fork(s),
            lambda s: cache.append(s),
            lambda s: cache.extend(s, 1),
            lambda s: cache.commit(s, 1),
            lambda s: cache.truncate(s, 0),
            lambda s: cache.slot(s, 0),
            lambda s: cache.slot_mapping(s, 0, 1),
            lambda s: cache.page_for(s, 0),
            lambda s: cache.writable_page(s, 0),
            lambda s: cache.block_table(s),
            lambda s: cache.num_blocks(s),
            lambda s: cache.length(s),
            lambda s: cache.contiguity(s),
        ):
            with pytest.raises(UnknownSequence, match=f"there is no sequence {sequence}"):
                call(sequence)
    assert cache.stats() == before


def test_A11_an_arena_without_pages() -> None:
    cache = PagedKvCache(0, 16)
    assert cache.utilisation == 0.0
    with pytest.raises(ExceedsArena) as refused:
        cache.allocate(1)
    assert (refused.value.needed, refused.value.available) == (1, 0)
    cache.allocate(0)
    assert cache.fragmentation().ratio == 0.0
    assert cache.fragmentation().mean_tokens_per_page == 0.0
    assert cache.stats().active_sequences == 1
    cache.check()


def test_A12_memory_is_counted_to_the_byte() -> None:
    cache = PagedKvCache(100, 16, page_nbytes=2 * 16 * 8 * 64 * 4)
    assert cache.page_nbytes == 65_536
    assert cache.memory_nbytes == 6_553_600
    cache.allocate(16)
    cache.allocate(32)
    assert cache.memory_used_nbytes == 196_608
    cache.allocate(7 * 16)
    assert cache.utilisation == 0.10


def test_generations_count_how_often_a_page_was_handed_out() -> None:
    cache = PagedKvCache(2, 16)
    sequence = cache.allocate(16)
    assert cache.generation(1) == 1
    cache.free(sequence)
    assert cache.generation(1) == 1  # its bytes are still the old ones
    cache.allocate(16)
    assert cache.generation(1) == 2


def test_F6_wasted_capacity_counts_a_shared_page_once() -> None:
    cache = PagedKvCache(8, 16)
    first = cache.allocate(8)
    cache.fork(first)
    cache.fork(first)
    assert cache.fragmentation().wasted_tokens == 8
    other = PagedKvCache(8, 16)
    other.extend(other.allocate(10), 16)
    assert other.fragmentation().wasted_tokens == 22


def test_fragmentation_counts_free_runs_between_used_pages() -> None:
    cache = PagedKvCache(16, 16)
    sequences = [cache.allocate(16) for _ in range(8)]
    for index in (0, 2, 3):
        cache.free(sequences[index])
    figures = cache.fragmentation()
    assert figures.holes == 2
    assert figures.ratio == 2 / 5
    assert figures.largest_free_run == 8
    assert figures.mean_tokens_per_page == 16.0


def test_contiguity_is_the_share_of_neighbouring_pages() -> None:
    cache = PagedKvCache(8, 16)
    first, second = cache.allocate(16), cache.allocate(48)
    cache.extend(first, 16)
    assert cache.contiguity(second) == 1.0
    assert cache.contiguity(first) == 0.0


@pytest.mark.parametrize(("num_pages", "block_size"), [(-1, 16), (4, 0)])
def test_impossible_sizes_are_refused(num_pages: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        PagedKvCache(num_pages, block_size)
