"""What a process that uses an expert cache and the cache's owner say to each other."""

from __future__ import annotations

from hotset.runtime.experts.config import ExpertCacheConfig, ExpertCachePlan
from hotset.runtime.experts.stats import ExpertCacheStats
from hotset.runtime.messages.client import (
    ExpertsPagedOut,
    ExpertsPinned,
    GetStats,
    InstanceFailed,
    MessageRefused,
    PageOutExperts,
    PinExperts,
    ResetStats,
    UnpinExperts,
)
from hotset.runtime.messages.message import Message


class JoinCache(Message, frozen=True, tag=True):
    """First message: a row for this process. Its start time tells it from a later process with the same id."""

    start_time: int


class LeaveCache(Message, frozen=True, tag=True):
    """Last message: its pins are cleared, and it reads no slot any more."""


class CacheJoined(Message, frozen=True, tag=True):
    """`process` is the row."""

    process: int
    config: ExpertCacheConfig
    plan: ExpertCachePlan


class CacheIsFull(Message, frozen=True, tag=True):
    """`processes` use it, as many as may."""

    processes: int


class CacheStats(Message, frozen=True, tag=True):
    """With the ids of all resident experts: who asks looks for the others in the page cache."""

    query: int
    stats: ExpertCacheStats
    resident: list[int]


ToOwner = JoinCache | LeaveCache | GetStats | ResetStats | PinExperts | UnpinExperts | PageOutExperts
CacheReply = CacheStats | ExpertsPinned | ExpertsPagedOut | MessageRefused
FromOwner = CacheJoined | CacheIsFull | InstanceFailed | CacheReply
