"""Section B of the acceptance cases: forks and copy-on-write, counted, without rows and with pages of every format.
The bytes are in test_page_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfPages
from hotset.runtime.kv.page_memory import KvPageMemory
from hotset.shm.kv_page_format import KvFormat, KvPageLayout

NewCache = Callable[[int], PagedKvCache]


@pytest.fixture(params=[None, *KvFormat], ids=lambda format: f"B9-{format.value}" if format else "without rows")
def new_cache(request: pytest.FixtureRequest) -> NewCache:
    """Caches of so many pages of 16 tokens."""

    def without_rows(num_pages: int) -> PagedKvCache:
        return PagedKvCache(num_pages, 16)

    def with_rows(num_pages: int) -> PagedKvCache:
        layout = KvPageLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=32, format=request.param)
        return PagedKvCache(num_pages, 16, memory=KvPageMemory(layout, num_pages))

    return with_rows if request.param else without_rows


def test_B1_forks_share_and_count(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    children = [cache.fork(parent), cache.fork(parent)]
    children.append(cache.fork(children[0]))
    assert cache.stats().active_sequences == 4
    assert cache.num_used_pages == 1
    assert cache.references(1) == 4
    assert cache.stats().copy_on_write_copies == 0
    cache.free(parent)
    assert cache.num_used_pages == 1
    for child in children:
        cache.free(child)
    assert cache.num_free_pages == 10


def test_B2_the_first_write_copies_and_the_second_does_not(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    child = cache.fork(parent)
    page = cache.writable_page(child, 0)
    assert page != cache.page_for(parent, 0)
    assert cache.references(1) == 1
    assert cache.writable_page(child, 0) == page
    assert cache.stats().copy_on_write_copies == 1


def test_B3_a_write_copies_one_page_of_a_long_parent(new_cache: NewCache) -> None:
    cache = new_cache(300)
    parent = cache.allocate(4096)
    child = cache.fork(parent)
    cache.writable_page(child, 4095)
    shared = set(cache.block_table(parent)) & set(cache.block_table(child))
    assert len(shared) == 255
    assert cache.num_used_pages == 257
    assert cache.stats().copy_on_write_copies == 1


def test_B4_a_copy_without_a_page_fails_and_keeps_both(new_cache: NewCache) -> None:
    cache = new_cache(2)
    parent = cache.allocate(8)
    child = cache.fork(parent)
    cache.allocate(16)
    for write in (lambda: cache.writable_page(child, 0), lambda: cache.append(child)):
        with pytest.raises(OutOfPages) as refused:
            write()
        assert (refused.value.needed, refused.value.available) == (1, 0)
    assert cache.references(1) == 2
    assert cache.block_table(child) == cache.block_table(parent) == [1]
    assert cache.length(child) == 8
    cache.check()


def test_B5_a_child_grows_alone(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    child = cache.fork(parent)
    for _ in range(4):
        cache.append(child)
    assert (cache.length(parent), cache.length(child)) == (8, 12)


def test_B6_parent_and_child_write_the_next_token_to_different_pages(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    child = cache.fork(parent)
    assert cache.writable_page(parent, 8) != cache.writable_page(child, 8)
    assert cache.stats().copy_on_write_copies == 1


def test_B7_a_full_page_stays_shared(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(16)
    child = cache.fork(parent)
    cache.append(child)
    assert cache.block_table(parent) == [1]
    assert cache.block_table(child) == [1, 2]
    assert cache.references(1) == 2
    assert cache.stats().copy_on_write_copies == 0


def test_B8_the_last_owner_writes_in_place(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    first, second = cache.fork(parent), cache.fork(parent)
    cache.free(parent)
    cache.append(first)
    cache.append(second)
    assert cache.stats().copy_on_write_copies == 1
    assert cache.block_table(second) == [1]
    cache.check()


def test_a_fork_leaves_the_spare_pages_with_the_parent(new_cache: NewCache) -> None:
    cache = new_cache(10)
    parent = cache.allocate(8)
    cache.extend(parent, 32)
    assert cache.block_table(cache.fork(parent)) == [1]
    cache.check()
