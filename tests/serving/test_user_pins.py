"""Experts that the user pins are loaded and stay, whatever is evicted and whoever is killed."""

from __future__ import annotations

import os
import signal

import pytest
from instances import PROMPTS, wait_until

from hotset.runtime import Backend, BudgetTooSmall, SamplingParams, TooManyPins

PINNED = [(0, 3), (0, 5), (2, 31)]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def small_backend(**settings: object) -> Backend:
    """So few slots that every answer evicts most of what is there."""
    return Backend(workers=1, expert_budget="12%", routing="off", warm_start=False, **settings)


def pin_all(backend: Backend) -> None:
    backend.pin_experts(0, [3, 5])
    backend.pin_experts(2, [31])


def test_pinned_experts_are_loaded_and_never_evicted() -> None:
    with small_backend(user_pins=3) as backend:
        pin_all(backend)
        assert wait_until(lambda: backend.stats().pinned_experts_absent == 0)
        for prompt in PROMPTS:
            backend.generate(prompt, GREEDY)
            stats = backend.stats()
            assert stats.pinned_experts == PINNED and stats.pinned_experts_absent == 0
        assert stats.evictions > 100
        backend.unpin_experts(0, [3, 5, 6])
        assert backend.stats().pinned_experts == [(2, 31)]


def test_pins_outlive_the_pager() -> None:
    with small_backend(user_pins=3) as backend:
        os.kill(backend.pager_pid, signal.SIGKILL)
        pin_all(backend)  # perhaps before its successor is there
        assert wait_until(lambda: backend.stats().pager_restarts == 1)
        assert wait_until(lambda: backend.stats().pinned_experts_absent == 0)
        backend.generate(PROMPTS[0], GREEDY)
        assert backend.stats().pinned_experts == PINNED and backend.stats().pinned_experts_absent == 0


def test_more_pins_than_slots_are_kept_for_are_refused_and_none_is_set() -> None:
    with small_backend(user_pins=2) as backend:
        backend.pin_experts(0, [1])
        with pytest.raises(TooManyPins, match=r"3 experts would be pinned.*user_pins=2"):
            backend.pin_experts(1, [1, 2])
        backend.pin_experts(0, [1, 1])
        assert backend.stats().pinned_experts == [(0, 1)]


def test_page_out_frees_slots_but_not_those_of_pinned_experts() -> None:
    with small_backend(user_pins=1) as backend:
        backend.pin_experts(0, [3])
        assert wait_until(lambda: backend.stats().resident_experts == 1)
        backend.generate(PROMPTS[0], GREEDY)
        refused = [backend.page_out(layer, range(32)) for layer in range(4)]
        assert refused == [[3], [], [], []]
        assert wait_until(lambda: backend.stats().resident_experts == 1)
        assert backend.stats().pinned_experts_absent == 0
        assert backend.page_out(1, [0] * 10_000) == []  # each is named once to the pager


def test_a_budget_must_hold_the_users_pins_too() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        small_backend(user_pins=11)
    assert (caught.value.slots, caught.value.needed) == (15, 4 + 11 + 1)


def test_what_is_no_expert_is_named(backend: Backend) -> None:
    with pytest.raises(ValueError, match="layer is 4, expected one of 4"):
        backend.pin_experts(4, [0])
    with pytest.raises(ValueError, match="expert id is 32, expected 0 <= id < 32"):
        backend.page_out(0, [1, 32])
    with pytest.raises(TooManyPins, match="user_pins=0"):
        backend.pin_experts(0, [1])
