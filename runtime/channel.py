"""Messages between processes: msgspec structs, length-prefixed, over a Unix stream socket."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

_LENGTH = struct.Struct("<I")
MAX_MESSAGE_NBYTES = 1 << 28
RECEIVE_NBYTES = 1 << 16

Received = TypeVar("Received")


class ChannelClosed(Exception):
    """The process at the other end has closed its socket, or is dead."""


class Channel(Generic[Received]):
    """One end of a socket. `received` is the union of message types that this end accepts.

    `send` queues what the socket does not take at once, so it never blocks; `pending_nbytes` lets the caller stop
    producing for a slow reader. The loop that polls the socket calls `flush` when it is writable again.
    """

    def __init__(self, sock: socket.socket, received: Any) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(received).decode
        self._input = bytearray()
        self._output: deque[memoryview] = deque()
        self.pending_nbytes = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Sends, or queues, one message; raises `ChannelClosed` if nobody is there."""
        data = self._encode(message)
        frame = memoryview(_LENGTH.pack(len(data)) + data)
        self._output.append(frame)
        self.pending_nbytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Sends what is queued, as far as the socket takes it."""
        while self._output:
            frame = self._output[0]
            try:
                sent = self._socket.send(frame)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            self.pending_nbytes -= sent
            if sent == len(frame):
                self._output.popleft()
            else:
                self._output[0] = frame[sent:]

    def receive(self) -> Iterator[Received]:
        """The messages that have arrived whole; raises `ChannelClosed` at end of file, after yielding them."""
        closed = False
        while True:
            try:
                data = self._socket.recv(RECEIVE_NBYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                closed = True
                break
            self._input += data
        yield from self._messages()
        if closed:
            raise ChannelClosed("end of file")

    def wait(self) -> Received:
        """Blocks until a message comes. Others that came with it stay here: call `receive` before polling again."""
        while True:
            select.select([self._socket], [], [])
            for message in self.receive():
                return message

    def _messages(self) -> Iterator[Received]:
        start = 0
        try:
            while len(self._input) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._input, start)
                if length > MAX_MESSAGE_NBYTES:
                    raise ChannelClosed(f"a message of {length} bytes was announced")
                end = start + _LENGTH.size + length
                if len(self._input) < end:
                    return
                body = bytes(self._input[start + _LENGTH.size : end])
                start = end
                yield self._decode(body)
        finally:
            del self._input[:start]

    def close(self) -> None:
        self._socket.close()


def channel_pair(received: Any) -> tuple[Channel[Any], socket.socket]:
    """A channel for this process, and the socket that a child is to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    os.set_inheritable(theirs.fileno(), True)
    return Channel(ours, received), theirs
