"""What the coordinator and a worker say to each other."""

from __future__ import annotations

import msgspec

from hotset.runtime.completion import FinishReason
from hotset.runtime.config import BackendConfig
from hotset.runtime.messages.message import Message, ProcessFailed, StopWorking
from hotset.runtime.plan import InstancePlan
from hotset.runtime.sampling_params import SamplingParams

# ---- coordinator -> worker


class StartWorker(Message, frozen=True, tag=True):
    """First message to a worker: attach to the arena as `process` and load the model's dense weights."""

    instance: str
    plan: InstancePlan
    config: BackendConfig
    process: int


class RunSequence(Message, frozen=True, tag=True):
    """Serve the sequence in `row` from its `committed` length on.

    The first `known` token ids are in the arena already: the prompt, and what had been generated before a preemption
    or the death of another worker. `limit` is the length at which the sequence ends.
    """

    row: int
    request: int
    prompt_length: int
    known: int
    limit: int
    params: SamplingParams


class PagesGranted(Message, frozen=True, tag=True):
    """The block table of a sequence that had no room has grown: look again."""

    row: int


class StopSequence(Message, frozen=True, tag=True):
    """Let go of a sequence between two steps, and acknowledge; `request` because rows are used again."""

    row: int
    request: int


ToWorker = StartWorker | RunSequence | PagesGranted | StopSequence | StopWorking


# ---- worker -> coordinator


class WorkerReady(Message, frozen=True, tag=True):
    process: int


class RowProgress(msgspec.Struct, frozen=True, array_like=True):
    """`committed` of a row after a step; `finish` when the worker has let go of it because it is complete."""

    row: int
    committed: int
    finish: FinishReason | None = None


class Progress(Message, frozen=True, tag=True):
    rows: list[RowProgress]


class SequenceStopped(Message, frozen=True, tag=True):
    row: int
    request: int


class SequenceFailed(Message, frozen=True, tag=True):
    """The worker let go of the rows because a step could not be computed."""

    rows: list[int]
    reason: str


FromWorker = WorkerReady | Progress | SequenceStopped | SequenceFailed | ProcessFailed
