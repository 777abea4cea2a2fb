"""The explorer itself, on processes so small that the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from race.explorer import Await, Choose, Killable, Load, Routine, Store, Update, explore


def sound(_: object) -> None:
    return None


def increment_in_two_steps() -> Routine:
    value = yield Load("count")
    yield Store("count", value + 1)
    return None


def increment_in_one_step() -> Routine:
    yield Update("count", lambda value: value + 1)
    return None


def test_a_lost_update_is_found() -> None:
    def last(step: Callable[[], Routine]) -> Routine:
        yield from step()
        yield Update("left", lambda left: left - 1)
        return None

    def check() -> Routine:
        yield Await("left", 0)
        assert (yield Load("count")) == 2, "an update was lost"
        return None

    for step, lost in ((increment_in_two_steps, True), (increment_in_one_step, False)):
        result = explore({"count": 0, "left": 2}, [(last, step), (last, step), (check,)], sound, must_end=[0, 1, 2])
        assert ("an update was lost" in str(result.violation)) == lost


def test_every_interleaving_is_tried() -> None:
    """Two processes of two steps each: (2 + 1) * (2 + 1) states if no two orders differ in memory."""

    def two_steps(cell: str) -> Routine:
        yield Store(cell, 1)
        yield Store(cell, 2)
        return None

    result = explore({"a": 0, "b": 0}, [(two_steps, "a"), (two_steps, "b")], sound, must_end=[0, 1])
    assert (result.states, result.violation) == (9, None)


def test_a_deadlock_is_found() -> None:
    def take(first: str, second: str) -> Routine:
        yield Await(first, "free")
        yield Store(first, "taken")
        yield Await(second, "free")
        yield Store(second, "taken")
        yield Store(first, "free")
        yield Store(second, "free")
        return None

    locks = {"a": "free", "b": "free"}
    assert explore(locks, [(take, "a", "b")], sound, must_end=[0]).violation is None
    result = explore(locks, [(take, "a", "b"), (take, "b", "a")], sound, must_end=[0, 1])
    assert result.violation is not None
    assert result.violation.message == "somebody waits for ever"


def test_a_loop_without_end_is_found_although_nobody_is_blocked() -> None:
    def spin() -> Routine:
        return None if (yield Load("flag")) else (spin,)

    def raise_flag() -> Routine:
        yield Store("flag", True)
        return None

    memory = {"flag": False}
    assert explore(memory, [(spin,), (raise_flag,)], sound, must_end=[0]).violation is None
    stuck = explore(memory, [(spin,), (raise_flag,)], sound, killable=[Killable({1: None})], must_end=[0])
    assert stuck.violation is not None
    assert stuck.violation.schedule == ["kill of [1]"]


def test_kills_come_at_every_step() -> None:
    def three_steps() -> Routine:
        for value in (1, 2, 3):
            yield Store("progress", value)
        return None

    seen: set[tuple[int, bool]] = set()

    def record(memory: Callable[[str], Any]) -> None:
        seen.add((memory("progress"), memory("killed")))

    explore(
        {"progress": 0, "killed": False},
        [(three_steps,)],
        record,
        killable=[Killable({0: None}, also=(("killed", True),))],
        must_end=[0],
    )
    assert {progress for progress, killed in seen if killed} == {0, 1, 2}


def test_every_option_is_chosen_and_none_means_wait() -> None:
    def choose() -> Routine:
        option = yield Choose(lambda memory: range(3) if memory("open") else [])
        yield Store("chosen", option)
        return None

    def unlock() -> Routine:
        yield Store("open", True)
        return None

    seen: set[int] = set()
    explore(
        {"open": False, "chosen": -1},
        [(choose,), (unlock,)],
        lambda memory: seen.add(memory("chosen")),
        must_end=[0, 1],
    )
    assert seen == {-1, 0, 1, 2}
