"""A process's part in an expert cache: its row, and what it asks the owner. See members.py for the other end."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.errors import RequestFailed
from hotset.runtime.experts.errors import ExpertCacheClosed, ExpertCacheError, ExpertCacheFull
from hotset.runtime.experts.members import address_of, peer_of
from hotset.runtime.experts.messages import CacheIsFull, CacheJoined, FromOwner, JoinCache, LeaveCache
from hotset.runtime.messages.client import InstanceFailed, MessageRefused
from hotset.shm.process import start_time

JOIN_SECONDS = 10.0
DEATH_SECONDS = 0.1  # between the end of a killed process's sockets and its own


class Membership:
    """Of this process, from any of its threads; a process that is forked from it has no part in it.

    The owner's death is what its pidfd says: a fork of the owner may hold sockets open that it had.

    Args:
        name: of the cache.
        sock: connected to its owner.

    Attributes:
        joined: the row, and what the cache is.
    """

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._channel: Channel[FromOwner] = Channel(sock, FromOwner)
        self._owner = -1
        self._ended: str | None = None
        self._dead = f"the process that owns the expert cache {name!r} is dead"
        self._closed = f"the owner of the expert cache {name!r} has closed it"
        try:
            pid, uid = peer_of(sock)
            if uid != os.getuid():
                raise ExpertCacheError(f"the expert cache {name!r} is another user's")
            try:
                self._owner = os.pidfd_open(pid)
            except ProcessLookupError:
                raise ExpertCacheError(f"there is no expert cache {name!r}: its owner is dead") from None
            self._channel.send(JoinCache(start_time(self._process) or 0))
            answer = self._receive(time.monotonic() + JOIN_SECONDS)
            if isinstance(answer, CacheIsFull):
                raise ExpertCacheFull(name, answer.processes)
            if not isinstance(answer, CacheJoined):
                raise ExpertCacheError(f"the expert cache {name!r} does not answer")
        except ChannelClosed:
            self._let_go()
            raise ExpertCacheError(f"there is no expert cache {name!r} any more: it is being closed") from None
        except BaseException:
            self._let_go()
            raise
        self.joined: CacheJoined = answer

    @classmethod
    def join(cls, name: str) -> Membership:
        """Raises `ExpertCacheError`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(address_of(name))
        except OSError:
            sock.close()
            raise ExpertCacheError(f"there is no expert cache {name!r} of this user") from None
        return cls(name, sock)

    def check(self) -> None:
        """Raises `ExpertCacheClosed` if this process has no part in the cache any more, as far as is known."""
        if os.getpid() != self._process:
            raise ExpertCacheClosed(
                f"this ExpertCache belongs to process {self._process}, and process {os.getpid()} was forked from it: "
                f"it needs ExpertCache.attach({self.name!r})"
            )
        if self._ended is not None:
            raise ExpertCacheClosed(self._ended)

    def check_owner(self, *, closed: bool) -> None:
        """The same, and looks whether the owner lives. `closed`: whether the arena says that it has closed the cache,
        of which it may have said why."""
        self.check()
        if closed:
            with self._lock, contextlib.suppress(ChannelClosed):
                for message in self._channel.receive():
                    if isinstance(message, InstanceFailed):
                        self.end(message.reason)
            self.end(self._closed)
        elif _is_readable(self._owner):
            self.end(self._dead)
        self.check()

    def ask(self, question: Callable[[int], msgspec.Struct]) -> Any:
        """Sends what has one answer, and waits for it. Raises `RequestFailed` or `ExpertCacheClosed`."""
        with self._lock:
            self.check()
            try:
                self._channel.send(question(next(self._numbers)))
                answer = self._receive()
                if answer is None:
                    self.end(self._dead)
                elif isinstance(answer, InstanceFailed):
                    self.end(answer.reason)
            except ChannelClosed:
                answer = None
                is_dead = _is_readable(self._owner, DEATH_SECONDS)
                self.end(self._dead if is_dead else self._closed)
            self.check()
        if isinstance(answer, MessageRefused):
            raise RequestFailed(answer.reason)
        return answer

    def tell(self, message: msgspec.Struct) -> None:
        with self._lock:
            self.check()
            with contextlib.suppress(ChannelClosed):
                self._channel.send(message)

    def end(self, reason: str | None = None) -> None:
        """From now on every call is an error, for the first reason that was given; the row is still this process's."""
        self._ended = self._ended or reason or f"the expert cache {self.name!r} is closed"

    def leave(self) -> None:
        """Gives the row back. May be called again; in a fork it does nothing."""
        if os.getpid() != self._process:
            return
        self.end()
        with self._lock:
            if self._owner >= 0:
                with contextlib.suppress(ChannelClosed):
                    self._channel.send(LeaveCache())
                self._let_go()

    def _let_go(self) -> None:
        self._channel.close()
        if self._owner >= 0:
            os.close(self._owner)
            self._owner = -1

    def _receive(self, deadline: float | None = None) -> FromOwner | None:
        """The next message; None if the owner is dead, or the deadline past."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._owner, select.POLLIN)
        while True:
            for message in self._channel.receive():
                return message
            if _is_readable(self._owner) or (deadline is not None and time.monotonic() >= deadline):
                return None
            self._channel.flush()
            poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000)


def _is_readable(fd: int, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
