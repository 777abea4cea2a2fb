"""The coordinator process: owns the instance, keeps its children alive, and passes messages. It never computes.

One loop polls the client, the workers, the pager and their pidfds. It leaves when the client closes its socket, for
whatever reason, and takes everything with it: children, segment, queue.
"""

from __future__ import annotations

import selectors
import subprocess
import sys
import time

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.disk_reads import DiskReads
from hotset.runtime.dispatcher import Dispatcher
from hotset.runtime.errors import HotsetError
from hotset.runtime.instance import Instance
from hotset.runtime.messages import (
    Abort,
    CheckCache,
    Defragment,
    ExpertFailed,
    ExpertsPagedOut,
    ExpertsPinned,
    ForgetDemands,
    FromClient,
    FromPager,
    FromRegret,
    FromWorker,
    GetStats,
    InstanceFailed,
    InstanceReady,
    PageOutExperts,
    PagerReady,
    PinExperts,
    ProcessFailed,
    Progress,
    RegretMeasured,
    ResetStats,
    SequenceFailed,
    SequenceStopped,
    Shutdown,
    StartInstance,
    StartPager,
    StartRegret,
    StartWorker,
    StatsReply,
    StopWorking,
    Submit,
    ToPager,
    ToRegret,
    ToWorker,
    UnpinExperts,
    WarmStartProblem,
    WorkerReady,
)
from hotset.runtime.stats import BackendStats, InstanceCounters, Regret
from hotset.runtime.supervision import Child, enter_child
from hotset.runtime.user_pins import UserPins
from hotset.shm.segment import SegmentError

WORKER_MODULE = "hotset.workers.worker"
PAGER_MODULE = "hotset.workers.pager"
REGRET_MODULE = "hotset.workers.regret"
STOP_SECONDS = 1.0  # children that have not left by then are killed
MAX_FAILED_STARTS = 3  # in a row


class Fatal(Exception):
    """The instance cannot go on; the message is for the user."""


class Coordinator:
    """Starts an instance and serves one client until it leaves."""

    def __init__(self, client: Channel[FromClient], start: StartInstance) -> None:
        self._client = client
        self._config = start.config
        self._plan = start.plan
        self._name = start.instance
        self._selector = selectors.DefaultSelector()
        # First the children: their interpreters start while we prepare the arena.
        self._workers = [self._spawn_worker(process) for process in range(self._plan.num_workers)]
        self._pager = self._spawn_pager()
        self._ready_workers: set[int] = set()
        self._helper: Child[FromRegret] | None = None
        self._regret: Regret | None = None
        self._warm_start_problem: str | None = None
        self._read_mode = self._read_mode_reason = ""
        self._disk_reads = DiskReads()
        self._pager_ready = False
        self._announced = False
        self._failed_starts = 0
        self._worker_restarts = self._pager_restarts = self._pins_reclaimed = 0

        self._instance = Instance(self._name, self._plan)
        self._counters = InstanceCounters(self._instance.segment)
        self._user_pins = UserPins(self._instance.segment, self._instance.queue, self._config.user_pins)
        self._dispatcher = Dispatcher(self._config, self._instance, client, self._send_worker)
        for process in range(self._plan.num_workers):
            self._start_worker(process)
        self._start_pager()
        self._selector.register(client, selectors.EVENT_READ, self._on_client)

    # ---- children

    def _spawn_worker(self, process: int) -> Child[FromWorker]:
        child: Child[FromWorker] = Child(WORKER_MODULE, FromWorker)
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._on_worker(process))
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_worker_death(process))
        return child

    def _spawn_pager(self) -> Child[FromPager]:
        child: Child[FromPager] = Child(PAGER_MODULE, FromPager)
        self._selector.register(child.channel, selectors.EVENT_READ, self._on_pager)
        self._selector.register(child.pidfd, selectors.EVENT_READ, self._on_pager_death)
        return child

    def _start_helper(self) -> None:
        """When everybody else is up: the figures that it computes are wanted last."""
        helper: Child[FromRegret] = Child(REGRET_MODULE, FromRegret)
        self._helper = helper
        self._selector.register(helper.channel, selectors.EVENT_READ, self._on_helper)
        self._selector.register(helper.pidfd, selectors.EVENT_READ, self._on_helper_death)
        self._send(helper, StartRegret(self._name, self._plan))

    def _start_worker(self, process: int) -> None:
        self._send_worker(process, StartWorker(self._name, self._plan, self._config, process))

    def _start_pager(self) -> None:
        self._send(self._pager, StartPager(self._name, self._plan, self._config, self._plan.pager_process))

    def _send_worker(self, process: int, message: ToWorker) -> None:
        self._send(self._workers[process], message)

    @staticmethod
    def _send(
        child: Child[FromWorker] | Child[FromPager] | Child[FromRegret], message: ToWorker | ToPager | ToRegret
    ) -> None:
        try:
            child.channel.send(message)
        except ChannelClosed:
            pass  # its pidfd tells the rest

    def _forget(self, child: Child[FromWorker] | Child[FromPager] | Child[FromRegret]) -> None:
        self._unregister(child.channel)
        self._unregister(child.pidfd)

    def _unregister(self, source: Channel[FromWorker] | Channel[FromPager] | Channel[FromRegret] | int) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def _note_death(self, was_ready: bool, who: str, how: str) -> None:
        """Gives up when children die before they ever work: restarting would go on for ever."""
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Fatal(f"the {who} cannot start: it {how}, {self._failed_starts} times in a row")

    def _on_worker_death(self, process: int) -> None:
        """Recovers what the worker held while it is a zombie, then reaps it and starts another."""
        dead, was_ready = self._workers[process], process in self._ready_workers
        self._on_worker(process)  # what it said before it died
        self._ready_workers.discard(process)
        self._pins_reclaimed += self._instance.arena.unpin_all(process)
        self._forget(dead)
        how = dead.reap()
        self._note_death(was_ready, "worker", how)
        self._worker_restarts += 1
        self._workers[process] = self._spawn_worker(process)
        self._start_worker(process)
        self._dispatcher.worker_died(process, how)
        self._dispatcher.dispatch(self._ready_workers)

    def _on_pager_death(self) -> None:
        """Another one makes sense of the slots that the dead one left (Arena.recover)."""
        dead, was_ready = self._pager, self._pager_ready
        self._on_pager()
        self._forget(dead)
        self._disk_reads.note_death(dead.pid)
        self._note_death(was_ready, "pager", dead.reap())
        self._pager_restarts += 1
        self._pager_ready = False
        self._pager = self._spawn_pager()
        self._start_pager()

    def _on_helper_death(self) -> None:
        """Its figures are missing from now on; nothing else needs it."""
        if self._helper is not None:
            self._forget(self._helper)
            self._helper.reap()
            self._helper = self._regret = None

    # ---- messages

    def _on_helper(self) -> None:
        if self._helper is None:
            return
        try:
            for message in self._helper.channel.receive():
                match message:
                    case RegretMeasured(regret):
                        self._regret = regret
                    case ProcessFailed(reason):
                        print(f"the regret helper ended: {reason}", file=sys.stderr, flush=True)
        except ChannelClosed:
            self._unregister(self._helper.channel)

    def _on_worker(self, process: int) -> None:
        try:
            channel = self._workers[process].channel
            for message in channel.receive():
                self._on_worker_message(process, message)
            channel.flush()  # what its socket did not take while it was busy: now it reads again
        except ChannelClosed:
            # Its pidfd tells the rest; until then the socket would be readable all the time.
            self._unregister(self._workers[process].channel)
        self._dispatcher.dispatch(self._ready_workers)

    def _on_worker_message(self, process: int, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self._ready_workers.add(process)
                self._announce()
            case Progress(rows):
                for row in rows:
                    self._dispatcher.progress(process, row)
            case SequenceStopped(row, request):
                self._dispatcher.stopped(row, request)
            case SequenceFailed(rows, reason):
                self._dispatcher.failed(process, rows, reason)
            case ProcessFailed(reason):
                raise Fatal(f"worker {process}: {reason}")

    def _on_pager(self) -> None:
        try:
            for message in self._pager.channel.receive():
                match message:
                    case PagerReady():
                        self._pager_ready = True
                        self._read_mode, self._read_mode_reason = message.read_mode, message.read_mode_reason
                        self._announce()
                    case ExpertFailed(layer, expert, reason):
                        print(f"expert {expert} of layer {layer}: {reason}", file=sys.stderr, flush=True)
                    case WarmStartProblem(reason):
                        self._warm_start_problem = reason
                        print(reason, file=sys.stderr, flush=True)
                    case ProcessFailed(reason):
                        raise Fatal(f"pager: {reason}")
        except ChannelClosed:
            self._unregister(self._pager.channel)

    def _announce(self) -> None:
        if self._announced or not self._pager_ready or len(self._ready_workers) < len(self._workers):
            return
        self._announced = True
        self._start_helper()
        self._client.send(InstanceReady([worker.pid for worker in self._workers], self._pager.pid))

    def _on_client(self) -> None:
        for message in self._client.receive():
            match message:
                case Submit():
                    self._dispatcher.submit(message)
                case Abort(request):
                    self._dispatcher.abort(request)
                case GetStats(query):
                    self._client.send(StatsReply(query, self._stats(), self._instance.arena.resident_experts()))
                case Defragment():
                    self._dispatcher.defragment(message)
                case CheckCache(query):
                    self._dispatcher.check_cache(query)
                case PinExperts(query, layer, experts):
                    self._client.send(ExpertsPinned(query, self._user_pins.pin(layer, experts)))
                case UnpinExperts(query, layer, experts):
                    self._user_pins.unpin(layer, experts)
                    self._client.send(ExpertsPinned(query, len(self._user_pins.pinned())))
                case PageOutExperts(query, layer, experts):
                    self._client.send(ExpertsPagedOut(query, self._user_pins.page_out(layer, experts)))
                case ResetStats():
                    self._counters.reset()
                    self._disk_reads.reset(self._pager.pid)
                    self._regret = None
                    if self._helper is not None:
                        self._send(self._helper, ForgetDemands())
                case StartInstance() | Shutdown():
                    raise ChannelClosed("the client is done")
        self._dispatcher.dispatch(self._ready_workers)

    def _stats(self) -> BackendStats:
        return self._counters.stats(
            self._plan,
            self._dispatcher.scheduler,
            worker_restarts=self._worker_restarts,
            pager_restarts=self._pager_restarts,
            pins_reclaimed=self._pins_reclaimed,
            user_pins=self._user_pins,
            disk_bytes_read=self._disk_reads.total(self._pager.pid),
            read_mode=self._read_mode,
            read_mode_reason=self._read_mode_reason,
            warm_start_problem=self._warm_start_problem,
            regret=self._regret,
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
                    if events & selectors.EVENT_WRITE:  # only ever asked of the client
                        self._client.flush()
                        self._dispatcher.collect_all()
                    if events & selectors.EVENT_READ:
                        key.data()
        except ChannelClosed:
            return

    def close(self) -> None:
        """Stops the children and removes every IPC object; nothing of the instance is left afterwards."""
        if self._helper is not None:
            self._helper.kill()  # it holds nothing, and at its priority it would be the last to hear that it may leave
            self._helper.reap()
        children = [*self._workers, self._pager]
        for child in children:
            self._send(child, StopWorking())
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.reap(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.reap()
        self._instance.remove()


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
