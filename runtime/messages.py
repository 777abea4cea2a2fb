"""What the processes say to each other. Token ids travel packed (int32, little-endian), never as lists."""

from __future__ import annotations

from typing import Literal, Self

import msgspec

from hotset.runtime.completion import FinishReason
from hotset.runtime.config import BackendConfig, ReadMode, RoutingPolicy
from hotset.runtime.model.calibration import Calibration
from hotset.runtime.plan import InstancePlan
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.stats import BackendStats, Regret
from hotset.shm.geometry import Geometry


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages: each travels with its class name as tag."""


# ---- Backend -> coordinator


class StartInstance(Message, frozen=True, tag=True):
    instance: str
    config: BackendConfig
    plan: InstancePlan


class Submit(Message, frozen=True, tag=True):
    """A request: the prompt's token ids, and how to continue it, with a seed. `request` is the client's number."""

    request: int
    prompt: bytes
    params: SamplingParams


class Abort(Message, frozen=True, tag=True):
    request: int


class GetStats(Message, frozen=True, tag=True):
    query: int


class Defragment(Message, frozen=True, tag=True):
    """Move at most `max_moves` KV pages (None: all that have to be) to the front of the arena."""

    query: int
    max_moves: int | None


class CheckCache(Message, frozen=True, tag=True):
    """Prove that the bookkeeping of the KV pages is consistent: for stress tests."""

    query: int


class PinExperts(Message, frozen=True, tag=True):
    query: int
    layer: int
    experts: list[int]


class UnpinExperts(Message, frozen=True, tag=True):
    query: int
    layer: int
    experts: list[int]


class PageOutExperts(Message, frozen=True, tag=True):
    query: int
    layer: int
    experts: list[int]


class ResetStats(Message, frozen=True, tag=True):
    pass


class Shutdown(Message, frozen=True, tag=True):
    pass


# ---- coordinator -> Backend


class InstanceReady(Message, frozen=True, tag=True):
    worker_pids: list[int]
    pager_pid: int


class InstanceFailed(Message, frozen=True, tag=True):
    """The instance could not start, or cannot go on."""

    reason: str


class Generated(Message, frozen=True, tag=True):
    """Committed tokens of a request, in order; `finish` with the last of them, `cached_tokens` with all: the client may
    find a stop string in any."""

    request: int
    tokens: bytes
    finish: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


class MessageRefused(Message, frozen=True, tag=True):
    """The request or query of this number cannot be read, or asks for what there is not."""

    number: int
    reason: str


class StatsReply(Message, frozen=True, tag=True):
    """With the ids of all resident experts: the client looks for the others in the page cache."""

    query: int
    stats: BackendStats
    resident: list[int]


class Defragmented(Message, frozen=True, tag=True):
    query: int
    moves: int


class CacheChecked(Message, frozen=True, tag=True):
    """`problem`: what contradicts itself, in one sentence; None if nothing does."""

    query: int
    problem: str | None


class ExpertsPinned(Message, frozen=True, tag=True):
    """How many experts are pinned, or would have been: none of them is if that is more than may be."""

    query: int
    pinned: int


class ExpertsPagedOut(Message, frozen=True, tag=True):
    query: int
    refused: list[int]


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


class StopWorking(Message, frozen=True, tag=True):
    """Leave the serving loop and exit."""


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


class ProcessFailed(Message, frozen=True, tag=True):
    """A child cannot start or go on; it exits after this."""

    reason: str


# ---- coordinator -> pager, pager -> coordinator


class StartPager(Message, frozen=True, tag=True):
    """First message to a pager: serve the arena of `instance` with the experts of `model`.

    `readers` processes request and use them; `process` is the pager's own row. The settings are those of
    `BackendConfig`. With `parent`, its process id, the pager dies with the thread of it that started the pager.
    """

    instance: str
    process: int
    geometry: Geometry
    readers: int
    model: str
    eviction: str
    read_lanes: int
    read_mode: ReadMode
    warm_start: bool
    parent: int | None = None

    @classmethod
    def of(cls, instance: str, plan: InstancePlan, config: BackendConfig) -> Self:
        return cls(
            instance=instance,
            process=plan.pager_process,
            geometry=plan.geometry,
            readers=plan.num_workers,
            model=config.model,
            eviction=config.eviction,
            read_lanes=plan.read_lanes,
            read_mode=config.read_mode,
            warm_start=config.warm_start,
        )


class PagerReady(Message, frozen=True, tag=True):
    """With how experts are read, "buffered" or "direct", and why."""

    process: int
    read_mode: str
    read_mode_reason: str


class ExpertFailed(Message, frozen=True, tag=True):
    """An expert could not be loaded; its waiters were told through the failed mask."""

    layer: int
    expert: int
    reason: str


class WarmStartProblem(Message, frozen=True, tag=True):
    """The heat file of earlier instances cannot be used, or ours cannot be written."""

    reason: str


# ---- coordinator -> regret helper, regret helper -> coordinator


class StartRegret(Message, frozen=True, tag=True):
    instance: str
    plan: InstancePlan


class ForgetDemands(Message, frozen=True, tag=True):
    """The counts begin anew, and so does the replay."""


class RegretMeasured(Message, frozen=True, tag=True):
    regret: Regret


FromClient = (
    StartInstance
    | Submit
    | Abort
    | GetStats
    | Defragment
    | CheckCache
    | PinExperts
    | UnpinExperts
    | PageOutExperts
    | ResetStats
    | Shutdown
)


class _Numbered(msgspec.Struct):
    """What can be seen of a message of which nothing else fits."""

    request: int | None = None
    query: int | None = None


def number_of(body: bytes) -> int | None:
    """The number by which the client waits for the answer to a message that cannot be read, if it has one."""
    try:
        numbered = msgspec.msgpack.decode(body, type=_Numbered)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return numbered.query if numbered.request is None else numbered.request


Reply = StatsReply | Defragmented | CacheChecked | ExpertsPinned | ExpertsPagedOut


# ---- hotset calibrate -> its measuring process, and back


class StartCalibration(Message, frozen=True, tag=True):
    """Find the strength at which `routing` costs `limit` of `measure` with `budget` of the experts (0 to 1) in memory.

    `tokens` of the file `text` are counted, and it is refused if it has fewer; None is `DEFAULT_TOKENS`, or as many as
    it has. Without a file, it is Python sources of this installation.
    """

    model: str
    routing: RoutingPolicy
    eviction: str
    budget: float
    measure: Literal["perplexity", "divergence"]
    limit: float
    limit_text: str
    text: str | None
    tokens: int | None


class CalibrationProgress(Message, frozen=True, tag=True):
    """Steps of the whole calibration; `phase` says what they are for."""

    phase: str
    done: int
    total: int


class CalibrationDone(Message, frozen=True, tag=True):
    calibration: Calibration


ToClient = InstanceReady | InstanceFailed | Generated | MessageRefused | Reply
ToWorker = StartWorker | RunSequence | PagesGranted | StopSequence | StopWorking
FromWorker = WorkerReady | Progress | SequenceStopped | SequenceFailed | ProcessFailed
ToPager = StartPager | StopWorking
FromPager = PagerReady | ExpertFailed | WarmStartProblem | ProcessFailed
ToRegret = StartRegret | ForgetDemands | StopWorking
FromRegret = RegretMeasured | ProcessFailed
ToCalibrator = StartCalibration | StopWorking
FromCalibrator = CalibrationProgress | CalibrationDone | ProcessFailed
