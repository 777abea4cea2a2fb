"""Section F of the acceptance cases: compaction, counted. The bytes are in test_page_memory.py."""

from __future__ import annotations

import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.compaction import plan_moves


def every_second_of_eight() -> tuple[PagedKvCache, list[int]]:
    """Pages 2, 4, 6 and 8 of 16 in use, each by a sequence of its own."""
    cache = PagedKvCache(16, 16)
    sequences = [cache.allocate(16) for _ in range(8)]
    for sequence in sequences[::2]:
        cache.free(sequence)
    return cache, sequences[1::2]


def interleaved(num_pages: int) -> tuple[PagedKvCache, int]:
    """Two sequences that took turns; the second is freed."""
    cache = PagedKvCache(num_pages, 16)
    kept, freed = cache.allocate(0), cache.allocate(0)
    for _ in range(num_pages // 2):
        cache.extend(kept, 16)
        cache.extend(freed, 16)
    cache.free(freed)
    return cache, kept


def test_F1_compaction_moves_only_what_it_must() -> None:
    cache, sequences = every_second_of_eight()
    assert cache.fragmentation().holes == 4
    assert cache.should_defragment()
    moves = cache.defragment()
    assert len(moves) == 2
    assert {page for sequence in sequences for page in cache.block_table(sequence)} == {1, 2, 3, 4}
    figures = cache.fragmentation()
    assert (figures.holes, figures.largest_free_run) == (0, 12)
    assert not cache.should_defragment()
    cache.check()
    assert cache.defragment() == {}
    assert (cache.stats().defragmentations, cache.stats().pages_moved) == (1, 2)


@pytest.mark.parametrize("num_pages", [2048, 8192])
def test_F2_what_is_left_of_interleaved_sequences_becomes_contiguous(num_pages: int) -> None:
    cache, kept = interleaved(num_pages)
    assert cache.contiguity(kept) == 0.0
    cache.defragment()
    assert cache.contiguity(kept) == 1.0
    assert cache.block_table(kept) == list(range(1, num_pages // 2 + 1))
    cache.check()


def test_F3_a_shared_page_moves_for_all_who_name_it() -> None:
    cache = PagedKvCache(8, 16)
    gap, parent = cache.allocate(16), cache.allocate(16)
    child = cache.fork(parent)
    cache.free(gap)
    assert cache.defragment() == {2: 1}
    assert cache.block_table(parent) == cache.block_table(child) == [1]
    assert cache.references(1) == 2
    cache.check()


def test_F4_an_idle_published_page_moves_and_is_still_found() -> None:
    cache = PagedKvCache(8, 16)
    gap = cache.allocate(16)
    sequence = cache.admit(range(48)).sequence
    cache.commit(sequence, 48)
    cache.free(sequence)
    cache.free(gap)
    cache.defragment()
    pages = cache.match_pages(range(48))
    assert sorted(pages) == [1, 2, 3]
    cache.check()
    assert cache.evict(3) == pages[::-1]
    cache.check()


def test_F4_duplicates_keep_their_place_in_line() -> None:
    cache = PagedKvCache(8, 16)
    gap = cache.allocate(16)
    first, second = (cache.admit(range(32)).sequence for _ in range(2))
    for sequence in (first, second):
        cache.commit(sequence, 32)
    cache.free(gap)
    cache.defragment()
    cache.check()
    cache.free(first)
    cache.check()
    assert cache.match_pages(range(32)) == cache.block_table(second)


def test_F5_pinned_pages_stay_and_steps_are_bounded() -> None:
    cache, sequences = every_second_of_eight()
    cache.pin([8])
    steps = 0
    while moves := cache.defragment(max_moves=1):
        assert len(moves) == 1
        cache.check()
        steps += 1
    assert steps == 1
    assert cache.block_table(sequences[3]) == [8]
    assert {page for sequence in sequences[:3] for page in cache.block_table(sequence)} == {1, 2, 4}
    cache.unpin([8])
    assert cache.defragment() == {8: 3}


def test_F5_bounded_steps_end_where_one_call_ends() -> None:
    cache, kept = interleaved(64)
    while cache.defragment(max_moves=3):
        cache.check()
    assert cache.block_table(kept) == list(range(1, 33))


def test_new_pages_come_from_the_front_after_compaction() -> None:
    cache, _ = every_second_of_eight()
    cache.defragment()
    assert cache.block_table(cache.allocate(48)) == [5, 6, 7]


def test_a_moved_page_has_another_generation() -> None:
    cache, _ = every_second_of_eight()
    before = cache.generation(1)
    cache.defragment()
    assert cache.generation(1) == before + 1
    assert cache.stats().pages_allocated == 8


def test_entries_given_back_by_a_window_are_no_page_to_follow() -> None:
    assert plan_moves(4, [1, 2], [], [[0, 0, 3, 4]]) == {3: 1, 4: 2}
