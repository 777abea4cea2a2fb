"""Bad arguments to Arena: an error that names them, and not a byte of the arena changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hotset.shm import _core
from hotset.shm.layout import ArenaState, Layout, Section
from hotset.shm.segment import Segment

CORE = Path(__file__).parents[2] / "shm" / "core"

# For every method: valid arguments in an arena of conftest's geometry (3 layers of 70 experts, 3 processes
# with 4 pins each, 5 slots), then what each argument is called in errors, with the first value out of range.
EXPERT = ("expert id", 210)
SLOT = ("slot", 5)
LAYER = ("layer", 3)
PROCESS = ("process", 3)
METHODS: dict[str, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = {
    "load_u64": ((Section.AFFINITY, 0, 0), (("section", len(Section)), ("row", 3), ("column", 72))),
    "load_u32": ((Section.PINS, 0, 0), (("section", len(Section)), ("row", 3), ("column", 16))),
    "store_u64": ((Section.AFFINITY, 0, 0, 1), (("section", len(Section)), ("row", 3), ("column", 72))),
    "store_u32": ((Section.PINS, 0, 0, 1), (("section", len(Section)), ("row", 3), ("column", 16))),
    "hand_out_page": ((1, 1), (("page", 5), ("generation", 1 << 32))),
    "count": ((0, 0, 1), (PROCESS, ("counter", 128), ("amount", 1 << 62))),
    "want": ((0, 0, 1), (PROCESS, ("pin", 4), EXPERT)),
    "unpin": ((0, 0), (PROCESS, ("pin", 4))),
    "unpin_all": ((0,), (PROCESS,)),
    "pinned": ((0,), (EXPERT,)),
    "pin_for_user": ((0, 1), (EXPERT, ("pinned", 2))),
    "find": ((0,), (EXPERT,)),
    "requested": ((0, 1), (EXPERT, ("urgent", 2))),
    "request_urgent": ((0,), (EXPERT,)),
    "request_prefetch": ((0,), (EXPERT,)),
    "withdraw_request": ((0,), (EXPERT,)),
    "withdraw_prefetch": ((0,), (EXPERT,)),
    "take_prefetched": ((0,), (EXPERT,)),
    "failed": ((0,), (EXPERT,)),
    "set_failed": ((0,), (EXPERT,)),
    "generation": ((0,), (LAYER,)),
    "wait": ((0, 0, 0), (LAYER, ("generation", 1 << 32), ("timeout in microseconds", 60_000_001))),
    "wake": ((0,), (LAYER,)),
    "slot": ((0,), (SLOT,)),
    "evict_begin": ((0,), (SLOT,)),
    "slot_release": ((0,), (SLOT,)),
    "load_begin": ((0, 0), (SLOT, EXPERT)),
    "prefetch_begin": ((0, 0), (SLOT, EXPERT)),
    "load_publish": ((0, 0, 1, 0, 0), (SLOT,)),
}
WITH_LISTS = ("load_first", "unanswered")  # test_load_first.py
WITHOUT_ARGUMENTS = ("recover", "urgent_requests", "prefetch_requests", "resident_experts", "user_pins")


@pytest.fixture
def arena(private: Segment) -> _core.Arena:
    """With something in it that a wrong call could change: a resident, a loading and an evicting slot."""
    arena = private.arena
    for slot, expert in ((0, 3), (1, 80), (2, 150)):
        arena.load_begin(slot, expert)
    for slot in (0, 2):
        arena.load_publish(slot, 99, 100, 0, True)
    assert arena.evict_begin(2)
    arena.want(1, 1, 3)
    arena.request_urgent(7)
    arena.request_prefetch(8)
    return arena


def test_every_method_is_in_the_list() -> None:
    """The methods of routing have tests of their own."""
    methods: set[str] = set()
    for file in ("bind_residency.h", "bind_slots.h", "module.c"):
        methods.update(
            re.findall(r'^    \{"(\w+)", (?:FASTCALL|arena_\w+, METH_)', (CORE / file).read_text(), re.MULTILINE)
        )
    assert methods == {*METHODS, *WITH_LISTS, *WITHOUT_ARGUMENTS, "close"}


def out_of_range() -> list[Any]:
    cases = []
    for method, (valid, limits) in METHODS.items():
        for position, (name, limit) in enumerate(limits):
            for value in (-1, limit, (1 << 63) - 1):
                arguments = (*valid[:position], value, *valid[position + 1 :])
                cases.append(pytest.param(method, arguments, name, value, limit, id=f"{method}-{name}-{value}"))
    return cases


@pytest.mark.parametrize(("method", "arguments", "name", "value", "limit"), out_of_range())
def test_an_argument_out_of_range_is_named_with_its_limit(
    private: Segment,
    arena: _core.Arena,
    method: str,
    arguments: tuple[int, ...],
    name: str,
    value: int,
    limit: int,
) -> None:
    before = bytes(private._mmap)
    with pytest.raises(IndexError, match=f"^{name} is {value}, expected 0 <= {name} < {limit}$"):
        getattr(arena, method)(*arguments)
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [1.0, "1", None])
def test_an_argument_of_another_type_is_refused(
    private: Segment, arena: _core.Arena, method: str, wrong: object
) -> None:
    valid, limits = METHODS[method]
    before = bytes(private._mmap)
    for position in range(len(limits)):
        with pytest.raises(ValueError, match=rf"^[\w ]+ is {wrong!r}, expected an integer$"):
            getattr(arena, method)(*valid[:position], wrong, *valid[position + 1 :])
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_integer_of_more_than_64_bits_is_refused(private: Segment, arena: _core.Arena, method: str) -> None:
    valid, limits = METHODS[method]
    before = bytes(private._mmap)
    for position in range(len(limits)):
        with pytest.raises(IndexError, match=rf"^([\w ]+) is {1 << 64}, expected 0 <= \1 < \d+$"):
            getattr(arena, method)(*valid[:position], 1 << 64, *valid[position + 1 :])
    assert bytes(private._mmap) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_wrong_number_of_arguments_is_refused(
    private: Segment, arena: _core.Arena, method: str, surplus: int
) -> None:
    valid, _ = METHODS[method]
    arguments = valid[:-1] if surplus < 0 else (*valid, 0)
    before = bytes(private._mmap)
    with pytest.raises(TypeError, match="argument"):
        getattr(arena, method)(*arguments)
    assert bytes(private._mmap) == before


def test_every_call_on_a_closed_arena_is_refused(private: Segment, arena: _core.Arena) -> None:
    before = bytes(private._mmap)
    arena.close()
    for method, (valid, _) in METHODS.items():
        with pytest.raises(ValueError, match="the arena is closed"):
            getattr(arena, method)(*valid)
    for method in WITHOUT_ARGUMENTS:
        with pytest.raises(ValueError, match="the arena is closed"):
            getattr(arena, method)()
    with pytest.raises(ValueError, match="the arena is closed"):
        _ = arena.state
    with pytest.raises(ValueError, match="the arena is closed"):
        arena.state = ArenaState.READY
    arena.close()
    assert bytes(private._mmap) == before


def test_an_open_arena_is_not_opened_again(private: Segment, arena: _core.Arena) -> None:
    with pytest.raises(ValueError, match="open already"):
        arena.__init__(private._mmap)
    assert arena.state == ArenaState.READY


@pytest.mark.parametrize(("value", "error"), [(3, ValueError), (1 << 32, ValueError), (-1, OverflowError)])
def test_an_unknown_state_is_refused(private: Segment, value: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        private.arena.state = value
    with pytest.raises(TypeError):
        del private.arena.state
    assert private.arena.state == ArenaState.READY


@pytest.mark.parametrize(("method", "value"), [("store_u64", -1), ("store_u32", -1), ("store_u32", 1 << 32)])
def test_a_value_that_does_not_fit_is_not_stored(private: Segment, method: str, value: int) -> None:
    before = bytes(private._mmap)
    with pytest.raises(OverflowError):
        getattr(private.arena, method)(Section.AFFINITY, 0, 0, value)
    assert bytes(private._mmap) == before


@pytest.mark.parametrize(
    ("nbytes", "format", "source"), [(-1, 0, 0), (1 << 32, 0, 0), (1, 256, 0), (1, 0, 256), (1, -1, 0)]
)
def test_what_lies_in_a_slot_must_fit_its_record(
    private: Segment, arena: _core.Arena, nbytes: int, format: int, source: int
) -> None:
    before = bytes(private._mmap)
    with pytest.raises(IndexError):
        arena.load_publish(1, 5, nbytes, format, source)
    with pytest.raises(OverflowError):
        arena.load_publish(1, 1 << 64, 1, 0, False)
    assert bytes(private._mmap) == before


def test_integers_are_stored_where_the_layout_says(private: Segment) -> None:
    layout = Layout(private.layout.geometry)
    for section in layout.sections:
        if section.rows == 0 or section.section == Section.LAYERS:
            continue
        row = section.rows - 1
        private.arena.store_u32(section.section, row, 0, 0x01020304)
        at = section.offset + row * section.stride
        assert bytes(memoryview(private._mmap)[at : at + 4]) == b"\x04\x03\x02\x01"
        assert private.arena.load_u32(section.section, row, 0) == 0x01020304


def test_counting_adds_to_one_counter_of_one_process(private: Segment) -> None:
    private.arena.count(1, 63, 5)
    private.arena.count(1, 63, 6)
    counters = private.view(Section.COUNTERS)
    assert counters[1, 63] == 11
    assert counters.sum() == 11
