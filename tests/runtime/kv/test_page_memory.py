"""Sections B, E and F of the acceptance cases where they are about bytes: a cache with its own page memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfBounds, OutOfPages
from hotset.runtime.kv.page_memory import KvPageMemory
from hotset.shm.kv_page_format import Floats, KvFormat, KvPageLayout, UnrepresentableValue

HEADS, DIM = 2, 64
UNIT = np.float32(127)  # 127 times a power of two is kept exactly by every format


@pytest.fixture(params=list(KvFormat), ids=lambda format: format.value)
def format(request: pytest.FixtureRequest) -> KvFormat:
    return request.param


def make_cache(format: KvFormat, num_pages: int = 10, block_size: int = 16, num_layers: int = 1) -> PagedKvCache:
    layout = KvPageLayout(num_layers=num_layers, block_size=block_size, num_kv_heads=HEADS, head_dim=DIM, format=format)
    return PagedKvCache(num_pages, block_size, memory=KvPageMemory(layout, num_pages))


def rows(value: float, tokens: int = 1) -> Floats:
    return np.full((tokens, HEADS, DIM), value, np.float32)


def put(cache: PagedKvCache, sequence: int, position: int, value: float, tokens: int = 1) -> None:
    """Writes tokens whose keys are all value * UNIT, and their values the negative of it."""
    cache.write(sequence, position, rows(value * UNIT, tokens), rows(-value * UNIT, tokens))


def key(cache: PagedKvCache, sequence: int, position: int) -> float:
    """What `put` has written for a token."""
    keys, values = cache.read(sequence, position, position + 1)
    assert (keys == keys[0, 0, 0]).all()
    assert (values == -keys).all()
    return float(keys[0, 0, 0] / UNIT)


def page_bytes(cache: PagedKvCache, page: int) -> bytes:
    memory = cache._memory
    assert isinstance(memory, KvPageMemory)
    return memory.bytes[page].tobytes()


def test_B2_a_child_writes_its_own_copy(format: KvFormat) -> None:
    cache = make_cache(format)
    parent = cache.allocate(8)
    put(cache, parent, 0, 128.0)
    before = page_bytes(cache, 1)
    child = cache.fork(parent)
    put(cache, child, 0, 512.0)
    assert (key(cache, parent, 0), key(cache, child, 0)) == (128.0, 512.0)
    assert cache.stats().copy_on_write_copies == 1
    assert cache.references(1) == 1
    put(cache, child, 1, 64.0)
    assert cache.stats().copy_on_write_copies == 1
    assert page_bytes(cache, 1) == before


def test_B2_the_values_of_the_case_in_float32() -> None:
    cache = make_cache(KvFormat.FLOAT32)
    parent = cache.allocate(8)
    cache.write(parent, 0, rows(123.0), rows(0.0))
    child = cache.fork(parent)
    cache.write(child, 0, rows(789.0), rows(0.0))
    assert [cache.read(sequence, 0, 1)[0, 0, 0, 0] for sequence in (parent, child)] == [123.0, 789.0]


def test_B3_one_page_of_a_long_parent_is_copied(format: KvFormat) -> None:
    cache = make_cache(format, num_pages=40)
    parent = cache.allocate(512)
    put(cache, parent, 0, 4.0, 512)
    child = cache.fork(parent)
    put(cache, child, 511, 8.0)
    assert cache.num_used_pages == 33
    assert (key(cache, parent, 511), key(cache, child, 511), key(cache, child, 510)) == (4.0, 8.0, 4.0)


def test_B4_a_write_without_a_page_for_the_copy_changes_nothing(format: KvFormat) -> None:
    cache = make_cache(format, num_pages=2)
    parent = cache.allocate(8)
    put(cache, parent, 0, 2.0, 8)
    child = cache.fork(parent)
    cache.allocate(16)
    before = page_bytes(cache, 1)
    with pytest.raises(OutOfPages):
        put(cache, child, 0, 4.0)
    assert cache.references(1) == 2
    assert page_bytes(cache, 1) == before
    assert key(cache, parent, 0) == key(cache, child, 0) == 2.0


def test_B4_a_write_over_several_shared_pages_is_all_or_nothing() -> None:
    cache = make_cache(KvFormat.FLOAT32, num_pages=3)
    parent = cache.allocate(32)
    child = cache.fork(parent)
    with pytest.raises(OutOfPages) as refused:
        put(cache, child, 10, 4.0, 10)
    assert (refused.value.needed, refused.value.available) == (2, 1)
    assert cache.block_table(child) == [1, 2]
    assert cache.stats().copy_on_write_copies == 0


def test_B2_a_published_page_is_copied_once_and_keeps_its_bytes() -> None:
    cache = make_cache(KvFormat.FLOAT32)
    sequence = cache.admit(range(32)).sequence
    put(cache, sequence, 0, 2.0, 32)
    cache.commit(sequence, 32)
    before = page_bytes(cache, 1)
    for value in (4.0, 8.0):
        put(cache, sequence, 3, value)
    assert cache.stats().copy_on_write_copies == 1
    assert key(cache, sequence, 3) == 8.0
    assert cache.match_pages(range(32)) == [1, 2]
    assert page_bytes(cache, 1) == before
    cache.check()


def test_B8_the_last_owner_writes_in_place_and_all_keep_their_own(format: KvFormat) -> None:
    cache = make_cache(format)
    parent = cache.allocate(8)
    put(cache, parent, 0, 2.0, 8)
    children = [cache.fork(parent), cache.fork(parent)]
    cache.free(parent)
    for value, child in zip((4.0, 8.0), children, strict=True):
        cache.append(child)
        put(cache, child, 8, value)
    assert cache.stats().copy_on_write_copies == 1
    assert [key(cache, child, 8) for child in children] == [4.0, 8.0]
    assert [key(cache, child, 7) for child in children] == [2.0, 2.0]


def test_B9_sequences_that_are_left_alone_keep_their_bytes(format: KvFormat) -> None:
    cache = make_cache(format)
    generate = np.random.default_rng(1)
    parent = cache.allocate(24)
    cache.write(parent, 0, *generate.standard_normal((2, 24, HEADS, DIM), np.float32))
    kept, first = cache.fork(parent), cache.fork(parent)
    second = cache.fork(first)
    before = cache.read(kept, 0, 24).tobytes()
    put(cache, first, 3, 4.0)  # in a full page
    put(cache, second, 20, 8.0, 4)  # in the tail page
    for sequence in (parent, first):
        cache.append(sequence)
        put(cache, sequence, 24, 16.0)
    assert cache.stats().copy_on_write_copies == 4
    assert cache.read(kept, 0, 24).tobytes() == cache.read(parent, 0, 24).tobytes() == before
    cache.free(parent)
    assert cache.read(kept, 0, 24).tobytes() == before


def test_rows_of_layers_do_not_mix(format: KvFormat) -> None:
    cache = make_cache(format, num_layers=3)
    sequence = cache.allocate(20)
    for layer in range(3):
        cache.write(sequence, 10, rows(UNIT * 2**layer, 8), rows(-UNIT * 2**layer, 8), layer=layer)
    for layer in range(3):
        keys, values = cache.read(sequence, 10, 18, layer=layer)
        assert (keys == UNIT * 2**layer).all()
        assert (values == -UNIT * 2**layer).all()


def test_E6_a_large_token_does_not_disturb_its_neighbour() -> None:
    cache = make_cache(KvFormat.Q8_0)
    sequence = cache.allocate(2)
    cache.write(sequence, 0, np.concatenate([rows(1000.0), rows(1.0)]), rows(0.0, 2))
    assert cache.read(sequence, 1, 2)[0] == pytest.approx(1.0, abs=0.005)


def test_E7_rewriting_a_token_leaves_its_neighbour_alone(format: KvFormat) -> None:
    cache = make_cache(format)
    sequence = cache.allocate(2)
    put(cache, sequence, 1, 0.3)
    before = cache.read(sequence, 1, 2).tobytes()
    for step in range(200):
        put(cache, sequence, 0, 0.5 + step)
    assert cache.read(sequence, 1, 2).tobytes() == before


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_E8_a_refused_write_changes_nothing(format: KvFormat, value: float) -> None:
    cache = make_cache(format)
    sequence = cache.allocate(8)
    put(cache, sequence, 0, 2.0, 8)
    child = cache.fork(sequence)
    before = page_bytes(cache, 1)
    bad = rows(1.0, 3)
    bad[2, 1, 40] = value
    with pytest.raises(UnrepresentableValue) as refused:
        cache.write(child, 2, rows(1.0, 3), bad)
    assert refused.value.position == (1, 2, 1, 40)
    assert page_bytes(cache, 1) == before
    assert cache.block_table(child) == [1]


@pytest.mark.parametrize(("position", "first_outside"), [(6, 9), (20, 20), (8, 8), (-1, -1)])
def test_E9_writes_outside_the_pages_are_refused(position: int, first_outside: int) -> None:
    cache = make_cache(KvFormat.FLOAT32, block_size=8)
    sequence = cache.allocate(8)
    put(cache, sequence, 0, 2.0, 8)
    before = page_bytes(cache, 1)
    with pytest.raises(OutOfBounds) as refused:
        put(cache, sequence, position, 4.0, 4)
    assert (refused.value.position, refused.value.allocated) == (first_outside, 8)
    assert page_bytes(cache, 1) == before


def test_E9_reads_end_where_the_sequence_ends(format: KvFormat) -> None:
    cache = make_cache(format)
    sequence = cache.allocate(5)
    for start, stop in [(5, 6), (0, 6), (20, 21), (-1, 2)]:
        with pytest.raises(OutOfBounds):
            cache.read(sequence, start, stop)
    assert cache.read(sequence, 5, 5).shape == (2, 0, HEADS, DIM)


def test_E9_an_earlier_owners_rows_are_never_read(format: KvFormat) -> None:
    cache = make_cache(format, num_pages=2)
    first = cache.allocate(32)
    put(cache, first, 0, 77.0, 32)
    cache.free(first)
    second = cache.allocate(32)
    assert not cache.read(second, 0, 32).any()


def test_rows_of_another_shape_are_refused() -> None:
    cache = make_cache(KvFormat.FLOAT32)
    sequence = cache.allocate(8)
    with pytest.raises(ValueError, match=r"have the shape \(1, 3, 64\), expected \(tokens, \(2, 64\)\)"):
        cache.write(sequence, 0, np.zeros((1, 3, 64)), np.zeros((1, 3, 64)))


def test_a_cache_without_memory_says_so() -> None:
    cache = PagedKvCache(2, 16)
    with pytest.raises(TypeError, match="no page memory"):
        cache.read(cache.allocate(1), 0, 1)


def test_F1_compaction_moves_the_bytes(format: KvFormat) -> None:
    cache = make_cache(format, num_pages=16)
    sequences = [cache.allocate(16) for _ in range(8)]
    for index, sequence in enumerate(sequences):
        put(cache, sequence, 0, 2.0**index, 16)
    for sequence in sequences[::2]:
        cache.free(sequence)
    assert len(cache.defragment()) == 2
    assert [key(cache, sequence, 15) for sequence in sequences[1::2]] == [2.0, 8.0, 32.0, 128.0]


def test_F3_a_moved_shared_page_is_read_by_both(format: KvFormat) -> None:
    cache = make_cache(format)
    gap, parent = cache.allocate(16), cache.allocate(16)
    put(cache, parent, 0, 32.0, 16)
    child = cache.fork(parent)
    cache.free(gap)
    cache.defragment()
    assert cache.block_table(parent) == cache.block_table(child) == [1]
    assert key(cache, parent, 3) == key(cache, child, 3) == 32.0


def test_F4_a_moved_idle_page_has_its_bytes_when_it_is_hit(format: KvFormat) -> None:
    cache = make_cache(format)
    gap = cache.allocate(16)
    sequence = cache.admit(range(16)).sequence
    put(cache, sequence, 0, 64.0, 16)
    cache.commit(sequence, 16)
    before = page_bytes(cache, 2)
    cache.free(sequence)
    cache.free(gap)
    assert cache.defragment() == {2: 1}
    assert page_bytes(cache, 1) == before
    again, hit = cache.admit(range(17))
    assert hit == 16
    assert key(cache, again, 15) == 64.0


def test_a_layout_without_values_is_refused() -> None:
    layout = KvPageLayout(num_layers=1, block_size=4, num_kv_heads=1, head_dim=8, keys_are_values=True)
    with pytest.raises(ValueError, match="stores no values"):
        KvPageMemory(layout, 2)


@pytest.mark.parametrize(
    ("num_pages", "block_size", "message"),
    [
        (9, 16, "num_pages is 9 and the memory has 8 pages, expected at most as many"),
        (8, 32, "block_size is 32 and the pages of the memory hold 16 tokens, expected the same"),
    ],
)
def test_a_memory_that_does_not_fit_the_cache_is_refused(num_pages: int, block_size: int, message: str) -> None:
    """And not met by the first write beyond it."""
    layout = KvPageLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=8)
    with pytest.raises(ValueError, match=message):
        PagedKvCache(num_pages, block_size, memory=KvPageMemory(layout, 8))


def test_a_memory_of_fewer_than_no_pages_is_refused() -> None:
    layout = KvPageLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=8)
    with pytest.raises(ValueError, match="num_pages is -5, expected an integer of at least 0"):
        KvPageMemory(layout, -5)


def test_a_layout_is_told_from_what_is_none() -> None:
    layout: Any = "layout"
    with pytest.raises(ValueError, match=r"layout is 'layout', expected one of class KvPageLayout"):
        KvPageMemory(layout, 4)


def test_rows_of_another_shape_or_kind_are_one_sentence_and_nothing_is_stored() -> None:
    memory: Any = KvPageMemory(KvPageLayout(num_layers=2, block_size=4, num_kv_heads=HEADS, head_dim=DIM), 3)
    good = memory.encode_rows(rows(1.0, 2), rows(2.0, 2))
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: memory.write_rows(1, 0, 0, good[:1]), r"rows is uint8 \(1, 2, 2, 256\), expected uint8 \(2, tokens"),
        (lambda: memory.write_rows(1, 0, 0, good[0]), r"rows is uint8 \(2, 2, 256\), expected uint8"),
        (lambda: memory.write_rows(1, 0, 0, good.astype(np.float32)), "rows is float32 .*, expected uint8"),
        (lambda: memory.write_rows(1, 0, 0, [1]), r"rows is \[1\], expected uint8"),
        (lambda: memory.write_rows(1, 3, 0, good), "2 tokens from offset 3 do not fit a page of 4"),
        (lambda: memory.write_rows(1, -1, 0, good), "offset is -1, expected an integer of at least 0"),
        (lambda: memory.write_rows(4, 0, 0, good), "page is 4, expected an integer from 0 to 3"),
        (lambda: memory.write_rows(-1, 0, 0, good), "page is -1, expected"),
        (lambda: memory.write_rows(1, 0, 2, good), "layer is 2, expected an integer from 0 to 1"),
        (lambda: memory.read_rows([1], [4], 0), "offsets are from 4 to 4, expected 0 <= number < 4"),
        (lambda: memory.read_rows([9], [0], 0), "pages are from 9 to 9, expected 0 <= number < 4"),
        (lambda: memory.read_rows([1, 2], [0], 0), "pages are 2 and offsets 1, expected one offset"),
        (lambda: memory.read_rows(np.zeros(1), np.zeros(1), 0), r"pages is float64 \(1,\), expected integers"),
        (lambda: memory.copy_page(1, 7), "page is 7, expected"),
        (lambda: memory.clear_pages([1, "x"]), "one of pages is 'x', expected an integer"),
    ]
    for call, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert not memory.bytes.any()
    memory.write_rows(1, 2, 1, good)
    kept = memory.read_rows(np.array([1, 1]), np.array([2, 3]), 1)
    assert (kept[0] == 1).all() and (kept[1] == 2).all()
    assert memory.read_rows(np.array([], int), np.array([], int), 0).shape == (2, 0, HEADS, DIM)
