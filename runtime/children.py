"""The processes that a coordinator starts, keeps alive and stops: workers, pager and regret helper."""

from __future__ import annotations

import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from hotset.runtime.channel import Channel, ChannelClosed, UnreadableMessage, poll_for_room
from hotset.runtime.config import BackendConfig
from hotset.runtime.messages import (
    FromPager,
    FromRegret,
    FromWorker,
    PagerReady,
    ProcessFailed,
    StartPager,
    StartRegret,
    StartWorker,
    StopWorking,
    ToPager,
    ToRegret,
    ToWorker,
    WorkerReady,
)
from hotset.runtime.plan import InstancePlan
from hotset.runtime.supervision import Child

WORKER_MODULE = "hotset.workers.worker"
PAGER_MODULE = "hotset.workers.pager"
REGRET_MODULE = "hotset.workers.regret"
STOP_SECONDS = 1.0  # children that have not left by then are killed
MAX_FAILED_STARTS = 3  # in a row


class Fatal(Exception):
    """The instance cannot go on; the message is for the user."""


class Listener(Protocol):
    """The coordinator, as its children see it."""

    def on_worker(self, process: int, message: FromWorker) -> None: ...
    def on_pager(self, message: FromPager) -> None: ...
    def on_helper(self, message: FromRegret) -> None: ...

    def on_worker_death(self, process: int) -> None:
        """It is a zombie: nobody has its process id yet. Its last messages have been heard."""

    def on_worker_replaced(self, process: int, how: str) -> None:
        """Another is starting; `how` says what became of the dead one."""

    def on_pager_death(self, pid: int) -> None:
        """It is a zombie. The next one makes sense of the slots that it left (Arena.recover)."""

    def on_helper_death(self) -> None: ...

    def on_progress(self) -> None:
        """All that the workers had to say for now has been heard."""


class Children:
    """Starts the interpreters at once, and their work with `start`.

    Args:
        selector: calls back `key.data()` when a child speaks, dies, or has room for what is queued for it; the
            coordinator polls it.

    Attributes:
        ready_workers: those that take requests.
        pager_ready: whether there is a pager that serves.
        worker_restarts, pager_restarts: so far.
    """

    def __init__(
        self,
        instance: str,
        config: BackendConfig,
        plan: InstancePlan,
        selector: selectors.BaseSelector,
        listener: Listener,
    ) -> None:
        self._instance = instance
        self._config = config
        self._plan = plan
        self._selector = selector
        self._listener = listener
        self._failed_starts = 0
        self.ready_workers: set[int] = set()
        self.pager_ready = False
        self.worker_restarts = self.pager_restarts = 0
        self._workers = [self._spawn_worker(process) for process in range(plan.num_workers)]
        self._pager = self._spawn_pager()
        self._helper: Child[FromRegret] | None = None

    # ---- who they are

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def pager_pid(self) -> int:
        return self._pager.pid

    @property
    def all_ready(self) -> bool:
        return self.pager_ready and len(self.ready_workers) == len(self._workers)

    # ---- their beginning

    def start(self) -> None:
        """Once the arena is there."""
        for process in range(self._plan.num_workers):
            self._start_worker(process)
        self._start_pager()

    def start_helper(self) -> None:
        """When everybody else is up: the figures that it computes are wanted last."""
        self._helper = helper = Child[FromRegret](REGRET_MODULE, FromRegret)
        self._watch(helper, self._hear_helper, self._on_helper_death)
        self._send(helper, StartRegret(self._instance, self._plan))

    def _spawn_worker(self, process: int) -> Child[FromWorker]:
        child = Child[FromWorker](WORKER_MODULE, FromWorker)
        self._watch(child, lambda: self._on_worker(process), lambda: self._on_worker_death(process))
        return child

    def _spawn_pager(self) -> Child[FromPager]:
        child = Child[FromPager](PAGER_MODULE, FromPager)
        self._watch(child, self._hear_pager, self._on_pager_death)
        return child

    def _start_worker(self, process: int) -> None:
        self.send_worker(process, StartWorker(self._instance, self._plan, self._config, process))

    def _start_pager(self) -> None:
        self._send(self._pager, StartPager.of(self._instance, self._plan, self._config))

    def _watch(self, child: Child[Any], on_message: Callable[[], None], on_death: Callable[[], None]) -> None:
        self._selector.register(child.channel, selectors.EVENT_READ, on_message)
        self._selector.register(child.pidfd, selectors.EVENT_READ, on_death)

    # ---- what is said

    def send_worker(self, process: int, message: ToWorker) -> None:
        self._send(self._workers[process], message)

    def send_helper(self, message: ToRegret) -> None:
        if self._helper is not None:
            self._send(self._helper, message)

    def _send(self, child: Child[Any], message: ToWorker | ToPager | ToRegret) -> None:
        try:
            child.channel.send(message)
        except ChannelClosed:
            return  # its pidfd tells the rest
        poll_for_room(self._selector, child.channel)

    def _on_worker(self, process: int) -> None:
        self._hear_worker(process)
        self._listener.on_progress()

    def _hear_worker(self, process: int) -> None:
        channel = self._workers[process].channel
        try:
            for message in channel.receive():
                match message:
                    case WorkerReady():
                        self.ready_workers.add(process)
                    case ProcessFailed(reason):
                        raise Fatal(f"worker {process}: {reason}")
                    case _:
                        pass
                self._listener.on_worker(process, message)
            self._flush(channel)
        except UnreadableMessage as error:
            self._end_unreadable(self._workers[process], f"worker {process}", error)
        except ChannelClosed:
            self._unregister(channel)  # its pidfd tells the rest; until then it would be readable all the time

    def _hear_pager(self) -> None:
        try:
            for message in self._pager.channel.receive():
                match message:
                    case PagerReady():
                        self.pager_ready = True
                    case ProcessFailed(reason):
                        raise Fatal(f"pager: {reason}")
                    case _:
                        pass
                self._listener.on_pager(message)
            self._flush(self._pager.channel)
        except UnreadableMessage as error:
            self._end_unreadable(self._pager, "the pager", error)
        except ChannelClosed:
            self._unregister(self._pager.channel)

    def _hear_helper(self) -> None:
        if self._helper is None:
            return
        try:
            for message in self._helper.channel.receive():
                if isinstance(message, ProcessFailed):
                    print(f"the regret helper ended: {message.reason}", file=sys.stderr, flush=True)
                else:
                    self._listener.on_helper(message)
            self._flush(self._helper.channel)
        except UnreadableMessage as error:
            self._end_unreadable(self._helper, "the regret helper", error)
        except ChannelClosed:
            self._unregister(self._helper.channel)

    def _flush(self, channel: Channel[Any]) -> None:
        channel.flush()
        poll_for_room(self._selector, channel)

    def _end_unreadable(self, child: Child[Any], who: str, error: UnreadableMessage) -> None:
        """Whatever is wrong with it, its messages are missing from now on: another takes its place."""
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        self._unregister(child.channel)
        child.kill()

    # ---- their end

    def _on_worker_death(self, process: int) -> None:
        """What it held is recovered while it is a zombie; then it is reaped and another one started."""
        dead, was_ready = self._workers[process], process in self.ready_workers
        self._hear_worker(process)  # what it said before it died; it gets no work for that, or would lose it
        self.ready_workers.discard(process)
        self._listener.on_worker_death(process)
        how = self._bury(dead)
        self._note_death(was_ready, "worker", how)
        self.worker_restarts += 1
        self._workers[process] = self._spawn_worker(process)
        self._start_worker(process)
        self._listener.on_worker_replaced(process, how)

    def _on_pager_death(self) -> None:
        dead, was_ready = self._pager, self.pager_ready
        self._hear_pager()
        self._listener.on_pager_death(dead.pid)
        self._note_death(was_ready, "pager", self._bury(dead))
        self.pager_restarts += 1
        self.pager_ready = False
        self._pager = self._spawn_pager()
        self._start_pager()

    def _on_helper_death(self) -> None:
        """Nothing but its figures is missing from now on."""
        if self._helper is not None:
            self._bury(self._helper)
            self._helper = None
            self._listener.on_helper_death()

    def _bury(self, dead: Child[Any]) -> str:
        self._unregister(dead.channel)
        self._unregister(dead.pidfd)
        return dead.reap()

    def _unregister(self, source: Any) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def _note_death(self, was_ready: bool, who: str, how: str) -> None:
        """Gives up when children die before they ever work: restarting would go on for ever."""
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Fatal(f"the {who} cannot start: it {how}, {self._failed_starts} times in a row")

    def stop(self) -> None:
        """All of them, in good order where they have begun to work."""
        if self._helper is not None:
            self._helper.kill()  # it holds nothing, and at its priority it would be the last to hear that it may leave
            self._helper.reap()
        for process, worker in enumerate(self._workers):
            self._ask_to_leave(worker, process in self.ready_workers)
        self._wait_for(self._workers)
        # The pager last: a worker finishes its step with the experts that it waits for.
        self._ask_to_leave(self._pager, self.pager_ready)
        self._wait_for([self._pager])

    def _ask_to_leave(self, child: Child[Any], working: bool) -> None:
        if working:
            self._send(child, StopWorking())
        else:
            child.kill()

    @staticmethod
    def _wait_for(children: list[Any]) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.reap(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.reap()
