"""What a pager says to who started it, the coordinator or an expert cache, and is told."""

from __future__ import annotations

from typing import Self

from hotset.runtime.config import BackendConfig, ReadMode
from hotset.runtime.messages.message import Message, ProcessFailed, StopWorking
from hotset.runtime.plan import InstancePlan
from hotset.shm.geometry import Geometry


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


ToPager = StartPager | StopWorking


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


FromPager = PagerReady | ExpertFailed | WarmStartProblem | ProcessFailed
