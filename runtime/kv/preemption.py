"""Which sequence gives up its pages when the arena is full."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class RunningSequence(msgspec.Struct, frozen=True):
    """What the choice depends on. A higher `priority` is more important; `arrival` counts up."""

    sequence: int
    priority: int
    arrival: int


def choose_victim(running: Iterable[RunningSequence]) -> RunningSequence | None:
    """The sequence to preempt: of the lowest priority the one that came last; None if nothing runs.

    If that is the sequence which needs the pages, it is the one to wait. The victim's full pages stay published until
    others take them, tail first, so it usually resumes by a prefix hit and computes little again.
    """
    return min(running, key=lambda candidate: (candidate.priority, -candidate.arrival), default=None)
