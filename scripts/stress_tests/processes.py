"""The workers and the pager of the routing stress test: started, killed, and recovered as by runtime/coordinator.py."""

from __future__ import annotations

import contextlib
import random
import selectors
import subprocess
import time
from collections.abc import Callable
from typing import IO

from stress_tests.affinity_replay import WorkerLog
from stress_tests.arena_audit import ArenaAudit
from stress_tests.checks import Check, Scoreboard
from stress_tests.kills import Kills
from stress_tests.messages import (
    Burst,
    BurstLog,
    Failed,
    FromWorker,
    Idle,
    Pause,
    Planted,
    Ready,
    Run,
    StartWorker,
    Violation,
)
from stress_tests.step_watch import StepWatch
from stress_tests.violations import Unrecoverable, Violations

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.config import BackendConfig
from hotset.runtime.instance import Instance
from hotset.runtime.messages.message import Message, ProcessFailed, StopWorking
from hotset.runtime.messages.pager import ExpertFailed, FromPager, PagerReady, StartPager
from hotset.runtime.supervision import Child
from hotset.shm.layout import SlotState

WORKER_MODULE = "stress_tests.routing_worker"
PAGER_MODULE = "hotset.workers.pager"
STOP_SECONDS = 2.0
HALF_WAY = (SlotState.LOADING, SlotState.EVICTING)


class Processes:
    """All children of the test. `poll` does the work; everything else only asks for it.

    Attributes:
        kills: what was killed so far.
        pins_reclaimed: that killed workers held.
        pins_left: likewise, with the planted violation that nobody reclaims them.
        slots_interrupted: that a killed pager was loading or evicting.
        on_worker_death: called before anything is recovered.
    """

    def __init__(
        self,
        instance: Instance,
        config: BackendConfig,
        start_worker: Callable[[int], StartWorker],
        audit: ArenaAudit,
        scoreboard: Scoreboard,
        violations: Violations,
        *,
        patience: float,
        planted: Planted | None,
        log: IO[bytes],
        chance: random.Random,
    ) -> None:
        self._instance = instance
        self._config = config
        self._start_worker = start_worker
        self._audit = audit
        self._scoreboard = scoreboard
        self._violations = violations
        self._patience = patience
        self._planted = planted
        self._log = log
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, Child[FromWorker]] = {}
        self._ready: set[int] = set()
        self._idle: set[int] = set()
        self._logs: dict[int, WorkerLog] = {}
        self._pager_ready_since: float | None = None
        self._running = False
        self._step_watch = StepWatch(instance.arena, instance.plan.num_workers, audit, scoreboard, violations, patience)
        self.kills = Kills(scoreboard, violations, chance)
        self.pins_reclaimed = self.pins_left = self.slots_interrupted = 0
        self.on_worker_death: Callable[[], None] = lambda: None
        self._pager = self._spawn_pager()
        for process in range(instance.plan.num_workers):
            self._spawn_worker(process)

    # ---- children

    def _spawn_worker(self, process: int) -> None:
        # In a session of its own: the terminal's Ctrl-C is for the parent, which stops the children.
        child: Child[FromWorker] = Child(WORKER_MODULE, FromWorker, own_session=True, stderr=self._log)
        self._workers[process] = child
        self._watch(child, lambda: self._on_worker(process), lambda: self._on_worker_death(process))
        self._send(child, self._start_worker(process))

    def _spawn_pager(self) -> Child[FromPager]:
        child: Child[FromPager] = Child(PAGER_MODULE, FromPager, own_session=True, stderr=self._log)
        self._watch(child, self._on_pager, self._on_pager_death)
        self._send(child, StartPager.of(self._instance.name, self._instance.plan, self._config))
        return child

    def _watch(
        self,
        child: Child[FromWorker] | Child[FromPager],
        on_message: Callable[[], None],
        on_death: Callable[[], None],
    ) -> None:
        self._selector.register(child.channel, selectors.EVENT_READ, on_message)
        self._selector.register(child.pidfd, selectors.EVENT_READ, on_death)

    def _unregister(self, source: Channel[FromWorker] | Channel[FromPager] | int) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    @staticmethod
    def _send(child: Child[FromWorker] | Child[FromPager], message: Message) -> None:
        with contextlib.suppress(ChannelClosed):  # its pidfd tells the rest
            child.channel.send(message)

    def kill_one(self) -> bool:
        """SIGKILL to a worker or the pager, wherever it is; recovery is a matter of `poll`.

        Mostly to one that works, and only while most of them do: restarts cost far more than what is between two kills.
        """
        working = self._working()
        most_work = self._pager_ready_since is not None and 2 * len(working) >= len(self._workers)
        if not most_work and not self.kills.next_hits_anyone:
            return False
        victims = self._workers if self.kills.next_hits_anyone else working
        return self.kills.kill_one([self._workers[process] for process in victims], self._pager)

    def _working(self) -> set[int]:
        return self._ready - self._idle

    @property
    def pager_pid(self) -> int:
        return self._pager.pid

    def _on_worker_death(self, process: int) -> None:
        """Recovers while the worker is a zombie, then reaps it and starts another."""
        dead = self._workers[process]
        self._on_worker(process)  # what it said before it died
        self.on_worker_death()
        self._ready.discard(process)
        self._idle.discard(process)
        if self._planted == "dead-pins":
            self.pins_left += len(self._audit.pins_of(process))
        else:
            self.pins_reclaimed += self._instance.arena.unpin_all(process)
        self._audit.no_pins(process, f"worker {process}, which is dead,")
        self._unregister(dead.channel)
        self._unregister(dead.pidfd)
        self.kills.note_death(dead.pid, f"worker {process}", dead.reap())
        self._spawn_worker(process)

    def _on_pager_death(self) -> None:
        dead = self._pager
        self._on_pager()
        self._pager_ready_since = None
        slots = range(self._instance.plan.geometry.num_slots)
        self.slots_interrupted += sum(self._instance.arena.slot(slot)[2] in HALF_WAY for slot in slots)
        self._unregister(dead.channel)
        self._unregister(dead.pidfd)
        self.kills.note_death(dead.pid, "the pager", dead.reap())
        self._pager = self._spawn_pager()

    # ---- messages

    def _on_worker(self, process: int) -> None:
        try:
            for message in self._workers[process].channel.receive():
                self._on_worker_message(process, message)
        except ChannelClosed:
            self._unregister(self._workers[process].channel)  # its pidfd tells the rest

    def _on_worker_message(self, process: int, message: FromWorker) -> None:
        match message:
            case Ready():
                self._ready.add(process)
                self._idle.add(process)
                self._step_watch.begin(process)
                if self._running:
                    self._resume(process)
            case Idle():
                self._idle.add(process)
            case Violation(check, text):
                self._violations.tell(check, text)  # the worker has counted it
            case BurstLog():
                self._logs[process] = message.log
            case Failed(reason):
                self._violations.report(Check.PROCESSES, f"worker {process}: {reason}")

    def _on_pager(self) -> None:
        try:
            for message in self._pager.channel.receive():
                match message:
                    case PagerReady():
                        self._pager_ready_since = time.monotonic()
                    case ExpertFailed(layer, expert, reason):
                        self._violations.report(
                            Check.REQUESTS, f"expert {expert} of layer {layer} was given up: {reason}"
                        )
                    case ProcessFailed(reason):
                        self._violations.report(Check.PROCESSES, f"pager: {reason}")
        except ChannelClosed:
            self._unregister(self._pager.channel)

    # ---- progress

    def poll(self, seconds: float) -> None:
        """Handles what happens within `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
                # An earlier event of the same list may have replaced the process that this one is about.
                if key.fileobj in self._selector.get_map():
                    key.data()
            self._step_watch.look(self._working(), self._pager_ready_since)
            if time.monotonic() >= deadline:
                return

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Polls until `condition`; it is a violation if that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self._violations.report(Check.REQUESTS, f"{what} took longer than {seconds:.0f} s")
                raise Unrecoverable
            self.poll(0.002)

    def all_ready(self) -> bool:
        return len(self._ready) == len(self._workers) and self._pager_ready_since is not None

    def run(self) -> None:
        self._running = True
        for process in self._ready:
            self._resume(process)

    def _resume(self, process: int) -> None:
        self._idle.discard(process)
        self._step_watch.begin(process)
        self._send(self._workers[process], Run())

    def pause(self, start_seconds: float) -> None:
        """Returns when every worker has finished its step and nothing is asked of the pager."""
        self._running = False
        self.wait_for("starting all processes", self.all_ready, start_seconds)
        for process in self._working():
            self._send(self._workers[process], Pause())
        self.wait_for("finishing the steps", lambda: len(self._idle) == len(self._workers), self._patience)
        deadline = time.monotonic() + self._patience
        while not self._audit.drained() and time.monotonic() < deadline:
            self.poll(0.002)

    def burst(self, calls: int) -> list[WorkerLog]:
        """All idle workers route at once; their logs."""
        self._logs.clear()
        for worker in self._workers.values():
            self._send(worker, Burst(calls))
        self.wait_for("a burst", lambda: len(self._logs) == len(self._workers), 10 * self._patience)
        return list(self._logs.values())

    def stop(self) -> None:
        """Asks the children to leave; those that do not are killed, which is a violation."""
        children: dict[str, Child[FromWorker] | Child[FromPager]] = {
            f"worker {process}": worker for process, worker in self._workers.items()
        }
        children["the pager"] = self._pager
        for child in children.values():
            self._send(child, StopWorking())
        deadline = time.monotonic() + STOP_SECONDS
        for who, child in children.items():
            self._scoreboard.checked(Check.PROCESSES)
            try:
                how = child.reap(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                how = child.reap()
            if how != "exited with status 0":
                self._violations.report(Check.PROCESSES, f"{who} was told to leave and {how}")

    def kill_all(self) -> None:
        """For the way out of an error or Ctrl-C. May be called after `stop`."""
        for child in [*self._workers.values(), self._pager]:
            child.kill()
            child.reap()
