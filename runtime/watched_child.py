"""A child process that a selector watches: what it says, what there is still to say to it, and its death."""

from __future__ import annotations

import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from hotset.runtime.channel import ChannelClosed, UnreadableMessage, poll_for_room
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.supervision import Child

STOP_SECONDS = 1.0  # children that have not left by then are killed
MAX_FAILED_STARTS = 3  # in a row

Received = TypeVar("Received")


class Fatal(Exception):
    """What the children work for cannot go on; the message is for the user."""


class FailedStarts:
    """Gives up when children of one kind die before they ever work: restarting would go on for ever."""

    def __init__(self) -> None:
        self._count = 0

    def note_death(self, was_ready: bool, who: str, how: str) -> None:
        """Raises `Fatal`."""
        self._count = 0 if was_ready else self._count + 1
        if self._count >= MAX_FAILED_STARTS:
            raise Fatal(f"the {who} cannot start: it {how}, {self._count} times in a row")


class WatchedChild(Generic[Received]):
    """Args:
    module, received, options: of `Child`.
    who: it is, for the log.
    selector: calls back `key.data()` when the child speaks, dies, or has room for what is queued for it.
    on_message: is told each message.
    on_heard: is called when all that the child had to say for now has been heard; not for its last words.
    on_death: is called while it is a zombie: nobody has its process id yet. `hear` its last words, then `bury` it.
    """

    def __init__(
        self,
        module: str,
        received: Any,
        who: str,
        selector: selectors.BaseSelector,
        on_message: Callable[[Received], None],
        on_death: Callable[[], None],
        on_heard: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        self.child = Child[Received](module, received, **options)
        self._who = who
        self._selector = selector
        self._on_message = on_message
        self._on_heard = on_heard
        self._is_buried = False
        selector.register(self.child.channel, selectors.EVENT_READ, self._on_readable)
        selector.register(self.child.pidfd, selectors.EVENT_READ, on_death)

    @property
    def pid(self) -> int:
        return self.child.pid

    def send(self, message: msgspec.Struct) -> None:
        try:
            self.child.channel.send(message)
        except ChannelClosed:
            return  # its pidfd tells the rest
        poll_for_room(self._selector, self.child.channel)

    def _on_readable(self) -> None:
        if self._is_buried:  # its death came first out of the same poll
            return
        self.hear()
        if self._on_heard is not None:
            self._on_heard()

    def hear(self) -> None:
        try:
            for message in self.child.channel.receive():
                self._on_message(message)
            self.child.channel.flush()
            poll_for_room(self._selector, self.child.channel)
        except UnreadableMessage as error:
            # Whatever is wrong with it, its messages are missing from now on: another takes its place.
            print(f"{self._who}: {error}", file=sys.stderr, flush=True)
            self._unregister(self.child.channel)
            self.child.kill()
        except ChannelClosed:
            self._unregister(self.child.channel)  # until its pidfd tells the rest it would be readable all the time

    def bury(self) -> str:
        """Reaps it, and says how it ended."""
        self._is_buried = True
        self._unregister(self.child.channel)
        self._unregister(self.child.pidfd)
        return self.child.reap()

    def kill(self) -> None:
        self.child.kill()

    def ask_to_leave(self, *, working: bool) -> None:
        """In good order where it has begun to work; `reap_all` is next."""
        if working:
            self.send(StopWorking())
        else:
            self.child.kill()

    def _unregister(self, source: Any) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)


def reap_all(children: Sequence[WatchedChild[Any]]) -> None:
    """Of children that were asked to leave: those that do not are killed."""
    deadline = time.monotonic() + STOP_SECONDS
    for watched in children:
        try:
            watched.child.reap(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            watched.child.kill()
            watched.child.reap()
