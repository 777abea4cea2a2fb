"""The owner of an expert cache: a thread that keeps the arena, the pager and the list of processes that use it.

It does for a cache what the coordinator does for an instance (coordinator.py), in the program that made it, and is the
coordinator in the list of writers (shm/core/arena.h). A program may start threads and fork as it likes: the pager is
started by this thread, with which it dies, and who uses the cache watches the program's pidfd, for a fork may hold any
socket open.
"""

from __future__ import annotations

import os
import selectors
import socket
import tempfile
import threading
from typing import IO

from hotset.runtime.disk_reads import DiskReads
from hotset.runtime.errors import HotsetError
from hotset.runtime.experts.config import ExpertCacheConfig, ExpertCachePlan
from hotset.runtime.experts.errors import ExpertCacheError
from hotset.runtime.experts.members import Member, Members
from hotset.runtime.experts.messages import CacheJoined, CacheStats, ToOwner
from hotset.runtime.experts.stats import ExpertCacheStats, cache_stats
from hotset.runtime.instance import NamedArena
from hotset.runtime.messages.client import (
    GetStats,
    InstanceFailed,
    MessageRefused,
    PageOutExperts,
    PinExperts,
    ResetStats,
    UnpinExperts,
)
from hotset.runtime.messages.pager import FromPager, PagerReady, StartPager, WarmStartProblem
from hotset.runtime.pager_process import PagerProcess
from hotset.runtime.stats import InstanceCounters
from hotset.runtime.supervision import last_words
from hotset.runtime.user_pin_requests import answer
from hotset.runtime.user_pins import UserPins
from hotset.runtime.watched_child import Fatal
from hotset.shm.segment import Segment, SegmentError

START_SECONDS = 60.0


class ExpertCacheOwner:
    """Returns from its making when the pager serves; raises what kept it from that.

    Attributes:
        connection: of the first member, which is the program itself.
        segment: the arena, to be mapped once in this program.
    """

    def __init__(self, name: str, config: ExpertCacheConfig, plan: ExpertCachePlan) -> None:
        self.connection, theirs = socket.socketpair()
        self.segment: Segment
        self._process = os.getpid()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(name, config, plan, theirs), name=f"hotset-{name}", daemon=True
        )
        self._thread.start()
        try:
            if not self._started.wait(START_SECONDS):
                raise ExpertCacheError(f"the pager was not ready after {START_SECONDS:.0f} s")
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self.close()
            self.connection.close()
            raise

    def close(self) -> None:
        """Stops the pager and removes what processes shared. May be called again, and does nothing in a fork."""
        if os.getpid() != self._process:
            return
        with self._closing:
            if self._stop < 0:
                return
            os.eventfd_write(self._stop, 1)
            if threading.current_thread() is self._thread:  # where the garbage collector found a cache forgotten
                return
            self._thread.join()
            os.close(self._stop)
            self._stop = -1

    def _run(self, name: str, config: ExpertCacheConfig, plan: ExpertCachePlan, first: socket.socket) -> None:
        try:
            with tempfile.TemporaryFile() as stderr:
                service = _Service(name, config, plan, stderr)
                try:
                    self.segment = service.segment
                    service.serve(first, self._stop, self._started)
                finally:
                    service.close()
        except (Fatal, HotsetError, SegmentError, OSError) as error:
            self._failure = error if isinstance(error, SegmentError) else ExpertCacheError(str(error))
        except BaseException:
            self._failure = ExpertCacheError(f"the thread that keeps the expert cache {name!r} has failed")
            raise
        finally:
            self._started.set()


class _Service:
    """All that the thread has. It is gone with it, so that the arena can be unmapped."""

    def __init__(self, name: str, config: ExpertCacheConfig, plan: ExpertCachePlan, stderr: IO[bytes]) -> None:
        self._config = config
        self._plan = plan
        self._stderr = stderr
        self._read_mode = self._read_mode_reason = ""
        self._warm_start_problem: str | None = None
        self._pins_reclaimed = 0
        self._disk_reads = DiskReads()
        self._selector = selectors.DefaultSelector()
        # First the pager: its interpreter starts while we prepare the arena.
        self._pager = PagerProcess(
            self._selector,
            self._on_pager,
            self._disk_reads.note_death,
            dies_with_us=False,  # StartPager.parent does that: a program's fork handlers are not for our child
            own_session=True,
            stderr=stderr,
        )
        try:
            self._arena = NamedArena(name, plan.geometry)
        except BaseException:
            self._pager.stop()
            raise
        self.segment = self._arena.segment
        self._counters = InstanceCounters(self.segment)
        self._user_pins = UserPins(self.segment, self._arena.queue, config.user_pins)
        self._members = Members(
            name, plan.processes, self._selector, self._on_join, self._on_message, self._on_member_gone
        )

    def serve(self, first: socket.socket, stop: int, started: threading.Event) -> None:
        """Returns when `stop` is readable; raises `Fatal` when there cannot be a pager."""
        self._members.add(first)
        self._members.listen()
        config, plan = self._config, self._plan
        self._pager.start(
            StartPager(
                instance=self._arena.name,
                process=plan.processes,
                geometry=plan.geometry,
                readers=plan.processes,
                model=config.model,
                eviction=config.eviction,
                read_lanes=plan.read_lanes,
                read_mode=config.read_mode,
                warm_start=config.warm_start,
                parent=os.getpid(),
            )
        )
        self._selector.register(stop, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fd == stop:
                        return
                    key.data()
                if self._pager.is_ready:
                    started.set()
        except Fatal as error:
            reason = f"{error}{last_words(self._stderr)}"
            self._members.tell_all(InstanceFailed(reason))
            raise Fatal(reason) from None

    def close(self) -> None:
        self._pager.stop()
        self._arena.remove()
        self._members.close()
        self._selector.close()
        self.__dict__.clear()  # callbacks have made circles of all this, whose views would keep the arena mapped

    # ---- the pager

    def _on_pager(self, message: FromPager) -> None:
        match message:
            case PagerReady():
                self._read_mode, self._read_mode_reason = message.read_mode, message.read_mode_reason
            case WarmStartProblem(reason):
                self._warm_start_problem = reason
            case _:
                pass  # who waits for an expert that cannot be loaded is told by the arena

    # ---- the processes that use the cache

    def _on_join(self, member: Member) -> None:
        assert member.process is not None
        member.send(CacheJoined(member.process, self._config, self._plan))

    def _on_member_gone(self, process: int, died: bool) -> None:
        pins = self._arena.arena.unpin_all(process)
        if died:
            self._pins_reclaimed += pins

    def _on_message(self, member: Member, message: ToOwner) -> None:
        match message:
            case GetStats(query):
                resident = self._arena.arena.resident_experts()
                member.send(CacheStats(query, self._stats(len(resident)), resident))
            case ResetStats():
                self._counters.reset()
                self._disk_reads.reset(self._pager.pid)
            case PinExperts() | UnpinExperts() | PageOutExperts():
                if problem := self._user_pins.problem(message.layer, message.experts):
                    member.send(MessageRefused(message.query, problem))
                else:
                    member.send(answer(self._user_pins, message))
            case _:
                pass

    def _stats(self, resident: int) -> ExpertCacheStats:
        return cache_stats(
            self._counters,
            self._plan.geometry,
            self._user_pins,
            resident=resident,
            disk_bytes_read=self._disk_reads.total(self._pager.pid),
            read_mode=self._read_mode,
            read_mode_reason=self._read_mode_reason,
            processes=self._members.pids,
            pins_reclaimed=self._pins_reclaimed,
            pager_pid=self._pager.pid,
            pager_restarts=self._pager.restarts,
            warm_start_problem=self._warm_start_problem,
        )
