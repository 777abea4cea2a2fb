"""Section D of the acceptance cases: eviction, priorities, sliding windows, preemption."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import ExceedsArena, OutOfBounds, OutOfPages
from hotset.runtime.kv.preemption import RunningSequence, choose_victim


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cache_prompt(
    cache: PagedKvCache, tokens: Sequence[int], priority: int = 10, retention: float | None = None
) -> list[int]:
    """Computes a prompt and frees it; returns its pages."""
    sequence = cache.admit(tokens, priority=priority, retention=retention).sequence
    cache.commit(sequence, len(tokens))
    pages = cache.block_table(sequence)
    cache.free(sequence)
    return pages


def test_D1_eviction_takes_exactly_as_many_pages_as_asked() -> None:
    cache = PagedKvCache(10, 4)
    first, second = list(range(16)), list(range(100, 116))
    first_pages, second_pages = cache_prompt(cache, first), cache_prompt(cache, second)
    assert cache.match(first[:8] + [55] * 8) == 8
    assert cache.evict(1) == [first_pages[3]]
    assert cache.evict(1) == [first_pages[2]]
    cache.check()
    assert cache.evict(4) == second_pages[::-1]
    assert cache.match(first) == 8
    assert cache.stats().evictions == 6
    cache.check()


def test_D1_more_than_is_idle_cannot_be_evicted() -> None:
    cache = PagedKvCache(10, 4)
    cache_prompt(cache, range(16))
    with pytest.raises(OutOfPages) as refused:
        cache.evict(5)
    assert (refused.value.needed, refused.value.available) == (5, 4)
    assert cache.match(range(16)) == 16


def test_D2_pinned_pages_are_not_evicted_and_a_refusal_evicts_nothing() -> None:
    cache = PagedKvCache(4, 16)
    cache.pin(cache_prompt(cache, range(48)))
    cache_prompt(cache, range(100, 116))
    with pytest.raises(OutOfPages) as refused:
        cache.allocate(32)
    assert (refused.value.needed, refused.value.available) == (2, 1)
    assert cache.match(range(100, 116)) == 16
    cache.check()


@pytest.mark.parametrize(("after", "evicted"), [(0.0, "x"), (0.3, "y")])
def test_D3_a_priority_holds_for_its_time(after: float, evicted: str) -> None:
    clock = ManualClock()
    cache = PagedKvCache(2, 16, clock=clock)
    (y,) = cache_prompt(cache, range(16), priority=50, retention=0.2)
    (x,) = cache_prompt(cache, range(100, 116), priority=10)
    clock.now += after
    assert cache.evict(1) == [{"x": x, "y": y}[evicted]]
    cache.check()


def test_D3_a_use_starts_the_time_again() -> None:
    clock = ManualClock()
    cache = PagedKvCache(3, 16, clock=clock)
    (y,) = cache_prompt(cache, range(16), priority=50, retention=0.2)
    (x,) = cache_prompt(cache, range(100, 116))
    clock.now = 0.15
    cache.free(cache.admit(range(17), priority=50, retention=0.2).sequence)
    clock.now = 0.3
    assert cache.evict(1) == [x]
    clock.now = 0.4
    assert cache.evict(1) == [y]
    cache.check()


def test_D3_a_prefix_is_worth_what_its_continuations_are_worth() -> None:
    cache = PagedKvCache(10, 16)
    prefix = cache_prompt(cache, range(16))
    cache_prompt(cache, range(32), priority=80)
    other = cache_prompt(cache, range(100, 116))
    assert cache.evict(1) == other
    assert cache.evict(2)[1] == prefix[0]
    cache.check()


def test_D4_a_sliding_window_gives_pages_back() -> None:
    cache = PagedKvCache(30, 16)
    sequence = cache.admit(range(160)).sequence
    cache.commit(sequence, 160)
    assert len(cache.block_table(sequence)) == 10
    cache.append(sequence, 160)
    first_seen = cache.length(sequence) - 32
    assert cache.release_before(sequence, first_seen) == list(range(1, 9))
    assert cache.block_table(sequence) == [0] * 8 + [9, 10, 11]
    assert cache.num_free_pages == 27
    cache.check()
    assert cache.slot(sequence, 128) == (9, 0)
    for call in (cache.slot, cache.writable_page):
        with pytest.raises(OutOfBounds):
            call(sequence, 127)
    with pytest.raises(OutOfBounds):
        cache.truncate(sequence, 100)
    cache.free(sequence)
    cache.check()
    assert cache.num_free_pages == 30


def test_D4_pages_behind_an_evicted_window_are_not_found_any_more() -> None:
    cache = PagedKvCache(6, 16)
    sequence = cache.admit(range(64)).sequence
    cache.commit(sequence, 64)
    cache.release_before(sequence, 32)
    assert cache.match(range(64)) == 64
    cache.allocate(64)
    cache.check()
    assert cache.match(range(64)) == 0
    assert cache.block_table(sequence)[2:] == [3, 4]
    for token in range(64, 96):
        with pytest.raises(OutOfPages):
            cache.append(sequence, token)
    cache.release_before(sequence, 48)
    for token in range(64, 80):
        cache.append(sequence, token)
    cache.check()


def test_D6_the_later_of_two_equals_is_preempted_and_resumes_by_a_hit() -> None:
    cache = PagedKvCache(8, 16)
    prompts = [list(range(64)), list(range(100, 164))]
    first, second = (cache.admit(prompt).sequence for prompt in prompts)
    for sequence in (first, second):
        cache.commit(sequence, 64)
    with pytest.raises(OutOfPages):
        cache.append(first, 7)
    victim = choose_victim([RunningSequence(first, 0, arrival=1), RunningSequence(second, 0, arrival=2)])
    assert victim is not None
    assert victim.sequence == second
    cache.free(second)
    cache.append(first, 7)
    assert cache.block_table(first) == [1, 2, 3, 4, 8]
    cache.free(first)
    assert cache.admit(prompts[1]).hit_tokens == 48
    cache.check()


def test_D6_the_lowest_priority_is_preempted_first() -> None:
    running = [RunningSequence(1, 5, arrival=3), RunningSequence(2, 1, arrival=1), RunningSequence(3, 9, arrival=2)]
    assert choose_victim(running) == running[1]
    assert choose_victim([]) is None


@pytest.mark.parametrize("call", ["admit", "allocate"])
def test_D7_what_can_never_fit_is_refused_with_both_numbers(call: str) -> None:
    cache = PagedKvCache(8, 16)
    with pytest.raises(ExceedsArena, match="9 pages are needed and the whole arena has 8") as refused:
        cache.admit(range(129)) if call == "admit" else cache.allocate(129)
    assert (refused.value.needed, refused.value.available) == (9, 8)


def test_least_recently_used_goes_first_across_branches() -> None:
    cache = PagedKvCache(20, 4)
    stem = list(range(8))
    left, right = cache_prompt(cache, stem + [20] * 4), cache_prompt(cache, stem + [30] * 4)
    cache.match(stem + [20] * 4)
    assert cache.evict(1) == [right[2]]
    assert cache.evict(3) == left[::-1]
    cache.check()
