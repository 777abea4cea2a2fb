"""Section C of the acceptance cases: prompts that share published pages, stand-alone.

"Admit" there means: share the hit, take pages for the rest, publish the full pages. `admit` below does all
of it.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import pytest

from hotset.runtime.kv import events
from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfPages
from hotset.runtime.kv.events import CacheCleared, PagesRemoved, PagesStored, page_keys
from hotset.runtime.kv.prefix_cache import pack_tokens
from hotset.runtime.kv.shared_prompts import Admission
from hotset.runtime.kv.statistics import HitRateWindow

C = [0] * 16 + [1] * 16 + [2] * 16  # three full pages


def admit(cache: PagedKvCache, tokens: Sequence[int], salt: Hashable = ()) -> Admission:
    admission = cache.admit(tokens, salt=salt)
    cache.commit(admission.sequence, len(tokens))
    cache.check()
    return admission


def admit_and_free(cache: PagedKvCache, tokens: Sequence[int], salt: Hashable = ()) -> None:
    cache.free(admit(cache, tokens, salt).sequence)


def reuse_order(cache: PagedKvCache) -> list[int]:
    """The order in which the available pages would be handed out. Uses them up."""
    return cache.block_table(cache.allocate(cache.num_free_pages * cache.block_size))


def two_tails() -> tuple[PagedKvCache, int, int]:
    """C1 and C2: two prompts that share the three pages of C."""
    cache = PagedKvCache(10, 16)
    return cache, admit(cache, C + [3] * 7).sequence, admit(cache, C + [3] * 5).sequence


def test_C1_full_pages_are_published() -> None:
    cache = PagedKvCache(10, 16)
    sequence, hit = admit(cache, C + [3] * 7)
    assert hit == 0
    assert cache.block_table(sequence) == [1, 2, 3, 4]
    assert cache.match_pages(C + [3] * 16) == [1, 2, 3]


def test_C2_a_second_prompt_shares_the_common_pages() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C + [3] * 7)
    sequence, hit = admit(cache, C + [3] * 5)
    assert hit == 48
    assert cache.block_table(sequence) == [1, 2, 3, 5]
    assert [cache.references(page) for page in (1, 2, 3)] == [2, 2, 2]
    assert cache.num_free_pages == 5


def test_C3_unpublished_pages_are_reused_first_and_tails_before_heads() -> None:
    cache, first, second = two_tails()
    cache.free(first)
    cache.free(second)
    assert cache.num_free_pages == 10
    assert reuse_order(cache) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]


def test_C3_idle_pages_are_found_again() -> None:
    cache, first, second = two_tails()
    cache.free(first)
    cache.free(second)
    sequence, hit = admit(cache, C + [3] * 6)
    assert hit == 48
    assert cache.block_table(sequence) == [1, 2, 3, 5]
    assert cache.num_free_pages == 6


def test_C4_a_prompt_that_needs_everything_evicts_everything() -> None:
    cache, first, second = two_tails()
    cache.free(first)
    cache.free(second)
    admit_and_free(cache, C + [3] * 6)
    sequence, hit = admit(cache, [99] * 160)
    assert hit == 0
    assert cache.block_table(sequence) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]
    assert cache.match(C) == 0


def test_C5_the_last_token_is_always_computed() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C)
    assert admit(cache, C).hit_tokens == 32
    assert admit(cache, [*C, 9]).hit_tokens == 48


def test_C6_generated_tokens_are_reusable() -> None:
    cache = PagedKvCache(10, 16)
    prompt = C + [3] * 7
    sequence = admit(cache, prompt).sequence
    query = prompt + [8] * 4 + [7] * 5 + [1]
    for token in [8] * 4:
        cache.append(sequence, token)
    assert len(cache.block_table(sequence)) == 4
    for count, token in enumerate([7] * 19, start=1):
        cache.append(sequence, token)
        assert cache.match(query) == (64 if count >= 5 else 48)
    assert len(cache.block_table(sequence)) == 5
    cache.free(sequence)
    assert admit(cache, query).hit_tokens == 64


def two_freed_in_turn(frees: int) -> PagedKvCache:
    cache = PagedKvCache(10, 16)
    sequences = [admit(cache, range(87)).sequence, admit(cache, range(87, 135)).sequence]
    for sequence in sequences[:frees]:
        cache.free(sequence)
    return cache


def test_C7_the_order_of_reuse_follows_the_order_of_freeing() -> None:
    assert reuse_order(two_freed_in_turn(1)) == [6, 10, 5, 4, 3, 2, 1]
    assert reuse_order(two_freed_in_turn(2)) == [6, 10, 5, 4, 3, 2, 1, 9, 8, 7]
    cache = two_freed_in_turn(2)
    sequence, hit = admit(cache, range(35))
    assert hit == 32
    assert cache.block_table(sequence) == [1, 2, 6]
    assert cache.num_free_pages == 7


def test_C8_a_hit_is_not_evicted_for_its_own_prompt() -> None:
    cache = PagedKvCache(2, 16)
    admit_and_free(cache, range(16))
    admit_and_free(cache, range(16, 32))
    sequence, hit = admit(cache, range(32))
    assert hit == 16
    assert cache.block_table(sequence) == [1, 2]
    assert cache.match(list(range(16, 32))) == 0


def test_C9_a_refused_admission_changes_nothing() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C)
    admit_and_free(cache, C + C)
    admit(cache, [7] * 32)
    assert cache.match(C + C + C) == 96
    with pytest.raises(OutOfPages) as refused:
        cache.admit(C + C + C)
    assert (refused.value.needed, refused.value.available) == (3, 2)
    assert [cache.references(page) for page in range(1, 7)] == [1, 1, 1, 0, 0, 0]
    assert cache.num_free_pages == 5
    cache.check()


def test_C10_without_sharing_every_hit_is_zero() -> None:
    cache = PagedKvCache(4, 4, enable_prefix_caching=False)
    first, hit = cache.admit(range(10))
    assert (hit, len(cache.block_table(first))) == (0, 3)
    cache.commit(first, 10)
    cache.free(first)
    second, hit = cache.admit(range(16))
    assert (hit, len(cache.block_table(second))) == (0, 4)
    cache.commit(second, 16)
    assert cache.match(range(16)) == 0
    with pytest.raises(OutOfPages):
        cache.admit(range(4))


@pytest.mark.parametrize("salts", [("salt1", "salt2"), (("adapter", "a"), ("adapter", "b"))])
def test_C11_salts_do_not_share(salts: tuple[Hashable, Hashable]) -> None:
    cache = PagedKvCache(20, 16)
    admit(cache, C + [3] * 11, salts[0])
    query = C + [4] * 11
    assert [cache.match(query, salt) for salt in (*salts, ())] == [48, 0, 0]
    admit(cache, C + [3] * 11, salts[1])
    assert cache.match_pages(query, salts[0]) == [1, 2, 3]
    assert cache.match_pages(query, salts[1]) == [5, 6, 7]


@pytest.mark.parametrize(("common", "hit"), [(40, 32), (15, 0), (48, 48)])
def test_C12_hits_are_whole_pages(common: int, hit: int) -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C)
    assert admit(cache, C[:common] + [77] * 20).hit_tokens == hit


def test_C12_a_page_counts_only_behind_its_own_prefix() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C)
    assert cache.match([5] * 16 + C[16:32]) == 0


def test_C13_a_part_of_a_cached_prompt_is_found() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, C)
    assert admit(cache, C[:32] + [9] * 16).hit_tokens == 32


def test_C14_equal_pages_at_different_places_have_different_keys() -> None:
    keys = page_keys(pack_tokens([1, 2, 3, 4] * 8), 64)
    assert len(set(keys)) == 2
    assert page_keys(pack_tokens([1, 2, 3, 4] * 8), 64, salt="tenant") != keys


def test_C15_an_evicted_page_is_not_found_under_its_old_tokens() -> None:
    cache = PagedKvCache(1, 16)
    admit_and_free(cache, range(16))
    admit(cache, [7] * 15)
    assert cache.match([*range(16), 1]) == 0


@pytest.mark.parametrize("freed_first", [0, 1])
def test_C16_two_computations_of_the_same_prompt_survive_each_other(freed_first: int) -> None:
    cache = PagedKvCache(6, 16)
    prompt = [*C, 3]
    with pytest.raises(OutOfPages):
        cache.admit([*prompt, *range(48)])
    admitted = [cache.admit(C) for _ in range(2)]
    assert [hit for _, hit in admitted] == [0, 0]
    assert [cache.block_table(sequence) for sequence, _ in admitted] == [[1, 2, 3], [4, 5, 6]]
    for sequence, _ in admitted:
        cache.commit(sequence, 48)
    cache.check()
    kept = cache.block_table(admitted[1 - freed_first].sequence)
    cache.free(admitted[freed_first].sequence)
    cache.check()
    cache.allocate(48)  # evicts whatever the freed one left
    cache.check()
    assert cache.match_pages([*C[:16], 1]) == kept[:1]
    cache.free(admitted[1 - freed_first].sequence)
    cache.check()
    assert cache.match(C) == 48


def test_C17_prompts_that_collide_under_another_hash_do_not_here() -> None:
    cache = PagedKvCache(10, 16)
    admit(cache, [55893, 107578, 46604, 0] + [0] * 12)
    assert cache.match([1489, 124493, 27086, 801] + [0] * 12 + [1]) == 0


def test_C18_no_false_hit_whatever_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.xxhash, "xxh3_128_digest", lambda _: b"the same for all")
    generate = random.Random(18)
    cached, others = ([[generate.randrange(50_000) for _ in range(64)] for _ in range(1000)] for _ in range(2))
    cache = PagedKvCache(4000, 16, events=True)
    tables = []
    for prompt in cached:
        sequence, hit = cache.admit(prompt)
        cache.commit(sequence, 64)
        assert hit == 0
        tables.append(cache.block_table(sequence))
    assert [cache.match(prompt) for prompt in others] == [0] * 1000
    assert [cache.match_pages(prompt) for prompt in cached] == tables
    assert {key for event in cache.take_events() for key in event.keys} == {b"the same for all"}


def test_C19_lookups_add_nothing() -> None:
    cache = PagedKvCache(20, 1)
    admit_and_free(cache, range(1, 9))
    admit_and_free(cache, [1, 2, 9, 10])
    queries = [[1, 2, 3, 4, 999, 1000], list(range(1, 9)), [1, 2, 3, 4, 5, 6, 777, 888], [1, 2, 9, 10]]
    for query, hit in zip(queries, [4, 8, 6, 4], strict=True):
        assert cache.match(query) == hit
        assert cache.stats().evictable_tokens == 10
        cache.check()


@pytest.mark.parametrize(("length", "stored"), [(5, 4), (6, 4), (4, 4)])
def test_C19_only_whole_pages_are_stored(length: int, stored: int) -> None:
    cache = PagedKvCache(20, 2)
    admit_and_free(cache, range(length))
    assert cache.stats().evictable_tokens == length // 2 * 2
    assert cache.match(range(5)) == stored


def test_C20_pins_protect() -> None:
    cache = PagedKvCache(10, 1)
    admit_and_free(cache, [1, 2, 3])
    pages = cache.match_pages([1, 2, 3])

    def evictable_and_protected() -> tuple[int, int]:
        stats = cache.stats()
        return stats.evictable_tokens, stats.protected_tokens

    assert evictable_and_protected() == (3, 0)
    cache.pin(pages)
    assert evictable_and_protected() == (0, 3)
    cache.check()
    cache.unpin(pages)
    assert evictable_and_protected() == (3, 0)
    cache.check()
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin(pages)


def test_C21_the_cache_is_reset_only_while_unused() -> None:
    cache = PagedKvCache(10, 16, events=True)
    sequence = admit(cache, C).sequence
    assert not cache.reset_prefix_cache()
    assert cache.match(C) == 48
    cache.free(sequence)
    cache.take_events()
    assert cache.reset_prefix_cache()
    assert cache.take_events() == [CacheCleared()]
    assert cache.match(C) == 0
    assert cache.num_free_pages == 10
    cache.check()


def test_C22_the_hit_rate_looks_back_over_a_window_of_requests() -> None:
    window = HitRateWindow(max_requests=5)
    assert window.rate == 0.0
    rates = []
    for update in [(1, 20, 9), (4, 80, 16), (1, 10, 2)]:
        window.update(*update)
        rates.append(window.rate)
    assert rates == [0.45, 0.25, 0.20]
    window.update(0, 100, 0)
    assert window.rate == 0.20


def test_C22_admissions_feed_the_hit_rate_and_lookups_count_misses() -> None:
    cache = PagedKvCache(10, 16, hit_rate_window=2)
    admit(cache, C)
    admit(cache, [*C, 9])
    assert cache.hit_rate == 48 / 97
    misses = cache.stats().prefix_misses
    cache.match([5] * 16)
    assert cache.stats().prefix_misses == misses + 1


def test_C23_events_tell_what_is_stored_and_removed() -> None:
    cache = PagedKvCache(10, 16, events=True)
    sequence = admit(cache, range(48)).sequence
    (stored,) = cache.take_events()
    assert isinstance(stored, PagesStored)
    assert stored.keys == page_keys(pack_tokens(range(48)), 64)
    assert stored.parent is None
    cache.free(sequence)
    admit(cache, range(1000, 1160))
    *removed, stored_again = cache.take_events()
    assert removed == [PagesRemoved([key]) for key in reversed(stored.keys)]
    assert isinstance(stored_again, PagesStored)
    assert len(stored_again.keys) == 10
    assert cache.take_events() == []


def test_C23_a_continuation_names_its_parent() -> None:
    cache = PagedKvCache(10, 16, events=True)
    sequence = admit(cache, range(20)).sequence
    for token in range(20, 32):
        cache.append(sequence, token)
    first, second = cache.take_events()
    assert isinstance(first, PagesStored)
    assert isinstance(second, PagesStored)
    assert second.parent == first.keys[0]
    assert first.keys + second.keys == page_keys(pack_tokens(range(32)), 64)


def test_pages_are_published_only_when_committed() -> None:
    cache = PagedKvCache(10, 16)
    sequence = cache.admit(C).sequence
    assert cache.match(C) == 0
    cache.commit(sequence, 31)
    assert cache.match(C) == 16
    cache.commit(sequence, 48)
    assert cache.match(C) == 48


def test_a_prompt_is_committed_before_it_is_continued() -> None:
    cache = PagedKvCache(10, 16)
    sequence = cache.admit(C).sequence
    with pytest.raises(ValueError, match="committed 0 of the 48 tokens"):
        cache.append(sequence, 1)


def test_tokens_without_ids_are_never_published() -> None:
    cache = PagedKvCache(10, 16)
    sequence = admit(cache, C[:15]).sequence
    cache.append(sequence)
    for token in C[16:33]:
        cache.append(sequence, token)
    assert cache.match(C) == 0
    cache.check()


def test_a_truncated_sequence_does_not_write_into_a_published_page() -> None:
    cache = PagedKvCache(10, 16)
    sequence = admit(cache, C).sequence
    cache.truncate(sequence, 40)
    cache.append(sequence, 5)
    assert cache.block_table(sequence) == [1, 2, 4]
    assert cache.match(C) == 48
    for token in range(7):
        cache.append(sequence, token)
    assert cache.match([*C[:40], 5, *range(7)]) == 48
    cache.check()


def test_forks_publish_their_own_continuations() -> None:
    cache = PagedKvCache(10, 16)
    parent = admit(cache, C[:40]).sequence
    child = cache.fork(parent)
    for sequence, token in ((parent, 5), (child, 6)):
        for _ in range(8):
            cache.append(sequence, token)
    assert cache.match_pages(C[:40] + [5] * 8) == cache.block_table(parent)
    assert cache.match_pages(C[:40] + [6] * 8) == cache.block_table(child)
    assert cache.block_table(parent)[:2] == cache.block_table(child)[:2]
    cache.check()


def test_packed_ids_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match="4 bytes each, got 7 bytes"):
        PagedKvCache(10, 16).admit(b"1234567")
