"""What the parent of the routing stress test and its workers say to each other."""

from __future__ import annotations

from typing import Literal, Self

import msgspec
import numpy as np
import numpy.typing as npt
from stress_tests.affinity_replay import LoggedCall, WorkerLog
from stress_tests.checks import Check

from hotset.runtime.messages.message import Message, StopWorking
from hotset.runtime.plan import InstancePlan

# Violations that the tests of this test ask for, to see them found.
Planted = Literal[
    "slot-byte",
    "format",
    "score",
    "slot-length",
    "selection",
    "use-unpinned",
    "dead-pins",
    "stopped-pager",
    "unlogged-activation",
]


class StartWorker(Message, frozen=True, tag=True):
    """First message to a worker. `seed` differs between the lives of one process; `popularity_seed` does not."""

    instance: str
    plan: InstancePlan
    folder: str
    process: int
    top_k: int
    seed: int
    popularity_seed: int
    planted: Planted | None


class Run(Message, frozen=True, tag=True):
    """Route and use experts until told otherwise."""


class Pause(Message, frozen=True, tag=True):
    """Finish the step and answer `Idle`."""


class Burst(Message, frozen=True, tag=True):
    """Route `calls` times as fast as possible, keeping a log of it."""

    calls: int


class Ready(Message, frozen=True, tag=True):
    process: int


class Idle(Message, frozen=True, tag=True):
    process: int


class Violation(Message, frozen=True, tag=True):
    """In words; it is counted on the scoreboard already."""

    check: Check
    text: str


class BurstLog(Message, frozen=True, tag=True):
    """What a worker's burst did.

    `calls` is int64 [calls, fields of LoggedCall], `experts` int32 [all tokens of all calls, top_k].
    """

    process: int
    calls: bytes
    experts: bytes

    @classmethod
    def of(cls, process: int, calls: list[LoggedCall], experts: npt.NDArray[np.int32]) -> Self:
        fields = np.array([msgspec.structs.astuple(call) for call in calls], np.int64)
        return cls(process, fields.tobytes(), experts.tobytes())

    @property
    def log(self) -> WorkerLog:
        fields = np.frombuffer(self.calls, np.int64).reshape(-1, len(LoggedCall.__struct_fields__)).tolist()
        calls = [LoggedCall(*call) for call in fields]
        tokens = sum(call.tokens for call in calls)
        return calls, np.frombuffer(self.experts, np.int32).reshape(tokens, -1)


class Failed(Message, frozen=True, tag=True):
    """The worker cannot go on."""

    reason: str


ToWorker = StartWorker | Run | Pause | Burst | StopWorking
FromWorker = Ready | Idle | Violation | BurstLog | Failed
