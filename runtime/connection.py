"""The connection to a coordinator: its process, the thread that reads what it says, and who waits for answers."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from hotset.runtime.errors import BackendError, HotsetError, RequestFailed
from hotset.runtime.messages.client import (
    Abort,
    Generated,
    InstanceFailed,
    InstanceReady,
    MessageRefused,
    Reply,
    Shutdown,
    ToClient,
)
from hotset.runtime.shared_channel import SharedChannel
from hotset.runtime.supervision import Child, last_words
from hotset.shm.segment import InstanceLock, InstanceNameTaken, remove_ipc_objects

COORDINATOR_MODULE = "hotset.runtime.coordinator"
START_SECONDS = 60.0
STOP_SECONDS = 5.0


class Connection:
    """Starts a coordinator. What it is asked has a number, and answers come into a queue of that number.

    Who waits has a queue in `_waiting`, and only then looks whether the coordinator is `_dead`; the reader thread says
    so first, and then tells every queue. So nobody waits for ever, and no lock is held, which the garbage collector
    would need to end an abandoned stream wherever it finds one. In a process forked from the one that made the
    connection nobody reads answers: there every use is an error, but for `end`, which does nothing.

    All methods may be called from any thread, and from signal handlers.

    Attributes:
        instance: the name of what the coordinator shall start.
        worker_pids, pager_pid: once it is ready.
    """

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.worker_pids: list[int] = []
        self.pager_pid = 0
        self._process = os.getpid()
        self._waiting: dict[int, queue.SimpleQueue[Generated | Reply | HotsetError]] = {}
        self._numbers = itertools.count()
        self._reap_lock = threading.RLock()  # taken again by a signal handler in its thread
        self._ready = threading.Event()
        self._dead: BackendError | None = None
        self._first_close = threading.Lock()  # never released
        self._closing = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the coordinator
        self._coordinator: Child[ToClient] = Child(
            COORDINATOR_MODULE, ToClient, dies_with_us=False, own_session=True, stderr=self._stderr
        )
        self._channel = SharedChannel(self._coordinator.channel)
        self._reader = threading.Thread(target=self._read, name=f"hotset-{self.instance}", daemon=True)
        try:
            self._reader.start()
        except BaseException:
            self.close()
            raise

    # ---- its life

    @property
    def coordinator_pid(self) -> int:
        return self._coordinator.pid

    @property
    def is_forked(self) -> bool:
        return os.getpid() != self._process

    def wait_until_ready(self) -> None:
        if not self._ready.wait(START_SECONDS):
            raise BackendError(f"the instance was not ready after {START_SECONDS:.0f} s")
        self.raise_if_dead()

    def close(self) -> None:
        """Stops the processes, removes what they shared, and tells all who wait. May be called again."""
        if not self._first_close.acquire(blocking=False):
            return
        try:
            self._closing = True
            self.send(Shutdown())
            self._reap(STOP_SECONDS)
        except BaseException:  # a second Ctrl-C, say: whoever interrupts this wants it to end now
            self._coordinator.kill()
            self._reap(STOP_SECONDS)
            raise
        finally:
            self._die(BackendError("the backend is closed"))
            if self._reader.is_alive() and self._reader is not threading.current_thread():
                self._reader.join(STOP_SECONDS)
            self._channel.close()
            self._stderr.close()

    def abandon(self) -> None:
        """Stops the processes without waiting for it: the reader thread cleans up. For the garbage collector."""
        if self._dead is None and not self._closing and not self.is_forked:
            self.send(Shutdown())

    def raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead

    # ---- questions and answers

    def begin(self, message: Callable[[int], msgspec.Struct]) -> int:
        """Sends what `message` makes of a new number, and returns the number: `answer` and `end` are next."""
        self._raise_if_forked()
        number = next(self._numbers)
        self._waiting[number] = queue.SimpleQueue()
        try:
            self.raise_if_dead()
            self.send(message(number))
        except BaseException:
            self.end(number, aborts=True)
            raise
        return number

    def answer(self, number: int) -> Any:
        """Waits for the next answer of this number; an error that comes in its place is raised."""
        self._raise_if_forked()
        answer = self._waiting[number].get()
        if isinstance(answer, HotsetError):
            raise answer
        return answer

    def end(self, number: int, *, aborts: bool = False) -> None:
        """Nobody waits for answers of this number any more. With `aborts` the coordinator hears of it."""
        if self.is_forked:
            return
        self._waiting.pop(number, None)
        if aborts and self._dead is None:
            self.send(Abort(number))

    def ask(self, question: Callable[[int], msgspec.Struct]) -> Any:
        """Sends what has one answer, and waits for it."""
        number = self.begin(question)
        try:
            return self.answer(number)
        finally:
            self.end(number)

    def send(self, message: msgspec.Struct) -> None:
        self._raise_if_forked()
        self._channel.send(message)

    def _raise_if_forked(self) -> None:
        if self.is_forked:
            raise BackendError(
                f"this Backend belongs to process {self._process}, and process {os.getpid()} was forked from it: it "
                "needs a Backend of its own"
            )

    # ---- the reader thread, and the end

    def _read(self) -> None:
        """The reader thread: hands answers to whoever waits for them, until the coordinator is gone."""
        error = BackendError("the thread that reads answers has failed")
        try:
            error = self._hand_out_answers()
        finally:
            self._die(error)

    def _hand_out_answers(self) -> BackendError:
        """Returns what ended the instance."""
        reason = None
        for message in self._channel.messages():
            match message:
                case Generated(request=number):
                    self._hand_over(number, message)
                case InstanceReady():
                    self.worker_pids = message.worker_pids
                    self.pager_pid = message.pager_pid
                    self._ready.set()
                case InstanceFailed():
                    reason = message.reason
                case MessageRefused():
                    self._hand_over(message.number, RequestFailed(message.reason))
                case _:
                    self._hand_over(message.query, message)
        if self._closing:
            return BackendError("the backend is closed")
        how = self._reap(STOP_SECONDS)
        return BackendError((reason or f"the coordinator {how}") + last_words(self._stderr))

    def _hand_over(self, number: int, answer: Generated | Reply | HotsetError) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.put(answer)

    def _reap(self, timeout: float) -> str:
        """Waits for the coordinator's end, by force if need be, and cleans up after it. Says how it ended."""
        with self._reap_lock:
            try:
                how = self._coordinator.reap(timeout, close_channel=False)
            except subprocess.TimeoutExpired:
                self._coordinator.kill()
                how = self._coordinator.reap(close_channel=False)
            # Where the name is another instance's by now, or /dev/shm cannot be written, nothing of ours is left there.
            with contextlib.suppress(InstanceNameTaken, OSError):
                lock = InstanceLock(self.instance)
                try:
                    remove_ipc_objects(self.instance)
                finally:
                    lock.release()
            return how

    def _die(self, error: BackendError) -> None:
        """From now on every waiting and every further call gets `error`."""
        self._dead = self._dead or error
        for waiting in [*self._waiting.values()]:
            waiting.put(error)
        self._ready.set()
