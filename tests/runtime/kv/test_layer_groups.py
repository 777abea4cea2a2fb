"""Groups of layers with windows of their own: pages behind a window are given back, and hits obey every group."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfBounds, OutOfPages
from hotset.runtime.kv.layer_groups import LayerGroups, pages_of_sequence
from hotset.runtime.kv.page_memory import KvPageMemory
from hotset.shm.kv_page_format import KvPageLayout

WINDOW = 32
PROMPT = [0] * 16 + [1] * 16 + [2] * 16


@pytest.mark.parametrize(
    ("windows", "groups", "places"),
    [
        ((0, 0, 0), (0,), [(0, 0), (0, 1), (0, 2)]),
        ((8, 8), (8,), [(0, 0), (0, 1)]),
        ((8, 0, 8, 0), (0, 8), [(1, 0), (0, 0), (1, 1), (0, 1)]),
        ((4, 16), (16, 4), [(1, 0), (0, 0)]),
        ((8, 8, 0), (0, 8, 8), [(1, 0), (2, 0), (0, 0)]),
        ((8, 8, 8, 8, 0, 0), (0, 8, 8), [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]),
    ],
)
def test_groups_have_equally_many_layers_and_the_one_that_sees_furthest_is_first(
    windows: tuple[int, ...], groups: tuple[int, ...], places: list[tuple[int, int]]
) -> None:
    result = LayerGroups.of(windows)
    assert result.windows == groups
    assert list(result.places) == places
    assert result.layers_per_group * result.num_groups == len(windows)


@pytest.mark.parametrize("windows", [(), (8, 0), (8, 16), (0, -1)])
def test_the_group_that_sees_furthest_has_to_be_first(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sees furthest"):
        PagedKvCache(10, 16, windows=windows)


def published(cache: PagedKvCache) -> tuple[list[int], list[int]]:
    """The three pages of PROMPT in the group that sees all and in the one with the window, all idle in the end."""
    sequence = cache.admit(PROMPT).sequence
    tables = cache.block_table(sequence, 0), cache.block_table(sequence, 1)
    cache.commit(sequence, 48)
    cache.free(sequence)
    cache.check()
    return tables


def test_D5_a_hit_needs_every_group_s_pages_that_the_next_token_sees() -> None:
    def keep_but(page_of_group: tuple[int, int]) -> PagedKvCache:
        """Evicts one of the six pages."""
        cache = PagedKvCache(6, 16, windows=(0, WINDOW))
        tables = published(cache)
        assert cache.match(PROMPT) == 48
        group, index = page_of_group
        page = tables[group][index]
        kept = [other for table in tables for other in table if other != page]
        cache.pin(kept)
        assert page in cache.evict(1)
        cache.unpin(kept)
        cache.check()
        return cache

    assert keep_but((1, 0)).match(PROMPT) == 48  # before the window
    assert keep_but((0, 0)).match(PROMPT) == 0
    assert keep_but((0, 2)).match(PROMPT) == 32
    assert keep_but((1, 2)).match(PROMPT) == 32
    assert keep_but((1, 1)).match(PROMPT) == 16  # the window at 16 tokens holds the first page alone


def test_D5_a_hit_shares_only_what_the_next_token_sees() -> None:
    cache = PagedKvCache(20, 16, windows=(0, WINDOW))
    full, windowed = published(cache)
    sequence, hit = cache.admit([*PROMPT, 9])
    assert hit == 48
    assert cache.block_table(sequence, 0)[:3] == full
    assert cache.block_table(sequence, 1)[:3] == [0, *windowed[1:]]
    assert cache.references(windowed[0]) == 0
    cache.check()


def test_D4_pages_behind_a_group_s_window_are_given_back_as_the_sequence_grows() -> None:
    cache = PagedKvCache(30, 16, windows=(0, WINDOW))
    sequence = cache.admit(range(160)).sequence
    assert cache.num_used_pages == 20
    cache.commit(sequence, 160)
    cache.append(sequence, 7)
    assert cache.block_table(sequence, 1)[:8] == [0] * 8
    assert cache.num_used_pages == 11 + 3
    assert cache.num_released(sequence, 0) == 0
    assert cache.num_released(sequence, 1) == 8
    with pytest.raises(OutOfBounds):
        cache.slot(sequence, 127, 1)
    cache.check()


def test_with_a_step_a_prompt_takes_pages_of_a_window_only_as_it_is_computed() -> None:
    cache = PagedKvCache(200, 16, windows=(0, WINDOW), max_step=64)
    sequence = cache.admit(range(1600)).sequence
    most = 0
    for written in range(0, 1600, 64):
        assert cache.num_blocks(sequence) * 16 >= min(1600, written + 64)
        most = max(most, cache.num_used_pages)
        cache.commit(sequence, min(1600, written + 64))
        cache.reserve(sequence, 0)
    assert most <= pages_of_sequence((0, WINDOW), 1600, 16, 64) == 100 + 9
    assert cache.num_used_pages == 100 + 2
    with pytest.raises(OutOfBounds):
        cache.commit(sequence, 1601)
    cache.check()


def test_rows_beyond_the_pages_of_a_window_cannot_be_committed() -> None:
    cache = PagedKvCache(200, 16, windows=(0, WINDOW), max_step=64)
    sequence = cache.admit(range(160)).sequence
    with pytest.raises(OutOfBounds, match="outside its 64 tokens"):
        cache.commit(sequence, 65)


def test_a_sequence_that_is_out_of_pages_keeps_what_it_has() -> None:
    cache = PagedKvCache(12, 16, windows=(0, WINDOW))
    sequence = cache.admit(range(80)).sequence
    with pytest.raises(OutOfPages) as refused:
        cache.extend(sequence, 17)
    assert (refused.value.needed, refused.value.available) == (4, 2)
    assert cache.num_used_pages == 10
    cache.check()


def test_a_fork_copies_the_tail_of_every_group_before_either_writes() -> None:
    layout = KvPageLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=8)
    memory = KvPageMemory(layout, 20)
    cache = PagedKvCache(20, 16, windows=(0, WINDOW), memory=memory)
    parent = cache.allocate(40)
    rows = np.ones((40, 1, 8), np.float32)
    for group in range(2):
        cache.write(parent, 0, rows, rows, group=group)
    child = cache.fork(parent)
    cache.append(child)
    assert cache.stats().copy_on_write_copies == 2
    cache.write(child, 40, rows[:1] * 2, rows[:1] * 2, group=1)
    assert cache.read(parent, 32, 40, group=1).tolist() == cache.read(child, 32, 40, group=1).tolist()
    assert cache.block_table(parent, 1)[:2] == cache.block_table(child, 1)[:2]
    assert not {*cache.block_table(parent, 1)[2:]} & {*cache.block_table(child, 1)[2:]}
    cache.check()


def test_what_a_window_has_passed_is_evicted_before_prompts_that_were_used_later() -> None:
    cache = PagedKvCache(40, 16, windows=(0, WINDOW))
    old = cache.admit(range(160)).sequence
    table = cache.block_table(old, 1)
    cache.commit(old, 160)  # its first eight pages are idle now
    published(cache)
    assert cache.evict(3) == table[:3]
    assert cache.match(PROMPT) == 48
    cache.check()


def test_a_prompt_computed_anew_fills_the_gaps_that_eviction_left() -> None:
    cache = PagedKvCache(20, 16, windows=(0, WINDOW))
    _, windowed = published(cache)
    cache.evict(1)
    cache.pin(windowed[2:])
    cache.evict(1)  # the window's second page: nothing but the first 16 tokens can be used
    cache.unpin(windowed[2:])
    sequence, hit = cache.admit([*PROMPT, 9])
    assert hit == 0
    cache.commit(sequence, 49)
    cache.free(sequence)
    assert cache.match(PROMPT) == 48
    cache.check()


def test_bytes_are_counted_in_pages_of_one_group() -> None:
    """A12 for two groups of 12 layers: 16 tokens x 8 heads x 64, keys and values, float32."""
    layout = KvPageLayout(num_layers=12, block_size=16, num_kv_heads=8, head_dim=64)
    cache = PagedKvCache(200, 16, windows=(0, 128), page_nbytes=layout.page_nbytes)
    cache.allocate(1600)
    assert cache.memory_nbytes == 200 * 12 * 65_536
    assert cache.memory_used_nbytes == (100 + 8) * 12 * 65_536
