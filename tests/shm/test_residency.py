"""The residency protocol, one call at a time in one process; tests/race and tests/crash have the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotset.shm import _core
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import PrefetchSource, Section, SlotState
from hotset.shm.segment import Segment

MASKS = (
    Section.RESIDENT_MASK,
    Section.LOADING_MASK,
    Section.FAILED_MASK,
    Section.URGENT_MASK,
    Section.PREFETCH_MASK,
    Section.PREFETCHED_MASK,
)


@pytest.fixture
def arena(private: Segment) -> _core.Arena:
    return private.arena


def mask_ids(segment: Segment, section: Section) -> set[int]:
    experts = segment.layout.geometry.num_experts
    view = segment.view(section)
    return {
        layer * experts + word * 64 + bit
        for layer in range(view.shape[0])
        for word in range(view.shape[1])
        for bit in range(64)
        if int(view[layer, word]) >> bit & 1
    }


def slot_of(segment: Segment) -> dict[int, int]:
    """The directory: slot by expert id."""
    directory = segment.view(Section.DIRECTORY)[:, 0]
    return {int(expert): int(directory[expert]) - 1 for expert in directory.nonzero()[0]}


def set_slot(segment: Segment, slot: int, generation: int, expert: int, state: SlotState) -> None:
    """A slot word as a killed pager may have left it."""
    segment.arena.store_u64(Section.SLOT_WORDS, slot, 0, generation << 32 | expert << 8 | state)


def load(arena: _core.Arena, slot: int, expert: int, *, prefetched: bool = False) -> None:
    arena.load_begin(slot, expert)
    arena.load_publish(slot, 1000 + expert, 100, 1, prefetched)


# ---- one expert's way through a slot ----


def test_an_expert_that_is_nowhere_is_not_found(arena: _core.Arena) -> None:
    assert arena.want(0, 0, 75) == -1
    assert arena.find(75) == -1
    assert arena.resident_experts() == []


def test_a_loading_expert_is_not_found_and_no_longer_asked_for(private: Segment, arena: _core.Arena) -> None:
    arena.request_urgent(75)
    arena.request_prefetch(75)
    arena.request_urgent(76)
    arena.load_begin(4, 75)
    assert arena.slot(4) == (1, 75, SlotState.LOADING)
    assert arena.find(75) == -1
    assert mask_ids(private, Section.LOADING_MASK) == {75}
    assert mask_ids(private, Section.RESIDENT_MASK) == set()
    assert arena.urgent_requests() == [76]
    assert arena.prefetch_requests() == []


def test_a_published_expert_is_found_in_its_slot(private: Segment, arena: _core.Arena) -> None:
    load(arena, 4, 75)
    assert arena.slot(4) == (1, 75, SlotState.RESIDENT)
    assert arena.want(0, 0, 75) == arena.find(75) == 4
    assert arena.resident_experts() == [75]
    assert mask_ids(private, Section.LOADING_MASK) == set()
    info = private.view(Section.SLOT_INFO)[4, 0]
    assert (info["checksum"], info["nbytes"], info["format"], info["source"]) == (1075, 100, 1, PrefetchSource.NONE)


def test_a_slot_names_the_source_that_asked_for_its_expert(private: Segment, arena: _core.Arena) -> None:
    arena.prefetch_begin(4, 75)
    arena.load_publish(4, 1075, 100, 1, PrefetchSource.TRANSITIONS)
    assert private.view(Section.SLOT_INFO)[4, 0]["source"] == PrefetchSource.TRANSITIONS
    assert arena.take_prefetched(75)


def test_evicting_hides_an_expert_and_releasing_empties_its_slot(private: Segment, arena: _core.Arena) -> None:
    load(arena, 4, 75)
    assert arena.evict_begin(4)
    assert arena.slot(4) == (1, 75, SlotState.EVICTING)
    assert arena.find(75) == -1
    assert arena.resident_experts() == []
    arena.slot_release(4)
    assert arena.slot(4) == (2, 0, SlotState.EMPTY)
    assert slot_of(private) == {}


def test_loading_over_an_evicted_expert_forgets_it(private: Segment, arena: _core.Arena) -> None:
    load(arena, 4, 75)
    assert arena.evict_begin(4)
    load(arena, 4, 209)
    assert slot_of(private) == {209: 4}
    assert arena.slot(4) == (2, 209, SlotState.RESIDENT)
    assert arena.find(75) == -1
    assert arena.find(209) == 4


def test_an_evicted_expert_may_come_back_to_its_own_slot(private: Segment, arena: _core.Arena) -> None:
    load(arena, 4, 75)
    assert arena.evict_begin(4)
    load(arena, 4, 75)
    assert arena.find(75) == 4
    assert slot_of(private) == {75: 4}


def test_a_failed_read_frees_the_slot_and_is_remembered(private: Segment, arena: _core.Arena) -> None:
    arena.load_begin(2, 75)
    arena.set_failed(75)
    arena.slot_release(2)
    assert arena.failed(75)
    assert not arena.failed(76)
    assert arena.slot(2) == (2, 0, SlotState.EMPTY)
    assert mask_ids(private, Section.LOADING_MASK) == set()
    load(arena, 2, 75)
    assert not arena.failed(75), "a later attempt succeeded"


def test_generations_count_the_loads_of_a_slot_and_wrap(private: Segment, arena: _core.Arena) -> None:
    set_slot(private, 0, 2**32 - 1, 0, SlotState.EMPTY)
    load(arena, 0, 209)
    assert arena.slot(0) == (0, 209, SlotState.RESIDENT)
    assert arena.find(209) == 0


# ---- pins ----


def test_a_pinned_expert_is_not_evicted(private: Segment, arena: _core.Arena) -> None:
    load(arena, 0, 75, prefetched=True)
    arena.want(2, 3, 75)
    before = bytes(private._mmap)
    assert not arena.evict_begin(0)
    assert bytes(private._mmap) == before, "resident again, with its bit and its prefetched mark"
    arena.unpin(2, 3)
    assert arena.evict_begin(0)


def test_what_the_user_pins_is_not_evicted(private: Segment, arena: _core.Arena) -> None:
    load(arena, 0, 75)
    for expert in (6, 75, 209):
        arena.pin_for_user(expert, True)
    assert arena.user_pins() == [6, 75, 209]
    assert not arena.evict_begin(0)
    arena.pin_for_user(75, False)
    assert arena.user_pins() == [6, 209]
    assert arena.evict_begin(0)


def test_two_pins_on_one_expert_are_two(arena: _core.Arena) -> None:
    arena.want(0, 0, 75)
    arena.want(1, 2, 75)
    arena.unpin(0, 0)
    assert arena.pinned(75)
    arena.unpin(1, 2)
    assert not arena.pinned(75)


def test_a_pin_names_an_expert_even_when_it_is_the_first(arena: _core.Arena) -> None:
    assert not arena.pinned(0), "a free pin is not a pin on expert 0"
    arena.want(0, 0, 0)
    assert arena.pinned(0)


def test_a_pin_that_moves_on_lets_go_of_the_first_expert(arena: _core.Arena) -> None:
    arena.want(0, 0, 75)
    arena.want(0, 0, 76)
    assert not arena.pinned(75)
    assert arena.pinned(76)


def test_a_dead_workers_row_is_cleared_and_nobody_elses(arena: _core.Arena) -> None:
    arena.want(0, 0, 75)
    arena.want(0, 3, 76)
    arena.want(1, 0, 75)
    assert arena.unpin_all(0) == 2
    assert arena.unpin_all(0) == 0
    assert arena.pinned(75)
    assert not arena.pinned(76)


# ---- requests ----


def test_who_sets_the_bit_sends_the_message(arena: _core.Arena) -> None:
    assert not arena.requested(209, True)
    assert arena.request_urgent(209)
    assert not arena.request_urgent(209)
    assert arena.requested(209, True)
    assert not arena.requested(209, False)
    assert arena.request_prefetch(209), "the two kinds are apart"
    assert arena.urgent_requests() == [209] == arena.prefetch_requests()
    arena.withdraw_prefetch(209)
    assert arena.prefetch_requests() == []
    assert arena.urgent_requests() == [209]
    assert arena.request_prefetch(209)
    arena.withdraw_request(209)
    assert arena.urgent_requests() == [] == arena.prefetch_requests()
    assert arena.request_urgent(209)


def test_requests_are_listed_in_ascending_order_without_gaps(arena: _core.Arena) -> None:
    ids = [0, 63, 64, 69, 70, 133, 134, 139, 140, 209]
    for expert in reversed(ids):
        assert arena.request_urgent(expert)
    assert arena.urgent_requests() == ids


# ---- prefetched experts ----


def test_a_prefetched_expert_is_a_hit_for_the_prefetch_once(arena: _core.Arena) -> None:
    load(arena, 0, 75, prefetched=True)
    assert arena.take_prefetched(75)
    assert not arena.take_prefetched(75)


def test_an_expert_that_was_asked_for_is_no_prefetch(arena: _core.Arena) -> None:
    load(arena, 0, 75)
    assert not arena.take_prefetched(75)


def test_a_prefetched_mark_does_not_survive_eviction(arena: _core.Arena) -> None:
    load(arena, 0, 75, prefetched=True)
    assert arena.evict_begin(0)
    load(arena, 0, 75)
    assert not arena.take_prefetched(75)


# ---- states in which a call is refused ----


def bring(arena: _core.Arena, slot: int, state: SlotState) -> None:
    if state != SlotState.EMPTY:
        arena.load_begin(slot, 75)
    if state in (SlotState.RESIDENT, SlotState.EVICTING):
        arena.load_publish(slot, 1, 1, 0, False)
    if state == SlotState.EVICTING:
        assert arena.evict_begin(slot)


@pytest.mark.parametrize(
    ("state", "call", "arguments", "expected"),
    [
        (
            SlotState.LOADING,
            "load_begin",
            (1, 3),
            r"slot 1 is in state 1, expected EMPTY \(0\) or EVICTING \(3\)",
        ),
        (
            SlotState.RESIDENT,
            "load_begin",
            (1, 3),
            r"slot 1 is in state 2, expected EMPTY \(0\) or EVICTING \(3\)",
        ),
        (SlotState.EMPTY, "load_publish", (1, 0, 0, 0, 0), r"slot 1 is in state 0, expected LOADING \(1\)"),
        (
            SlotState.RESIDENT,
            "load_publish",
            (1, 0, 0, 0, 0),
            r"slot 1 is in state 2, expected LOADING \(1\)",
        ),
        (
            SlotState.EVICTING,
            "load_publish",
            (1, 0, 0, 0, 0),
            r"slot 1 is in state 3, expected LOADING \(1\)",
        ),
        (
            SlotState.EMPTY,
            "slot_release",
            (1,),
            r"slot 1 is in state 0, expected LOADING \(1\) or EVICTING \(3\)",
        ),
        (
            SlotState.RESIDENT,
            "slot_release",
            (1,),
            r"slot 1 is in state 2, expected LOADING \(1\) or EVICTING",
        ),
    ],
)
def test_a_wrong_state_is_named_and_nothing_changes(
    private: Segment,
    arena: _core.Arena,
    state: SlotState,
    call: str,
    arguments: tuple[int, ...],
    expected: str,
) -> None:
    bring(arena, 1, state)
    before = bytes(private._mmap)
    with pytest.raises(ValueError, match=expected):
        getattr(arena, call)(*arguments)
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("state", [SlotState.EMPTY, SlotState.LOADING, SlotState.EVICTING])
def test_only_a_resident_slot_is_evicted(private: Segment, arena: _core.Arena, state: SlotState) -> None:
    bring(arena, 1, state)
    before = bytes(private._mmap)
    assert not arena.evict_begin(1)
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("state", [SlotState.LOADING, SlotState.RESIDENT, SlotState.EVICTING])
def test_an_expert_is_never_in_two_slots(private: Segment, arena: _core.Arena, state: SlotState) -> None:
    bring(arena, 1, state)
    before = bytes(private._mmap)
    with pytest.raises(ValueError, match="expert 75 is in slot 1 already"):
        arena.load_begin(2, 75)
    assert bytes(private._mmap) == before


# ---- a pager starts again after a killed one ----


def test_recovery_asks_again_for_what_was_loading(private: Segment, arena: _core.Arena) -> None:
    arena.request_urgent(75)
    arena.load_begin(1, 75)
    assert arena.urgent_requests() == []
    arena.recover()
    assert arena.urgent_requests() == [75]
    assert arena.slot(1) == (2, 0, SlotState.EMPTY)
    assert slot_of(private) == {}
    assert mask_ids(private, Section.LOADING_MASK) == set()


def test_recovery_keeps_an_expert_whose_eviction_had_begun(arena: _core.Arena) -> None:
    load(arena, 1, 75)
    assert arena.evict_begin(1)
    arena.recover()
    assert arena.find(75) == 1
    assert arena.resident_experts() == [75]
    assert arena.slot(1) == (1, 75, SlotState.RESIDENT)


def test_recovery_leaves_resident_experts_and_requests_alone(private: Segment, arena: _core.Arena) -> None:
    load(arena, 1, 75, prefetched=True)
    load(arena, 3, 0)
    arena.want(0, 0, 75)
    arena.request_urgent(7)
    arena.request_prefetch(8)
    before = bytes(private._mmap)
    arena.recover()
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("directory", [0, 1, 2, 5, 6, 2**32 - 1])
@pytest.mark.parametrize("state", SlotState)
def test_recovery_rebuilds_everything_from_the_slot_words(
    private: Segment, arena: _core.Arena, state: SlotState, directory: int
) -> None:
    """Whatever masks and directory say: only slot words count (R4)."""
    set_slot(private, 0, 7, 75 if state else 0, state)
    for expert in (0, 75, 209):
        arena.store_u32(Section.DIRECTORY, expert, 0, directory)
    for section in (Section.RESIDENT_MASK, Section.LOADING_MASK):
        for layer in range(3):
            arena.store_u64(section, layer, 0, 2**64 - 1)
            arena.store_u64(section, layer, 1, 2**6 - 1)
    for _ in range(2):  # a second time changes nothing: the restarted pager may be killed as well
        arena.recover()
        resident = {75} if state in (SlotState.RESIDENT, SlotState.EVICTING) else set()
        assert mask_ids(private, Section.RESIDENT_MASK) == resident
        assert mask_ids(private, Section.LOADING_MASK) == set()
        assert slot_of(private) == dict.fromkeys(resident, 0)
        assert arena.urgent_requests() == ([75] if state == SlotState.LOADING else [])


def test_recovery_drops_the_mark_of_a_prefetch_that_did_not_arrive(private: Segment, arena: _core.Arena) -> None:
    """Killed in load_publish(), between the mark and RESIDENT: the load that follows is an urgent one."""
    arena.load_begin(1, 75)
    arena.store_u64(Section.PREFETCHED_MASK, 1, 0, 1 << 5)
    arena.recover()
    load(arena, 1, 75)
    assert not arena.take_prefetched(75)


# ---- any sequence of calls ----

SMALL = Geometry(num_layers=2, num_experts=3, num_processes=2, pins_per_process=2, slot_classes=(SlotClass(3, 64),))
experts = st.integers(0, 5)
slots = st.integers(0, 2)
processes = st.integers(0, 1)
pins = st.integers(0, 1)


class Residency(RuleBasedStateMachine):
    """The arena against a model in plain dictionaries."""

    @initialize()
    def start(self) -> None:
        self.segment = Segment.private(SMALL)
        self.arena = self.segment.arena
        self.slots: dict[int, tuple[SlotState, int]] = {}
        self.pins: dict[tuple[int, int], int] = {}
        self.urgent: set[int] = set()
        self.prefetch: set[int] = set()
        self.prefetched: set[int] = set()
        self.failed: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "segment"):
            self.segment.close()

    def holder(self, expert: int) -> int | None:
        return next((slot for slot, (_, held) in self.slots.items() if held == expert), None)

    @rule(process=processes, pin=pins, expert=experts)
    def want(self, process: int, pin: int, expert: int) -> None:
        slot = self.holder(expert)
        resident = slot is not None and self.slots[slot][0] == SlotState.RESIDENT
        self.pins[process, pin] = expert
        assert self.arena.want(process, pin, expert) == (slot if resident else -1)

    @rule(process=processes, pin=pins)
    def unpin(self, process: int, pin: int) -> None:
        self.arena.unpin(process, pin)
        self.pins.pop((process, pin), None)

    @rule(process=processes)
    def worker_dies(self, process: int) -> None:
        held = [key for key in self.pins if key[0] == process]
        assert self.arena.unpin_all(process) == len(held)
        for key in held:
            del self.pins[key]

    @rule(expert=experts)
    def request_urgent(self, expert: int) -> None:
        assert self.arena.request_urgent(expert) == (expert not in self.urgent)
        self.urgent.add(expert)

    @rule(expert=experts)
    def request_prefetch(self, expert: int) -> None:
        assert self.arena.request_prefetch(expert) == (expert not in self.prefetch)
        self.prefetch.add(expert)

    @rule(expert=experts)
    def take_prefetched(self, expert: int) -> None:
        assert self.arena.take_prefetched(expert) == (expert in self.prefetched)
        self.prefetched.discard(expert)

    @rule(slot=slots)
    def evict_begin(self, slot: int) -> None:
        state, expert = self.slots.get(slot, (SlotState.EMPTY, 0))
        allowed = state == SlotState.RESIDENT and expert not in self.pins.values()
        assert self.arena.evict_begin(slot) == allowed
        if allowed:
            self.slots[slot] = (SlotState.EVICTING, expert)
            self.prefetched.discard(expert)

    @rule(slot=slots, expert=experts)
    def load_begin(self, slot: int, expert: int) -> None:
        state, _ = self.slots.get(slot, (SlotState.EMPTY, 0))
        if state in (SlotState.LOADING, SlotState.RESIDENT) or self.holder(expert) not in (None, slot):
            with pytest.raises(ValueError, match="expected"):
                self.arena.load_begin(slot, expert)
            return
        self.arena.load_begin(slot, expert)
        self.slots[slot] = (SlotState.LOADING, expert)
        self.urgent.discard(expert)
        self.prefetch.discard(expert)

    @rule(slot=slots, prefetched=st.booleans())
    def load_publish(self, slot: int, prefetched: bool) -> None:
        state, expert = self.slots.get(slot, (SlotState.EMPTY, 0))
        if state != SlotState.LOADING:
            with pytest.raises(ValueError, match="expected LOADING"):
                self.arena.load_publish(slot, 0, 0, 0, prefetched)
            return
        self.arena.load_publish(slot, 0, 0, 0, prefetched)
        self.slots[slot] = (SlotState.RESIDENT, expert)
        self.failed.discard(expert)
        if prefetched:
            self.prefetched.add(expert)

    @rule(slot=slots)
    def slot_release(self, slot: int) -> None:
        state, expert = self.slots.get(slot, (SlotState.EMPTY, 0))
        if state not in (SlotState.LOADING, SlotState.EVICTING):
            with pytest.raises(ValueError, match="expected LOADING"):
                self.arena.slot_release(slot)
            return
        if state == SlotState.LOADING:
            self.arena.set_failed(expert)
            self.failed.add(expert)
        self.arena.slot_release(slot)
        del self.slots[slot]

    @precondition(lambda self: any(state != SlotState.RESIDENT for state, _ in self.slots.values()))
    @rule()
    def pager_restarts(self) -> None:
        self.arena.recover()
        for slot, (state, expert) in list(self.slots.items()):
            if state == SlotState.LOADING:
                del self.slots[slot]
                self.urgent.add(expert)
            else:
                self.slots[slot] = (SlotState.RESIDENT, expert)

    @invariant()
    def arena_is_as_the_model(self) -> None:
        if not hasattr(self, "segment"):
            return
        in_state: dict[SlotState, set[int]] = {state: set() for state in SlotState}
        for slot in range(SMALL.num_slots):
            state, expert = self.slots.get(slot, (SlotState.EMPTY, 0))
            assert self.arena.slot(slot)[1:] == (expert, state)
            in_state[state].add(expert)
        assert slot_of(self.segment) == {expert: slot for slot, (_, expert) in self.slots.items()}
        expected: dict[Section, Any] = {
            Section.RESIDENT_MASK: in_state[SlotState.RESIDENT],
            Section.LOADING_MASK: in_state[SlotState.LOADING],
            Section.FAILED_MASK: self.failed,
            Section.URGENT_MASK: self.urgent,
            Section.PREFETCH_MASK: self.prefetch,
            Section.PREFETCHED_MASK: self.prefetched,
        }
        for section in MASKS:
            assert mask_ids(self.segment, section) == expected[section], section.name
        assert self.arena.resident_experts() == sorted(in_state[SlotState.RESIDENT])
        for expert in range(6):
            assert self.arena.pinned(expert) == (expert in self.pins.values())


TestAnySequenceOfCalls = Residency.TestCase
TestAnySequenceOfCalls.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
