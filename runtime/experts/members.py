"""The processes that use an expert cache, as its owner sees them: who has which row, and who is dead.

A row is its process's until that leaves or dies, however its connection ends: who has lost its socket may still read
slots. Death is what the pidfd says.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
from collections.abc import Callable
from functools import partial

import msgspec

from hotset.runtime.channel import Channel, ChannelClosed, UnreadableMessage, poll_for_room
from hotset.runtime.experts.messages import CacheIsFull, JoinCache, LeaveCache, ToOwner
from hotset.runtime.messages.client import MessageRefused, number_of
from hotset.shm.process import start_time

CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return pid, uid


def address_of(name: str) -> bytes:
    """Where the owner of a cache listens: an abstract address, which goes with its socket. Nothing is left of it."""
    return f"\0hotset.{os.getuid()}.{name}".encode()


class Member:
    """A connection; `process` is its row, None until it has joined."""

    def __init__(self, sock: socket.socket) -> None:
        self.peer = peer_of(sock)
        self.channel: Channel[ToOwner] = Channel(sock, ToOwner)
        self.process: int | None = None
        self.pidfd = -1

    @property
    def pid(self) -> int:
        return self.peer[0]

    def send(self, message: msgspec.Struct) -> None:
        try:
            self.channel.send(message)
        except ChannelClosed:
            pass  # its pidfd tells the rest


class Members:
    """Args:
    name: of the cache.
    rows: how many may join.
    selector: calls back `key.data()` when one speaks, dies or connects; the owner polls it.
    on_join: is told of one that has got a row.
    on_message: answers the others' messages.
    on_gone: reclaims the row of one that left or died; with whether it died.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        selector: selectors.BaseSelector,
        on_join: Callable[[Member], None],
        on_message: Callable[[Member, ToOwner], None],
        on_gone: Callable[[int, bool], None],
    ) -> None:
        self._name = name
        self._rows = rows
        self._selector = selector
        self._on_join = on_join
        self._on_message = on_message
        self._on_gone = on_gone
        self._connected: set[Member] = set()
        self._joined: dict[int, Member] = {}  # by row
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def listen(self) -> None:
        self._listener.bind(address_of(self._name))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def pids(self) -> list[int]:
        return [self._joined[process].pid for process in sorted(self._joined)]

    def add(self, sock: socket.socket) -> None:
        member = Member(sock)
        if member.peer[1] != os.getuid():  # an abstract address has no permissions
            member.channel.close()
            return
        self._connected.add(member)
        self._selector.register(member.channel, selectors.EVENT_READ, partial(self._hear, member))

    def tell_all(self, message: msgspec.Struct) -> None:
        for member in self._connected:
            member.send(message)

    def close(self) -> None:
        """All connections end; who reads slots goes on doing so, in memory that nobody writes any more."""
        self._listener.close()
        for member in self._connected:
            member.channel.close()
        for member in self._joined.values():
            os.close(member.pidfd)
        self._connected.clear()
        self._joined.clear()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        self.add(sock)

    def _hear(self, member: Member) -> None:
        while True:
            try:
                for message in member.channel.receive():
                    self._answer(member, message)
                    if member not in self._connected:
                        return
                member.channel.flush()
                poll_for_room(self._selector, member.channel)
                return
            except UnreadableMessage as error:
                if (number := number_of(error.body)) is not None:
                    member.send(MessageRefused(number, str(error)))
            except ChannelClosed:
                self._disconnect(member)
                return

    def _answer(self, member: Member, message: ToOwner) -> None:
        match message:
            case JoinCache() if member.process is None:
                self._join(member, message)
            case LeaveCache():
                self._disconnect(member)
                self._remove(member, died=False)
            case JoinCache():
                pass
            case _ if member.process is not None:
                self._on_message(member, message)
            case _:
                self._disconnect(member)

    def _join(self, member: Member, message: JoinCache) -> None:
        free = next((row for row in range(self._rows) if row not in self._joined), None)
        if free is None:
            member.send(CacheIsFull(self._rows))
            return
        try:
            member.pidfd = os.pidfd_open(member.pid)
        except ProcessLookupError:
            return
        if start_time(member.pid) != message.start_time:  # it died, and another has its id
            os.close(member.pidfd)
            return
        member.process = free
        self._joined[free] = member
        self._selector.register(member.pidfd, selectors.EVENT_READ, partial(self._bury, member))
        self._on_join(member)

    def _bury(self, member: Member) -> None:
        """It is dead: its id may be another's from now on, but nobody has its row before this is done."""
        self._disconnect(member)
        self._remove(member, died=True)

    def _disconnect(self, member: Member) -> None:
        if member in self._connected:
            self._connected.remove(member)
            self._selector.unregister(member.channel)
            member.channel.close()

    def _remove(self, member: Member, *, died: bool) -> None:
        if member.process is None:
            return
        self._selector.unregister(member.pidfd)
        os.close(member.pidfd)
        self._on_gone(member.process, died)
        del self._joined[member.process]
        member.process = None
