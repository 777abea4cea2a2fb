"""A dispatcher whose client and workers are played by the test: they do what the real ones would do to the arena."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from hotset.runtime.config import BackendConfig
from hotset.runtime.dispatcher import Dispatcher
from hotset.runtime.messages.client import Generated
from hotset.runtime.plan import InstancePlan, MemorySplit
from hotset.runtime.routing_preference import RoutingPreference
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import Segment

END_OF_TEXT = 9


class Client:
    """Collects what the user would get."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.pending_nbytes = 0

    def send(self, message: msgspec.Struct) -> None:
        self.messages.append(message)

    def tokens(self, request: int) -> list[int]:
        parts = [m.tokens for m in self.messages if isinstance(m, Generated) and m.request == request]
        return np.frombuffer(b"".join(parts), np.int32).tolist()

    def finishes(self, request: int) -> list[str]:
        """How it ended: one entry, or none as long as it has not."""
        return [m.finish for m in self.messages if isinstance(m, Generated) and m.request == request and m.finish]

    def finish(self, request: int) -> str | None:
        return next(iter(self.finishes(request)), None)


class _Instance:
    def __init__(self, plan: InstancePlan) -> None:
        self.plan = plan
        self.segment = Segment.private(plan.geometry)
        self.arena = self.segment.arena


class PlayedInstance:
    """A dispatcher with `num_pages` pages of 4 tokens, and the messages that its workers have not read yet."""

    def __init__(
        self,
        num_pages: int,
        num_workers: int = 2,
        max_sequences: int = 4,
        max_model_len: int = 64,
        windows: tuple[int, ...] = (0,),
        max_step: int | None = None,
    ) -> None:
        self.geometry = Geometry(
            num_layers=1, num_experts=4, num_processes=num_workers + 2, num_pages=num_pages, page_nbytes=64,
            block_size=4, kv_groups=len(windows), max_sequences=max_sequences, max_model_len=max_model_len,
        )  # fmt: skip
        self.client = Client()
        self.inbox: dict[int, list[Any]] = {worker: [] for worker in range(num_workers)}
        no_memory = MemorySplit(processes=0, dense_weights=0, experts=0, kv_pages=0, bookkeeping=0)
        exact = RoutingPreference("off", 0.0, "given")
        instance = _Instance(
            InstancePlan(self.geometry, max_model_len, 0, 1, (END_OF_TEXT,), no_memory, exact, windows, max_step)
        )
        self.arena = instance.arena
        self.dispatcher = Dispatcher(
            BackendConfig(workers=num_workers, block_size=4),
            instance,  # type: ignore[arg-type]
            self.client,  # type: ignore[arg-type]
            lambda worker, message: self.inbox[worker].append(message),
        )
        self.scheduler = self.dispatcher.scheduler
        self.cache = self.dispatcher.scheduler.cache
        self.token_ids = instance.segment.view(Section.TOKEN_IDS)
        self.block_tables = instance.segment.block_tables()
        self.pages = instance.segment.view(Section.KV_PAGES)
        self.generations = instance.segment.view(Section.PAGE_GENERATIONS)[:, 0]

    # What a worker finds in, and puts into, the arena

    def committed(self, row: int) -> int:
        return self.arena.load_u64(Section.SEQUENCES, row, 0)

    def commit(self, row: int, committed: int) -> None:
        self.arena.store_u64(Section.SEQUENCES, row, 0, committed)

    def room(self, row: int) -> int:
        """Positions that have pages."""
        return self.arena.load_u32(Section.SEQUENCES, row, 2) * self.geometry.block_size

    def kv_row(self, row: int, position: int, group: int = 0) -> np.ndarray:
        """The bytes of a token's keys and values in the layers of a group, writable."""
        index, offset = divmod(position, self.geometry.block_size)
        nbytes = self.geometry.page_nbytes // self.geometry.block_size
        page = self.pages[self.block_tables[row, group, index]]
        return page[offset * nbytes : (offset + 1) * nbytes]
