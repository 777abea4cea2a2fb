"""Messages between processes: msgspec structs over a Unix stream socket, each behind a header with its length."""

from __future__ import annotations

import select
import selectors
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from hotset.runtime.errors import HotsetError

HEADER = struct.Struct("<4sI")  # MAGIC, bytes of the message
MAGIC = b"\xc1hot"  # MessagePack never begins a value with 0xc1
MAX_MESSAGE_NBYTES = 1 << 28
RECEIVE_NBYTES = 1 << 16

Received = TypeVar("Received")


class ChannelClosed(Exception):
    """The process at the other end has closed its socket, or is dead."""


class UnreadableMessage(ChannelClosed):
    """What came is no message of the types that are accepted here. `body` is its content, if that much was clear.

    Whoever wants to go on calls `receive` again; others take it as the end of the channel.
    """

    def __init__(self, reason: str, body: bytes = b"") -> None:
        super().__init__(reason)
        self.body = body


class MessageTooLong(HotsetError):
    """Nobody would take the message, so it is not sent."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"the message takes {needed} bytes, expected at most {available}")
        self.needed = needed
        self.available = available


class Channel(Generic[Received]):
    """One end of a socket. `received` is the union of message types that this end accepts.

    It never blocks but in `wait`, whatever another process or descriptor has made of the socket's own flag
    (MSG_DONTWAIT): a reader that blocked between two messages would never hand the first of them on.

    `send` queues what the socket does not take at once; `pending_nbytes` lets the caller stop producing for a slow
    reader. The loop that polls the socket calls `flush` when it is writable again.
    """

    def __init__(self, sock: socket.socket, received: Any) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(received).decode
        self._input = bytearray()
        self._is_lost = False  # looking for the next header
        self._output: deque[memoryview] = deque()
        self.pending_nbytes = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Sends, or queues, one message; raises `ChannelClosed` if nobody is there, or `MessageTooLong`."""
        self.send_frame(self.frame(message))

    def frame(self, message: msgspec.Struct) -> bytes:
        """The message as `send_frame` takes it; raises `MessageTooLong`. Any thread may call this."""
        data = self._encode(message)
        if len(data) > MAX_MESSAGE_NBYTES:
            raise MessageTooLong(len(data), MAX_MESSAGE_NBYTES)
        return HEADER.pack(MAGIC, len(data)) + data

    def send_frame(self, frame: bytes) -> None:
        self._output.append(memoryview(frame))
        self.pending_nbytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Sends what is queued, as far as the socket takes it."""
        while self._output:
            frame = self._output[0]
            try:
                sent = self._socket.send(frame, socket.MSG_DONTWAIT)
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
        """The messages that have arrived whole; raises `ChannelClosed` at end of file, after yielding them.

        What is no message raises `UnreadableMessage`, once for all bytes up to the next one; the next call goes on
        behind it.
        """
        closed = False
        while True:
            try:
                data = self._socket.recv(RECEIVE_NBYTES, socket.MSG_DONTWAIT)
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
        poll = select.poll()  # select() takes no descriptor beyond the first 1,024, of which a host may have more
        poll.register(self._socket, select.POLLIN)
        while True:
            poll.poll()
            for message in self.receive():
                return message

    @property
    def waiting_nbytes(self) -> int:
        """Of a message that has begun to arrive."""
        return len(self._input)

    def _messages(self) -> Iterator[Received]:
        start = 0
        try:
            while True:
                header = self._find_header(start)
                skipped, start = header - start, header
                if skipped and not self._is_lost:
                    self._is_lost = True
                    raise UnreadableMessage(f"{skipped} bytes or more came that begin no message, expected a message")
                if len(self._input) - start < HEADER.size:
                    return
                self._is_lost = False
                _, length = HEADER.unpack_from(self._input, start)
                if length > MAX_MESSAGE_NBYTES:
                    self._is_lost = True
                    start += HEADER.size
                    raise UnreadableMessage(f"a message of {length} bytes came, expected at most {MAX_MESSAGE_NBYTES}")
                end = start + HEADER.size + length
                if len(self._input) < end:
                    return
                body = bytes(self._input[start + HEADER.size : end])
                start = end
                yield self._read(body)
        finally:
            del self._input[:start]

    def _find_header(self, start: int) -> int:
        """Where the next header begins, or may begin when more has come."""
        if self._input.startswith(MAGIC, start):
            return start
        found = self._input.find(MAGIC, start)
        if found >= 0:
            return found
        end = len(self._input)
        return next(at for at in range(max(start, end - len(MAGIC) + 1), end + 1) if MAGIC.startswith(self._input[at:]))

    def _read(self, body: bytes) -> Received:
        try:
            return self._decode(body)
        except (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError) as error:
            raise UnreadableMessage(f"a message of {len(body)} bytes cannot be read: {error}", body) from None

    def close(self) -> None:
        self._socket.close()


def poll_for_room(selector: selectors.BaseSelector, channel: Channel[Any]) -> None:
    """What the socket did not take at once goes on as soon as it does: whoever is at the other end may have nothing to
    say, and be waiting for just that. Nothing happens to a channel that the selector does not watch."""
    key = selector.get_map().get(channel)
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.pending_nbytes else 0)
    if key is not None and key.events != events:
        selector.modify(channel, events, key.data)


def channel_pair(received: Any) -> tuple[Channel[Any], socket.socket]:
    """A channel for this process, and the socket that a child is to inherit (`pass_fds`): not inheritable here, for a
    process that another thread starts just then would hold it open after the child's death."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours, received), theirs
