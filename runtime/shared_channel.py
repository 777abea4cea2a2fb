"""A channel for a program of many threads: any of them sends, one does the socket's work and hears what comes."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from hotset.runtime.channel import Channel, ChannelClosed

Received = TypeVar("Received")


class SharedChannel(Generic[Received]):
    """Only the thread that runs `messages` touches the channel itself.

    `send` waits for nothing, so it may be called from wherever Python interrupts a thread, in the middle of another
    `send` too: by a signal handler that asks something, or by the garbage collector that closes a stream.
    """

    def __init__(self, channel: Channel[Received]) -> None:
        self._channel = channel
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Held for no longer than a write to it takes, and by a thread that has it already a second time: see above.
        self._wake_is_open = threading.RLock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises `MessageTooLong`. What the other end does not live to read is lost, and `messages` ends."""
        self.send_frame(self._channel.frame(message))

    def send_frame(self, frame: bytes) -> None:
        self._frames.put(frame)
        with self._wake_is_open:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def messages(self) -> Iterator[Received]:
        """All that come, until the other end is gone, or this one closed; sends meanwhile."""
        channel, poll = self._channel, select.poll()
        try:
            poll.register(self._wake, select.POLLIN)
            while True:
                yield from channel.receive()
                self._send_queued()
                poll.register(channel, select.POLLIN | (select.POLLOUT if channel.pending_nbytes else 0))
                poll.poll()
        except (ChannelClosed, OSError, ValueError):  # ValueError: closed here
            return

    def _send_queued(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)  # before looking: what is queued later makes it readable again
        try:
            self._channel.flush()
            while True:
                self._channel.send_frame(self._frames.get_nowait())
        except (queue.Empty, ChannelClosed):
            pass  # closed: its last words may still be here, and then comes the end of file

    def close(self) -> None:
        """`messages` must have ended, unless this is called from there."""
        with self._wake_is_open:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
        self._channel.close()
