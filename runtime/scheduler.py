"""Which request runs, where, and with which pages. Decisions only: the coordinator carries them out.

A request waits until a sequence row and pages for its known tokens are free. While it runs it is granted one page
ahead of what it has committed, so that a worker never waits for the coordinator in the middle of a page. When the
pages run out, the request admitted last gives its pages back and waits again, its tokens kept.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from hotset.runtime.errors import RequestTooLong
from hotset.runtime.kv_cache import PagedKvCache
from hotset.runtime.kv_errors import OutOfPages
from hotset.runtime.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]


class RequestState(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTING = enum.auto()  # its worker was told to let go; then it waits again
    ABORTING = enum.auto()  # its worker was told to let go; then it ends


class Request:
    """One prompt on its way to an answer.

    Attributes:
        client: the client's number for it.
        prompt: int32 token ids.
        generated: token ids committed so far.
        limit: length in tokens, prompt included, at which it ends.
        row: its row in the arena's sequence sections while it runs.
        worker: which worker serves it while it runs; None if that worker has died and no other has taken over.
        sequence: its sequence in the page cache while it runs.
        reserved: tokens that its pages in the cache were asked for.
        granted_blocks: valid entries of its block table.
        lost_workers: how many workers have died while serving it.
    """

    __slots__ = (
        "client",
        "generated",
        "granted_blocks",
        "limit",
        "lost_workers",
        "order",
        "params",
        "prompt",
        "reserved",
        "row",
        "seed",
        "sequence",
        "state",
        "worker",
    )

    def __init__(self, client: int, prompt: TokenIds, params: SamplingParams, seed: int, limit: int) -> None:
        self.client = client
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.limit = limit
        self.generated: list[int] = []
        self.state = RequestState.WAITING
        self.row = -1
        self.worker: int | None = None
        self.sequence = -1
        self.reserved = 0
        self.granted_blocks = 0
        self.lost_workers = 0
        self.order = 0  # of admission

    @property
    def known(self) -> int:
        """Tokens whose ids are known."""
        return len(self.prompt) + len(self.generated)

    def known_ids(self) -> TokenIds:
        return np.concatenate([self.prompt, np.asarray(self.generated, np.int32)])


class Scheduler:
    def __init__(self, cache: PagedKvCache, max_sequences: int, max_model_len: int) -> None:
        self.cache = cache
        self.block_size = cache.block_size
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.preemptions = 0
        self.peak_pages = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._admissions = 0

    def submit(self, client: int, prompt: TokenIds, params: SamplingParams, seed: int) -> Request:
        """Puts a request in the queue; raises `RequestTooLong` if it could never be served."""
        if len(prompt) + 1 > self.max_model_len:
            raise RequestTooLong(len(prompt) + 1, self.max_model_len, "the context (max_model_len)")
        limit = min(len(prompt) + params.max_tokens, self.max_model_len)
        capacity = self.cache.num_pages * self.block_size
        if limit > capacity:
            raise RequestTooLong(limit, capacity, "the KV cache")
        request = Request(client, prompt, params, seed, limit)
        self.waiting.append(request)
        return request

    def admit(self) -> Request | None:
        """Gives the first waiting request a row and pages; None if it must wait on."""
        if not self.waiting or not self._free_rows:
            return None
        request = self.waiting[0]
        blocks = -(-(request.known + 1) // self.block_size)
        if self.running and self.cache.num_free_pages - blocks < len(self.running):
            return None  # it would soon be preempted again: those that run will want a page each
        # Room for every known token and the next one, so that a fresh admission cannot be stalled at once.
        request.reserved = min(request.known + 1, request.limit)
        try:
            request.sequence = self.cache.allocate(request.reserved)
        except OutOfPages:
            return None
        self.waiting.popleft()
        self._admissions += 1
        request.order = self._admissions
        request.row = self._free_rows.pop()
        request.state = RequestState.RUNNING
        request.granted_blocks = len(self.cache.block_table(request.sequence))
        self.running[request.row] = request
        self._note_peak()
        return request

    def grow(self, request: Request, committed: int) -> bool:
        """Grants pages so that a whole spare page lies beyond `committed`; whether the block table has grown.

        Without free pages nothing happens: `is_stalled` tells whether that stops the sequence.
        """
        full = -(-(committed + 1) // self.block_size) * self.block_size
        for wanted in (full + self.block_size, full):
            wanted = min(wanted, request.limit)
            if wanted <= request.granted_blocks * self.block_size:
                return False
            try:
                self.cache.extend(request.sequence, wanted - request.reserved)
            except OutOfPages:
                continue
            request.reserved = wanted
            request.granted_blocks = len(self.cache.block_table(request.sequence))
            self._note_peak()
            return True
        return False

    def is_stalled(self, request: Request, committed: int) -> bool:
        """Whether the next position, `committed`, has no page."""
        return request.granted_blocks * self.block_size <= committed < request.limit - 1

    def preemption_victim(self) -> Request | None:
        """The running request that was admitted last; None while another is giving its pages back."""
        candidates = list(self.running.values())
        if any(request.state is not RequestState.RUNNING for request in candidates):
            return None
        return max(candidates, key=lambda request: request.order, default=None)

    def release(self, request: Request) -> None:
        """Takes row and pages back from a request that its worker does not touch any more."""
        self.cache.free(request.sequence)
        del self.running[request.row]
        self._free_rows.append(request.row)
        request.row = request.sequence = -1
        request.worker = None
        request.granted_blocks = 0

    def requeue(self, request: Request) -> None:
        """Puts a preempted request, its tokens kept, before those that have not begun."""
        self.release(request)
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)
        self.preemptions += 1

    def of_worker(self, worker: int) -> list[Request]:
        return [request for request in self.running.values() if request.worker == worker]

    def least_loaded(self, workers: Iterable[int]) -> int | None:
        """The worker with the fewest sequences; the lowest number among equals."""
        load = dict.fromkeys(workers, 0)
        for request in self.running.values():
            if request.worker in load:
                load[request.worker] += 1
        return min(load, key=lambda worker: (load[worker], worker), default=None)

    @property
    def pages_used(self) -> int:
        return self.cache.num_pages - self.cache.num_free_pages

    def _note_peak(self) -> None:
        self.peak_pages = max(self.peak_pages, self.pages_used)
