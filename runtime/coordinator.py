"""The coordinator process: owns the arena, the KV pages and the children, and passes messages. It never computes.

One loop polls the client, the workers, the pager and their pidfds. It leaves when the client closes its socket, for
whatever reason, and takes everything with it: children, segment, queue.
"""

from __future__ import annotations

import selectors
import subprocess
import sys
import time

import numpy as np
from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.completion import FinishReason, completion
from hotset.runtime.errors import HotsetError, RequestFailed
from hotset.runtime.kv_cache import PagedKvCache
from hotset.runtime.messages import (
    Abort,
    ExpertFailed,
    FromClient,
    FromPager,
    FromWorker,
    Generated,
    GetStats,
    InstanceFailed,
    InstanceReady,
    PagerReady,
    PagesGranted,
    ProcessFailed,
    Progress,
    ResetStats,
    RunSequence,
    SequenceFailed,
    SequenceStopped,
    Shutdown,
    StartInstance,
    StartPager,
    StartWorker,
    StatsReply,
    StopSequence,
    StopWorking,
    Submit,
    WorkerReady,
)
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.scheduler import Request, RequestState, Scheduler
from hotset.runtime.stats import BackendStats, InstanceCounters
from hotset.runtime.supervision import Child, enter_child
from hotset.shm.counters import Counter
from hotset.shm.layout import ArenaState, Section
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import (
    InstanceLock,
    Segment,
    SegmentError,
    remove_ipc_objects,
    remove_stale_instances,
)

WORKER_MODULE = "hotset.workers.worker"
PAGER_MODULE = "hotset.workers.pager"
STOP_SECONDS = 1.0  # children that have not left by then are killed
MAX_FAILED_STARTS = 3  # in a row
MAX_LOST_WORKERS = 3  # a request that so many workers died of is not tried again
MAX_CLIENT_BACKLOG = 1 << 24  # bytes; beyond it tokens wait in the arena


class Fatal(Exception):
    """The instance cannot go on; the message is for the user."""


class WorkerChild:
    """A worker process and what the coordinator knows about it."""

    def __init__(self, child: Child[FromWorker]) -> None:
        self.child = child
        self.ready = False


class Coordinator:
    """Starts an instance and serves one client until it leaves.

    Invariant: a request is in `scheduler.running` exactly while a row of the arena is its own; its pages are freed
    only after its worker has said that it lets go, or is dead.
    """

    def __init__(self, client: Channel[FromClient], start: StartInstance) -> None:
        self._client = client
        self._config = start.config
        self._plan = start.plan
        self._instance = start.instance
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerChild] = []
        self._pager: Child[FromPager] | None = None
        self._pager_ready = False
        self._announced = False
        self._failed_starts = 0
        self._worker_restarts = self._pager_restarts = self._pins_reclaimed = 0
        self._requests: dict[int, Request] = {}

        # First the children: their interpreters start while we prepare the arena.
        for process in range(self._plan.num_workers):
            self._workers.append(self._spawn_worker(process))
        self._spawn_pager()

        geometry = self._plan.geometry
        remove_stale_instances()
        self._lock = InstanceLock(self._instance)
        try:
            self._segment = Segment.create(self._instance, geometry)
            self._queue = PagingQueue.create(self._instance)
        except BaseException:
            remove_ipc_objects(self._instance)
            self._lock.release()
            raise
        self._arena = self._segment.arena
        self._counters = InstanceCounters(self._segment)
        self._token_ids = self._segment.view(Section.TOKEN_IDS)
        self._block_tables = self._segment.view(Section.BLOCK_TABLES)
        cache = PagedKvCache(num_pages=geometry.num_pages, block_size=geometry.block_size)
        self._scheduler = Scheduler(cache, geometry.max_sequences, self._plan.max_model_len)
        for process in range(self._plan.num_workers):
            self._start_worker(process)
        self._start_pager()
        self._selector.register(client, selectors.EVENT_READ, self._on_client)

    # ---- children

    def _spawn_worker(self, process: int) -> WorkerChild:
        child: Child[FromWorker] = Child(WORKER_MODULE, FromWorker)
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._on_worker(process))
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_worker_death(process))
        return WorkerChild(child)

    def _start_worker(self, process: int) -> None:
        self._send_worker(process, StartWorker(self._instance, self._plan, self._config, process))

    def _spawn_pager(self) -> None:
        self._pager = Child(PAGER_MODULE, FromPager)
        self._pager_ready = False
        self._selector.register(self._pager.channel, selectors.EVENT_READ, self._on_pager)
        self._selector.register(self._pager.pidfd, selectors.EVENT_READ, self._on_pager_death)

    def _start_pager(self) -> None:
        if self._pager is not None:
            try:
                self._pager.channel.send(StartPager(self._instance, self._plan, self._config, self._plan.pager_process))
            except ChannelClosed:
                pass  # its pidfd tells the rest

    def _forget(self, child: Child[FromWorker] | Child[FromPager]) -> None:
        self._unregister(child.channel)
        self._unregister(child.pidfd)

    def _send_worker(
        self, process: int, message: StartWorker | RunSequence | PagesGranted | StopSequence | StopWorking
    ) -> None:
        try:
            self._workers[process].child.channel.send(message)
        except ChannelClosed:
            pass  # its pidfd tells the rest

    def _note_death(self, was_ready: bool, who: str, how: str) -> None:
        """Gives up when children die before they ever work: restarting would go on for ever."""
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Fatal(f"the {who} cannot start: it {how}, {self._failed_starts} times in a row")

    def _on_worker_death(self, process: int) -> None:
        """Recovers what the worker held while it is a zombie, then reaps it and starts another."""
        dead = self._workers[process]
        self._on_worker(process)
        self._pins_reclaimed += self._arena.unpin_all(process)
        orphans = self._scheduler.of_worker(process)
        for request in orphans:
            request.worker = None
        self._forget(dead.child)
        how = dead.child.reap()
        self._note_death(dead.ready, "worker", how)
        self._worker_restarts += 1
        self._workers[process] = self._spawn_worker(process)
        self._start_worker(process)
        for request in orphans:
            request.lost_workers += 1
            self._collect(request)
            if request.client not in self._requests:
                continue
            if request.state is RequestState.PREEMPTING:
                self._scheduler.requeue(request)
            elif request.state is RequestState.ABORTING:
                self._finish(request, "abort")
            elif request.lost_workers >= MAX_LOST_WORKERS:
                self._finish(request, "error", f"{request.lost_workers} workers died serving it; the last {how}")
        self._schedule()

    def _on_pager_death(self) -> None:
        dead, was_ready = self._pager, self._pager_ready
        if dead is None:
            return
        self._on_pager()
        self._forget(dead)
        self._note_death(was_ready, "pager", dead.reap())
        self._pager_restarts += 1
        self._spawn_pager()
        self._start_pager()

    # ---- messages

    def _on_worker(self, process: int) -> None:
        worker = self._workers[process]
        try:
            for message in worker.child.channel.receive():
                match message:
                    case WorkerReady():
                        worker.ready = True
                        self._announce()
                        self._schedule()
                    case Progress(rows):
                        for row in rows:
                            self._on_progress(process, row.row, row.committed, row.finish)
                        self._schedule()
                    case SequenceStopped(row, client):
                        self._on_stopped(row, client)
                    case SequenceFailed(rows, reason):
                        for row in rows:
                            request = self._scheduler.running.get(row)
                            if request is not None and request.worker == process:
                                self._finish(request, "error", reason)
                        self._schedule()
                    case ProcessFailed(reason):
                        raise Fatal(f"worker {process}: {reason}")
        except ChannelClosed:
            # The pidfd tells the rest; until then the socket would be readable all the time.
            self._unregister(worker.child.channel)

    def _on_pager(self) -> None:
        pager = self._pager
        if pager is None:
            return
        try:
            for message in pager.channel.receive():
                match message:
                    case PagerReady():
                        self._pager_ready = True
                        self._announce()
                    case ExpertFailed(layer, expert, reason):
                        print(f"expert {expert} of layer {layer}: {reason}", file=sys.stderr, flush=True)
                    case ProcessFailed(reason):
                        raise Fatal(f"pager: {reason}")
        except ChannelClosed:
            self._unregister(pager.channel)

    def _unregister(self, source: Channel[FromWorker] | Channel[FromPager] | int) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def _announce(self) -> None:
        if self._announced or not self._pager_ready or not all(worker.ready for worker in self._workers):
            return
        self._announced = True
        pager_pid = self._pager.pid if self._pager else 0
        self._client.send(InstanceReady([worker.child.pid for worker in self._workers], pager_pid))

    def _on_client(self) -> None:
        for message in self._client.receive():
            match message:
                case Submit():
                    self._submit(message)
                case Abort(client):
                    self._abort(client)
                case GetStats(query):
                    self._client.send(StatsReply(query, self._stats()))
                case ResetStats():
                    self._counters.reset()
                case StartInstance() | Shutdown():
                    raise ChannelClosed("the client is done")

    def _submit(self, message: Submit) -> None:
        params: SamplingParams = message.params
        prompt = np.frombuffer(message.prompt, np.int32)
        try:
            request = self._scheduler.submit(message.request, prompt, params, params.seed or 0)
        except RequestFailed as error:
            self._client.send(Generated(message.request, b"", "error", str(error)))
            return
        self._requests[message.request] = request
        self._schedule()

    def _abort(self, client: int) -> None:
        request = self._requests.get(client)
        if request is None:
            return
        if request.state is RequestState.WAITING:
            self._scheduler.waiting.remove(request)
            self._end(request, b"", "abort", None)
        elif request.worker is None:
            self._finish(request, "abort")
        else:
            if request.state is RequestState.RUNNING:
                self._send_worker(request.worker, StopSequence(request.row, request.client))
            request.state = RequestState.ABORTING

    # ---- requests

    def _schedule(self) -> None:
        """Admits what fits, and gives sequences without a worker to one."""
        ready = [process for process, worker in enumerate(self._workers) if worker.ready]
        while ready and (request := self._scheduler.admit()) is not None:
            self._token_ids[request.row, : request.known] = request.known_ids()
            # While no worker serves the row, its committed length is ours to set.
            self._arena.store_u64(Section.SEQUENCES, request.row, 0, 0)
            self._write_block_table(request, 0)
        for request in self._scheduler.running.values():
            if request.worker is None and request.state is RequestState.RUNNING:
                worker = self._scheduler.least_loaded(ready)
                if worker is None:
                    return
                request.worker = worker
                self._send_worker(
                    worker,
                    RunSequence(
                        row=request.row,
                        request=request.client,
                        prompt_length=len(request.prompt),
                        known=request.known,
                        limit=request.limit,
                        params=request.params,
                        seed=request.seed,
                    ),
                )

    def _write_block_table(self, request: Request, start: int) -> None:
        table = self._scheduler.cache.block_table(request.sequence)
        self._block_tables[request.row, start : len(table)] = table[start:]
        # Release, after the entries: the worker reads the count first.
        self._arena.store_u32(Section.SEQUENCES, request.row, 2, len(table))

    def _committed(self, request: Request) -> int:
        return self._arena.load_u64(Section.SEQUENCES, request.row, 0)

    def _on_progress(self, process: int, row: int, committed: int, finish: FinishReason | None) -> None:
        request = self._scheduler.running.get(row)
        if request is None or request.worker != process:
            return
        if finish is not None:
            self._finish(request, finish)
            return
        self._collect(request)
        self._grant(request, committed)

    def _grant(self, request: Request, committed: int) -> None:
        """Keeps a spare page ahead of a running sequence; makes room by preemption when it stands still."""
        if request.state is not RequestState.RUNNING or request.worker is None:
            return
        before = request.granted_blocks
        had_room = not self._scheduler.is_stalled(request, committed)
        if self._scheduler.grow(request, committed):
            self._write_block_table(request, before)
            if not had_room:
                self._send_worker(request.worker, PagesGranted(request.row))
        elif not had_room:
            victim = self._scheduler.preemption_victim()  # None while one is giving its pages back already
            if victim is not None and victim.worker is not None:
                victim.state = RequestState.PREEMPTING
                self._send_worker(victim.worker, StopSequence(victim.row, victim.client))

    def _on_stopped(self, row: int, client: int) -> None:
        request = self._scheduler.running.get(row)
        if request is None or request.client != client:
            return  # it was complete before the worker read our message
        if request.state is RequestState.ABORTING:
            self._finish(request, "abort")
        elif request.state is RequestState.PREEMPTING:
            self._collect(request)
            if request.client in self._requests:
                self._scheduler.requeue(request)
        self._grant_stalled()
        self._schedule()

    def _grant_stalled(self) -> None:
        """Pages have come back: sequences without room go first, those that were admitted first before others."""
        for request in sorted(self._scheduler.running.values(), key=lambda request: request.order):
            if request.worker is not None:
                committed = self._committed(request)
                if self._scheduler.is_stalled(request, committed):
                    self._grant(request, committed)

    def _take_new_tokens(self, request: Request) -> bytes:
        """Token ids that were committed since the last call. Only committed tokens are ever sent."""
        committed = self._committed(request)
        start = request.known
        # The token at position `committed` is sampled; below it KV rows are written too (see struct sequence_state).
        stop = min(committed + 1, request.limit) if committed >= len(request.prompt) else start
        tokens = self._token_ids[request.row, start:stop]
        request.generated.extend(tokens.tolist())
        return tokens.tobytes()

    def _collect(self, request: Request) -> None:
        """Sends new tokens on, and ends the request if its worker died before it could say that it was complete."""
        if self._client.pending_nbytes > MAX_CLIENT_BACKLOG:
            return  # they stay in the arena until the client reads
        tokens = self._take_new_tokens(request)
        finish = self._completion(request) if request.worker is None else None
        if finish is not None:
            self._end(request, tokens, finish, None)
        elif tokens:
            self._client.send(Generated(request.client, tokens))

    def _completion(self, request: Request) -> FinishReason | None:
        if not request.generated:
            return None
        eos = () if request.params.ignore_eos else self._plan.eos_token_ids
        return completion(request.generated[-1], request.known, request.limit, eos)

    def _finish(self, request: Request, finish: FinishReason, error: str | None = None) -> None:
        """Ends a running request whose worker has let go of it."""
        self._end(request, self._take_new_tokens(request), finish, error)

    def _end(self, request: Request, tokens: bytes, finish: FinishReason, error: str | None) -> None:
        if request.row >= 0:
            self._scheduler.release(request)
            self._grant_stalled()
        del self._requests[request.client]
        self._client.send(Generated(request.client, tokens, finish, error))

    # ---- numbers

    def _stats(self) -> BackendStats:
        counts, routing = self._counters.counts(), self._counters.routing()
        plan, scheduler = self._plan, self._scheduler
        resident = len(self._arena.resident_experts())
        return BackendStats(
            decode_expert_hits=counts[Counter.DECODE_EXPERT_HITS],
            decode_expert_misses=counts[Counter.DECODE_EXPERT_MISSES],
            prefill_expert_hits=counts[Counter.PREFILL_EXPERT_HITS],
            prefill_expert_misses=counts[Counter.PREFILL_EXPERT_MISSES],
            decode_tokens=counts[Counter.DECODE_TOKENS],
            prefill_tokens=counts[Counter.PREFILL_TOKENS],
            steps=counts[Counter.STEPS],
            urgent_page_ins=counts[Counter.URGENT_PAGE_INS],
            prefetch_page_ins=counts[Counter.PREFETCH_PAGE_INS],
            prefetch_hits=counts[Counter.PREFETCH_HITS],
            evictions=counts[Counter.EVICTIONS],
            bytes_read=counts[Counter.BYTES_READ],
            routing_decisions=counts[Counter.ROUTING_DECISIONS],
            routing=routing.routing_latency,
            paging=routing.paging_latency,
            lost_mass=routing.lost_mass,
            resident_experts=resident,
            resident_expert_bytes=resident * plan.expert_nbytes,
            expert_budget_bytes=plan.expert_budget_nbytes,
            kv_pages_used=scheduler.pages_used,
            kv_pages_peak=scheduler.peak_pages,
            kv_pages_total=plan.geometry.num_pages,
            requests_running=len(scheduler.running),
            requests_waiting=len(scheduler.waiting),
            preemptions=scheduler.preemptions,
            worker_restarts=self._worker_restarts,
            pager_restarts=self._pager_restarts,
            pins_reclaimed=self._pins_reclaimed,
            workers=plan.num_workers,
        )

    # ---- the loop

    def run(self) -> None:
        """Returns when the client has left; raises `Fatal` when the instance cannot go on."""
        try:
            self._on_client()  # what came together with the first message
            while True:
                writable = selectors.EVENT_WRITE if self._client.pending_nbytes else 0
                self._selector.modify(self._client, selectors.EVENT_READ | writable, self._on_client)
                for key, events in self._selector.select():
                    if key.fileobj is self._client and events & selectors.EVENT_WRITE:
                        self._client.flush()
                        for request in list(self._scheduler.running.values()):
                            self._collect(request)
                    if events & selectors.EVENT_READ:
                        key.data()
        except ChannelClosed:
            return

    def close(self) -> None:
        """Stops the children and removes every IPC object; nothing of the instance is left afterwards."""
        children: list[Child[FromWorker] | Child[FromPager]] = [worker.child for worker in self._workers]
        if self._pager is not None:
            children.append(self._pager)
        for child in children:
            try:
                child.channel.send(StopWorking())
            except ChannelClosed:
                pass
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.reap(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.reap()
        self._arena.state = ArenaState.CLOSED
        self._queue.close()
        remove_ipc_objects(self._instance)
        self._lock.release()


def main(arguments: list[str]) -> int:
    # The host's death is seen as end of file: hosts start backends from any thread.
    client: Channel[FromClient] = enter_child(arguments, FromClient, dies_with_parent=False)
    coordinator = None
    try:
        start = client.wait()
        if not isinstance(start, StartInstance):
            return 0
        coordinator = Coordinator(client, start)
        coordinator.run()
    except ChannelClosed:
        return 0
    except (Fatal, HotsetError, SegmentError, OSError) as error:
        client.send(InstanceFailed(str(error)))
        return 1
    finally:
        if coordinator is not None:
            coordinator.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
