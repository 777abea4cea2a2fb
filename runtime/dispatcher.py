"""Carries out what the scheduler decides: prompts and block tables into the arena, sequences to workers, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from hotset.runtime.arena_sequences import ArenaSequences
from hotset.runtime.channel import Channel
from hotset.runtime.completion import FinishReason, completion
from hotset.runtime.config import BackendConfig
from hotset.runtime.errors import RequestFailed
from hotset.runtime.instance import Instance
from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import CorruptCache
from hotset.runtime.messages.client import CacheChecked, Defragment, Defragmented, FromClient, Generated, Submit
from hotset.runtime.messages.worker import PagesGranted, RowProgress, RunSequence, StopSequence, ToWorker
from hotset.runtime.scheduler import Request, RequestState, Scheduler

MAX_LOST_WORKERS = 3  # a request that so many workers died of is not tried again
MAX_CLIENT_BACKLOG = 1 << 24  # bytes; beyond it tokens wait in the arena


class Dispatcher:
    """All requests of the instance's client.

    Pages of a request are freed only after its worker has said that it lets go, or is dead.

    Args:
        instance: whose arena holds the sequences.
        client: where tokens go.
        send_worker: (worker, message); a message to a dead worker may be lost.
    """

    def __init__(
        self,
        config: BackendConfig,
        instance: Instance,
        client: Channel[FromClient],
        send_worker: Callable[[int, ToWorker], None],
    ) -> None:
        plan, geometry = instance.plan, instance.plan.geometry
        cache = PagedKvCache(
            geometry.num_pages,
            geometry.block_size,
            windows=plan.kv_windows,
            max_step=plan.kv_max_step,
            page_nbytes=geometry.page_nbytes,
        )
        self.scheduler = Scheduler(cache, geometry.max_sequences, plan.max_model_len)
        self._config = config
        self._eos_token_ids = plan.eos_token_ids
        self._sequences = ArenaSequences(instance, cache)
        self._client = client
        self._send_worker = send_worker
        self._requests: dict[int, Request] = {}
        self._defragmentations: list[Defragment] = []  # asked for and not done

    # ---- from the client

    def submit(self, message: Submit) -> None:
        params = message.params
        if not message.prompt or len(message.prompt) % 4:
            reason = f"the prompt takes {len(message.prompt)} bytes, expected token ids of 4 bytes each, at least one"
            self._client.send(Generated(message.request, b"", "error", reason))
            return
        # Rows computed under a cache preference must not be reused by a request that wants none.
        salt = ("off" if params.routing == "off" else self._config.routing,)
        try:
            request = self.scheduler.submit(message.request, np.frombuffer(message.prompt, np.int32), params, salt)
        except RequestFailed as error:
            self._client.send(Generated(message.request, b"", "error", str(error)))
            return
        self._requests[message.request] = request

    def abort(self, client: int) -> None:
        request = self._requests.get(client)
        if request is None:
            return
        if request.state is RequestState.WAITING:
            self.scheduler.waiting.remove(request)
            self._end(request, b"", "abort", None)
        elif request.worker is None:
            self._finish(request, "abort")
        elif request.state is RequestState.RUNNING:
            self._stop(request, RequestState.ABORTING)
        else:
            request.state = RequestState.ABORTING  # its worker was told already

    def defragment(self, message: Defragment) -> None:
        """Moves pages together at the front of the arena. Workers let go of all sequences for that long."""
        self._defragmentations.append(message)
        for request in self.scheduler.running.values():
            if request.state is RequestState.RUNNING:
                self._stop(request, RequestState.HALTING)
        self._defragment_when_halted()

    def check_cache(self, query: int) -> None:
        problem = None
        try:
            self.scheduler.cache.check()
        except CorruptCache as error:
            problem = str(error)
        self._client.send(CacheChecked(query, problem))

    # ---- to the workers

    def dispatch(self, workers: Collection[int]) -> None:
        """Admits what fits, gives every sequence without a worker to one of `workers`, and evens their loads."""
        if self._defragmentations:
            return
        while workers and (request := self.scheduler.admit()) is not None:
            self._sequences.begin(request)
        for request in self.scheduler.running.values():
            if request.worker is not None or request.state is not RequestState.RUNNING:
                continue
            request.worker = self.scheduler.least_loaded(workers)
            if request.worker is None:
                return
            run = RunSequence(
                row=request.row,
                request=request.client,
                prompt_length=len(request.prompt),
                known=request.known,
                limit=request.limit,
                params=request.params,
            )
            self._send_worker(request.worker, run)
            # It may have used its last page up while it belonged to nobody, and then it will never report progress.
            self._grant(request, self._sequences.committed(request))
        candidate = self.scheduler.migration_candidate(workers)
        if candidate is not None:
            self._stop(candidate, RequestState.MIGRATING)

    def _stop(self, request: Request, state: RequestState) -> None:
        """Asks the worker, if there is one, to let go of a running request; `_settle` goes on from `state`."""
        request.state = state
        if request.worker is not None:
            self._send_worker(request.worker, StopSequence(request.row, request.client))

    def _grant(self, request: Request, committed: int) -> None:
        """Keeps a spare page ahead of a running sequence; makes room by preemption when it stands still."""
        if request.state is not RequestState.RUNNING or request.worker is None:
            return
        before = self.scheduler.blocks(request)
        was_stalled = self.scheduler.is_stalled(request, committed)
        if self.scheduler.grow(request, committed, written=committed):
            self._sequences.write_block_tables(request, before)
            # Always: since the progress that we go by it may have used up what it had, looked in vain and gone to
            # sleep.
            self._send_worker(request.worker, PagesGranted(request.row))
        elif was_stalled:
            victim = self.scheduler.preemption_victim()
            if victim is not None and victim.worker is not None:
                self._stop(victim, RequestState.PREEMPTING)

    def _grant_stalled(self) -> None:
        """Pages have come back: sequences without room go first, those that were admitted first before others."""
        for request in sorted(self.scheduler.running.values(), key=lambda request: request.order):
            committed = self._sequences.committed(request)
            if self.scheduler.is_stalled(request, committed):
                self._grant(request, committed)

    # ---- from the workers

    def progress(self, worker: int, row: RowProgress) -> None:
        request = self._served(worker, row.row)
        if request is None:
            return
        if row.finish is not None:
            self._finish(request, row.finish)
            return
        self.collect(request)
        self._grant(request, row.committed)

    def stopped(self, row: int, client: int) -> None:
        """A worker has let go of a row."""
        request = self.scheduler.running.get(row)
        if request is None or request.client != client:
            return  # it was complete before the worker read our message
        self._settle(request)

    def failed(self, worker: int, rows: Collection[int], reason: str) -> None:
        for row in rows:
            request = self._served(worker, row)
            if request is not None:
                self._finish(request, "error", reason)

    def worker_died(self, worker: int, how: str) -> None:
        """Its sequences go on elsewhere from what they have committed."""
        orphans = self.scheduler.of_worker(worker)
        for request in orphans:
            request.worker = None  # before anything is sent: `dispatch` must not count on the dead one
            request.lost_workers += 1
        for request in orphans:
            finish = self._completion(request, self._take_new_tokens(request))
            if finish is None and request.lost_workers >= MAX_LOST_WORKERS:
                self._finish(request, "error", f"{request.lost_workers} workers died serving it; the last {how}")
            elif finish is None and request.state is not RequestState.RUNNING:
                self._settle(request)

    def _served(self, worker: int, row: int) -> Request | None:
        request = self.scheduler.running.get(row)
        return request if request is not None and request.worker == worker else None

    def _settle(self, request: Request) -> None:
        """What the worker was told to let go of has been let go of: ends it, or puts it back in the queue."""
        if request.state is RequestState.ABORTING:
            self._finish(request, "abort")
            return
        # However slowly the client reads: who serves the sequence next goes on behind the last token that we know.
        self._send_new_tokens(request)
        match request.state:
            case RequestState.PREEMPTING:
                self._sequences.clear_block_tables(request)
                self.scheduler.requeue(request)
                self._grant_stalled()
            case RequestState.MIGRATING:
                self.scheduler.migrations += 1
                request.worker = None
                request.state = RequestState.RUNNING
            case RequestState.HALTING:
                request.worker = None
            case _:
                pass
        self._defragment_when_halted()

    def _defragment_when_halted(self) -> None:
        """Nobody writes pages now: moves them, and lets everything go on with new block tables."""
        running = self.scheduler.running.values()
        if not self._defragmentations or any(request.worker is not None for request in running):
            return
        for message in self._defragmentations:
            moves = self.scheduler.cache.defragment(message.max_moves)
            self._sequences.move_pages(moves)
            self._client.send(Defragmented(message.query, len(moves)))
        self._defragmentations.clear()
        for request in running:
            if request.state is RequestState.HALTING:  # others, of a dead worker, are about to be settled
                request.state = RequestState.RUNNING
            self._sequences.write_block_tables(request)

    # ---- to the client

    def collect_all(self) -> None:
        """After the client has read what was queued for it."""
        for request in list(self.scheduler.running.values()):
            self.collect(request)

    def collect(self, request: Request) -> None:
        """Sends the tokens that were committed since the last time."""
        if self._client.pending_nbytes <= MAX_CLIENT_BACKLOG:  # else they stay in the arena until the client reads
            self._send_new_tokens(request)

    def _send_new_tokens(self, request: Request) -> None:
        tokens = self._take_new_tokens(request)
        if tokens:
            self._send_tokens(request, tokens)

    def _take_new_tokens(self, request: Request) -> bytes:
        """Token ids that were committed since the last call. Only committed tokens are ever sent."""
        committed = self._sequences.committed(request)
        start = request.known
        # The token at position `committed` is sampled; below it KV rows are written too (see struct sequence_state).
        stop = min(committed + 1, request.limit) if committed >= len(request.prompt) else start
        tokens = self._sequences.token_ids(request, start, stop)
        request.generated.extend(tokens.tolist())
        self.scheduler.account(request, committed)
        self._sequences.clear_behind_windows(request)
        return tokens.tobytes()

    def _completion(self, request: Request, tokens: bytes) -> FinishReason | None:
        """Sends the last `tokens` of a dead worker, which may have died before it could say that they were all."""
        finish = None
        if request.generated:
            eos = () if request.params.ignore_eos else self._eos_token_ids
            finish = completion(request.generated[-1], request.known, request.limit, eos)
        if finish is not None:
            self._end(request, tokens, finish, None)
        elif tokens:
            self._send_tokens(request, tokens)
        return finish

    def _finish(self, request: Request, finish: FinishReason, error: str | None = None) -> None:
        """Ends a running request whose worker has let go of it."""
        self._end(request, self._take_new_tokens(request), finish, error)

    def _end(self, request: Request, tokens: bytes, finish: FinishReason, error: str | None) -> None:
        if request.row >= 0:
            self._sequences.clear_block_tables(request)
            self.scheduler.release(request)
            self._grant_stalled()
            self._defragment_when_halted()
        del self._requests[request.client]
        self._send_tokens(request, tokens, finish, error)

    def _send_tokens(
        self, request: Request, tokens: bytes, finish: FinishReason | None = None, error: str | None = None
    ) -> None:
        self._client.send(Generated(request.client, tokens, finish, error, request.cached_tokens or 0))
