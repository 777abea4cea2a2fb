"""Which request runs, where, and with which pages. Decisions only: the dispatcher carries them out.

A request waits until a sequence row and pages for its known tokens are free; pages that another request has computed
for the same beginning are shared. While it runs it is granted one page ahead of what it has committed, so that a
worker never waits for the coordinator in the middle of a page. When the pages run out, the request admitted last
gives its pages back and waits again, its tokens kept.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt

from hotset.runtime.errors import RequestTooLong
from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfPages
from hotset.runtime.kv.preemption import RunningSequence, choose_victim
from hotset.runtime.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]


class RequestState(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTING = enum.auto()  # its worker was told to let go; then it waits again
    ABORTING = enum.auto()  # its worker was told to let go; then it ends
    MIGRATING = enum.auto()  # its worker was told to let go; then another one takes it
    HALTING = enum.auto()  # its worker was told to let go, or has; it goes on when its pages have been moved


class Request:
    """One prompt on its way to an answer.

    Attributes:
        client: the client's number for it.
        prompt: int32 token ids.
        generated: token ids committed so far.
        limit: length in tokens, prompt included, at which it ends.
        salt: only requests of an equal salt share pages.
        row: its row in the arena's sequence sections while it runs.
        worker: which worker serves it while it runs; None if that worker has died and no other has taken over.
        sequence: its sequence in the page cache while it runs.
        admitted: tokens that were known when it was last admitted: what the page cache takes for the prompt.
        accounted: positions whose rows the page cache knows to be written.
        cached_tokens: how much of the prompt was found in the prefix cache at the first admission.
        lost_workers: how many workers have died while serving it.
    """

    __slots__ = (
        "accounted",
        "admitted",
        "cached_tokens",
        "client",
        "generated",
        "limit",
        "lost_workers",
        "order",
        "params",
        "prompt",
        "row",
        "salt",
        "sequence",
        "state",
        "worker",
    )

    def __init__(self, client: int, prompt: TokenIds, params: SamplingParams, limit: int, salt: Hashable) -> None:
        self.client = client
        self.prompt = prompt
        self.params = params
        self.limit = limit
        self.salt = salt
        self.generated: list[int] = []
        self.state = RequestState.WAITING
        self.row = -1
        self.worker: int | None = None
        self.sequence = -1
        self.admitted = 0
        self.accounted = 0
        self.cached_tokens: int | None = None
        self.lost_workers = 0
        self.order = 0  # of admission

    @property
    def known(self) -> int:
        """Tokens whose ids are known."""
        return len(self.prompt) + len(self.generated)

    def known_ids(self) -> TokenIds:
        return np.concatenate([self.prompt, np.asarray(self.generated, np.int32)])


class Scheduler:
    """Rows, pages and order of the requests of one instance.

    Invariant: a request is in `running` exactly while it has a row and a sequence in the cache.
    """

    def __init__(self, cache: PagedKvCache, max_sequences: int, max_model_len: int) -> None:
        self.cache = cache
        self.block_size = cache.block_size
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.preemptions = 0
        self.migrations = 0
        self.peak_pages = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._admissions = 0

    def submit(self, client: int, prompt: TokenIds, params: SamplingParams, salt: Hashable = ()) -> Request:
        """Puts a request in the queue; raises `RequestTooLong` if it could never be served."""
        if len(prompt) + 1 > self.max_model_len:
            raise RequestTooLong(len(prompt) + 1, self.max_model_len, "the context (max_model_len)")
        limit = min(len(prompt) + params.max_tokens, self.max_model_len)
        if self.cache.pages_for(limit) > self.cache.num_pages:
            raise RequestTooLong(limit, self.cache.capacity_tokens, "the KV cache")
        request = Request(client, prompt, params, limit, salt)
        self.waiting.append(request)
        return request

    def admit(self) -> Request | None:
        """Gives the first waiting request a row and pages for its known tokens; None if it must wait on."""
        if not self.waiting or not self._free_rows:
            return None
        request = self.waiting[0]
        pages = self.cache.pages_for(request.known + 1)
        if self.running and self.cache.num_free_pages - pages < len(self.running) * len(self.cache.windows):
            return None  # it would soon be preempted again: those that run will want a page each
        try:
            request.sequence, cached_tokens = self.cache.admit(request.known_ids(), salt=request.salt)
        except OutOfPages:
            return None
        self.waiting.popleft()
        self._admissions += 1
        request.order = self._admissions
        request.row = self._free_rows.pop()
        request.state = RequestState.RUNNING
        request.accounted = cached_tokens
        if request.cached_tokens is None:
            request.cached_tokens = cached_tokens
        request.admitted = request.known
        self.running[request.row] = request
        self.grow(request, request.known - 1, written=cached_tokens)
        self._note_peak()
        return request

    def account(self, request: Request, committed: int) -> None:
        """Tells the page cache that the rows below `committed` are written; pages that are full are published."""
        written = min(committed, request.known)
        if request.accounted < min(written, request.admitted):
            self.cache.commit(request.sequence, min(written, request.admitted))
        for position in range(max(request.accounted, request.admitted), written):
            self.cache.append(request.sequence, request.generated[position - len(request.prompt)])
        request.accounted = max(request.accounted, written)

    def grow(self, request: Request, position: int, *, written: int) -> list[int]:
        """Grants pages so that a whole spare page lies beyond that of `position`, and returns them; `written`: tokens
        whose rows are.

        Without free pages nothing happens: `is_stalled` tells whether that stops the sequence.
        """
        needed, most = position // self.block_size + 1, -(-request.limit // self.block_size)
        for wanted in (needed + 1, needed):
            try:
                pages = self.cache.reserve(request.sequence, min(wanted, most) * self.block_size, written=written)
            except OutOfPages:
                continue
            self._note_peak()
            return pages
        return []

    def blocks(self, request: Request) -> int:
        """Blocks for which a running request has pages in all groups."""
        return self.cache.num_blocks(request.sequence)

    def is_stalled(self, request: Request, committed: int) -> bool:
        """Whether the next position, `committed`, has no page."""
        return self.blocks(request) * self.block_size <= committed < request.limit - 1

    def preemption_victim(self) -> Request | None:
        """Which running request gives its pages back; None while another is doing so already."""
        requests = {request.sequence: request for request in self.running.values()}
        if any(request.state is not RequestState.RUNNING for request in requests.values()):
            return None
        victim = choose_victim(RunningSequence(r.sequence, 0, r.order) for r in requests.values())
        return None if victim is None else requests[victim.sequence]

    def release(self, request: Request) -> None:
        """Takes row and pages back from a request that its worker does not touch any more."""
        self.cache.free(request.sequence)
        del self.running[request.row]
        self._free_rows.append(request.row)
        request.row = request.sequence = -1
        request.worker = None
        request.accounted = 0

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
        load = self._load(workers)
        return min(load, key=lambda worker: (load[worker], worker), default=None)

    def migration_candidate(self, workers: Iterable[int]) -> Request | None:
        """The request to move so that no worker has two sequences more than another; None if it is so.

        One at a time: where it will go shows in the loads only when it is there.
        """
        if any(request.state is RequestState.MIGRATING for request in self.running.values()):
            return None
        load = self._load(workers)
        busiest = max(load, key=lambda worker: load[worker], default=None)
        if busiest is None or load[busiest] - min(load.values()) < 2:
            return None
        movable = [request for request in self.of_worker(busiest) if request.state is RequestState.RUNNING]
        return max(movable, key=lambda request: request.order, default=None)

    def _load(self, workers: Iterable[int]) -> dict[int, int]:
        """Sequences per worker, those that are about to leave not counted."""
        load = dict.fromkeys(workers, 0)
        for request in self.running.values():
            if request.worker in load and request.state is RequestState.RUNNING:
                load[request.worker] += 1
        return load

    def _note_peak(self) -> None:
        self.peak_pages = max(self.peak_pages, self.cache.num_used_pages)
