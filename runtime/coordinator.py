"""The coordinator process: owns the instance and passes messages between its client and its children.

It never computes. One loop polls the client, the children and their pidfds (children.py). It leaves when the client
closes its socket, for whatever reason, and takes everything with it: children, segment, queue.
"""

from __future__ import annotations

import selectors
import sys

from hotset.runtime.channel import Channel, ChannelClosed, UnreadableMessage, poll_for_room
from hotset.runtime.children import Children
from hotset.runtime.disk_reads import DiskReads
from hotset.runtime.dispatcher import Dispatcher
from hotset.runtime.errors import HotsetError
from hotset.runtime.instance import Instance
from hotset.runtime.messages.client import (
    Abort,
    CheckCache,
    Defragment,
    FromClient,
    GetStats,
    InstanceFailed,
    InstanceReady,
    MessageRefused,
    PageOutExperts,
    PinExperts,
    ResetStats,
    Shutdown,
    StartInstance,
    StatsReply,
    Submit,
    UnpinExperts,
    number_of,
)
from hotset.runtime.messages.message import ProcessFailed
from hotset.runtime.messages.pager import ExpertFailed, FromPager, PagerReady, WarmStartProblem
from hotset.runtime.messages.regret import ForgetDemands, FromRegret, RegretMeasured
from hotset.runtime.messages.worker import FromWorker, Progress, SequenceFailed, SequenceStopped, WorkerReady
from hotset.runtime.stats import BackendStats, InstanceCounters, Regret
from hotset.runtime.supervision import enter_child, leave
from hotset.runtime.user_pin_requests import answer
from hotset.runtime.user_pins import UserPins
from hotset.runtime.watched_child import Fatal
from hotset.shm.segment import SegmentError


class Coordinator:
    """Starts an instance and serves one client until it leaves. It listens to its `Children`."""

    def __init__(self, client: Channel[FromClient], start: StartInstance) -> None:
        self._client = client
        self._plan = start.plan
        self._selector = selectors.DefaultSelector()
        # First the children: their interpreters start while we prepare the arena.
        self._children = Children(start.instance, start.config, start.plan, self._selector, self)
        self._regret: Regret | None = None
        self._warm_start_problem: str | None = None
        self._read_mode = self._read_mode_reason = ""
        self._disk_reads = DiskReads()
        self._announced = False
        self._pins_reclaimed = 0

        try:
            self._instance = Instance(start.instance, start.plan)
        except BaseException:
            self._children.stop()
            raise
        self._counters = InstanceCounters(self._instance.segment)
        self._user_pins = UserPins(self._instance.segment, self._instance.queue, start.config.user_pins)
        self._dispatcher = Dispatcher(start.config, self._instance, client, self._children.send_worker)
        self._children.start()
        self._selector.register(client, selectors.EVENT_READ, self._on_client)

    # ---- the children

    def on_worker(self, process: int, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self._announce()
            case Progress(rows):
                for row in rows:
                    self._dispatcher.progress(process, row)
            case SequenceStopped(row, request):
                self._dispatcher.stopped(row, request)
            case SequenceFailed(rows, reason):
                self._dispatcher.failed(process, rows, reason)
            case ProcessFailed():
                pass  # nobody hears of it: it ends the instance

    def on_progress(self) -> None:
        self._dispatcher.dispatch(self._children.ready_workers)

    def on_worker_death(self, process: int) -> None:
        self._pins_reclaimed += self._instance.arena.unpin_all(process)

    def on_worker_replaced(self, process: int, how: str) -> None:
        self._dispatcher.worker_died(process, how)
        self._dispatcher.dispatch(self._children.ready_workers)

    def on_pager(self, message: FromPager) -> None:
        match message:
            case PagerReady():
                self._read_mode, self._read_mode_reason = message.read_mode, message.read_mode_reason
                self._announce()
            case ExpertFailed(layer, expert, reason):
                print(f"expert {expert} of layer {layer}: {reason}", file=sys.stderr, flush=True)
            case WarmStartProblem(reason):
                self._warm_start_problem = reason
                print(reason, file=sys.stderr, flush=True)
            case ProcessFailed():
                pass

    def on_pager_death(self, pid: int) -> None:
        self._disk_reads.note_death(pid)

    def on_helper(self, message: FromRegret) -> None:
        if isinstance(message, RegretMeasured):
            self._regret = message.regret

    def on_helper_death(self) -> None:
        self._regret = None

    def _announce(self) -> None:
        if self._announced or not self._children.all_ready:
            return
        self._announced = True
        self._children.start_helper()
        self._client.send(InstanceReady(self._children.worker_pids, self._children.pager_pid))

    # ---- the client

    def _on_client(self) -> None:
        while True:
            try:
                for message in self._client.receive():
                    self._answer(message)
                break
            except UnreadableMessage as error:  # those behind it are as good as any
                self._refuse(number_of(error.body), str(error))
        self._dispatcher.dispatch(self._children.ready_workers)

    def _answer(self, message: FromClient) -> None:
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
            case PinExperts() | UnpinExperts() | PageOutExperts():
                if problem := self._user_pins.problem(message.layer, message.experts):
                    self._refuse(message.query, problem)
                else:
                    self._client.send(answer(self._user_pins, message))
            case ResetStats():
                self._counters.reset()
                self._disk_reads.reset(self._children.pager_pid)
                self._regret = None
                self._children.send_helper(ForgetDemands())
            case StartInstance() | Shutdown():
                raise ChannelClosed("the client is done")

    def _refuse(self, number: int | None, reason: str) -> None:
        """One line of the log, and an error for who waits for the answer to this message, if that is known."""
        print(f"the client: {reason}", file=sys.stderr, flush=True)
        if number is not None:
            self._client.send(MessageRefused(number, reason))

    def _stats(self) -> BackendStats:
        return self._counters.stats(
            self._plan,
            self._dispatcher.scheduler,
            worker_restarts=self._children.worker_restarts,
            pager_restarts=self._children.pager_restarts,
            pins_reclaimed=self._pins_reclaimed,
            user_pins=self._user_pins,
            disk_bytes_read=self._disk_reads.total(self._children.pager_pid),
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
                poll_for_room(self._selector, self._client)
                for key, events in self._selector.select():
                    if events & selectors.EVENT_WRITE and key.fileobj is self._client:
                        self._client.flush()
                        self._dispatcher.collect_all()
                    key.data()
        except ChannelClosed:
            return

    def close(self) -> None:
        """Stops the children and removes every IPC object; nothing of the instance is left afterwards."""
        self._children.stop()
        self._instance.remove()


def main(arguments: list[str]) -> int:
    client: Channel[FromClient] = enter_child(arguments, FromClient)
    coordinator = None
    try:
        start = client.wait()
        if not isinstance(start, StartInstance):
            return 0
        coordinator = Coordinator(client, start)
        coordinator.run()
    except (Fatal, UnreadableMessage, HotsetError, SegmentError, OSError) as error:
        client.send(InstanceFailed(str(error)))
        return 1
    except ChannelClosed:
        return 0
    finally:
        if coordinator is not None:
            coordinator.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
