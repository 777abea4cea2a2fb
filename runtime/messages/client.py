"""What a program's `Backend` and the coordinator say to each other."""

from __future__ import annotations

import msgspec

from hotset.runtime.completion import FinishReason
from hotset.runtime.config import BackendConfig
from hotset.runtime.messages.message import Message
from hotset.runtime.plan import InstancePlan
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.stats import BackendStats

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


Reply = StatsReply | Defragmented | CacheChecked | ExpertsPinned | ExpertsPagedOut
ToClient = InstanceReady | InstanceFailed | Generated | MessageRefused | Reply


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
