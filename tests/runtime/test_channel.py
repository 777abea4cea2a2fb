"""Messages arrive whole and in order, and what is no message is said to be none and passed over."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from hotset.runtime import channel as channels
from hotset.runtime.channel import Channel, ChannelClosed, MessageTooLong, UnreadableMessage
from hotset.runtime.messages.client import Abort, FromClient, GetStats, number_of


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel[Any]]]:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        channel = Channel[Any](ours, FromClient)
        yield theirs, channel
        channel.close()


def frame(message: msgspec.Struct | bytes) -> bytes:
    body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return channels.HEADER.pack(channels.MAGIC, len(body)) + body


def drain(channel: Channel[Any]) -> tuple[list[Any], list[str]]:
    """The messages that came, and what was said of anything else."""
    messages: list[Any] = []
    complaints: list[str] = []
    while True:
        try:
            messages += channel.receive()
            return messages, complaints
        except UnreadableMessage as error:
            complaints.append(str(error))


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100),
    "one byte": b"x",
    "a length that is never reached": struct.pack("<I", 1 << 24),
    "the beginning of a header": channels.MAGIC[:3],
    "half a header in it": b"abc" + channels.MAGIC[:2] + b"de",
    "more than is received at once": bytes(channels.RECEIVE_NBYTES + 7),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_bytes_that_are_no_message_are_passed_over_with_one_complaint(
    ends: tuple[socket.socket, Channel[Any]], garbage: bytes
) -> None:
    theirs, channel = ends
    theirs.sendall(frame(Abort(1)) + garbage + frame(Abort(2)) + frame(Abort(3)))
    messages, complaints = drain(channel)
    assert messages == [Abort(1), Abort(2), Abort(3)]
    assert len(complaints) == 1 and "expected a message" in complaints[0]


def test_a_stream_of_garbage_is_one_complaint_and_takes_no_memory(ends: tuple[socket.socket, Channel[Any]]) -> None:
    theirs, channel = ends
    complaints: list[str] = []
    for _ in range(50):
        theirs.sendall(bytes(channels.RECEIVE_NBYTES))
        complaints += drain(channel)[1]
    assert len(complaints) == 1
    assert channel.waiting_nbytes < len(channels.MAGIC)
    theirs.sendall(frame(Abort(2)))
    assert drain(channel) == ([Abort(2)], [])
    theirs.sendall(b"again" + frame(Abort(3)))
    messages, complaints = drain(channel)
    assert messages == [Abort(3)] and len(complaints) == 1


WRONG_BODIES = {
    "empty": b"",
    "never used": b"\xc1",
    "bytes": b"garbage",
    "a field is missing": msgspec.msgpack.encode({"type": "Abort"}),
    "a type is wrong": msgspec.msgpack.encode({"type": "Abort", "request": "one"}),
    "no such message": msgspec.msgpack.encode({"type": "Format", "disk": 1}),
    "a list": msgspec.msgpack.encode([1, 2, 3]),
    "too much": msgspec.msgpack.encode(Abort(1)) + b"more",
    "a value is wrong": msgspec.msgpack.encode(
        {"type": "Submit", "request": 1, "prompt": b"", "params": {"top_p": -1}}
    ),
    "no UTF-8": b"\x82\xa4type\xa5Abort\xa7request\xa3\xff\xfe\xfd",
    "nested deeply": b"\x81\xa1x" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("body", WRONG_BODIES.values(), ids=WRONG_BODIES.keys())
def test_a_frame_of_the_wrong_shape_is_a_complaint_about_it_alone(
    ends: tuple[socket.socket, Channel[Any]], body: bytes
) -> None:
    theirs, channel = ends
    theirs.sendall(frame(Abort(1)) + frame(body) + frame(Abort(2)))
    messages, complaints = drain(channel)
    assert messages == [Abort(1), Abort(2)]
    assert len(complaints) == 1 and f"a message of {len(body)} bytes" in complaints[0]


def test_an_over_long_frame_is_passed_over_without_being_kept(ends: tuple[socket.socket, Channel[Any]]) -> None:
    theirs, channel = ends
    length = channels.MAX_MESSAGE_NBYTES + 1
    theirs.sendall(channels.HEADER.pack(channels.MAGIC, length))
    assert drain(channel) == ([], [f"a message of {length} bytes came, expected at most {length - 1}"])
    for _ in range(20):
        theirs.sendall(bytes(channels.RECEIVE_NBYTES))
        assert drain(channel) == ([], [])
    assert channel.waiting_nbytes < len(channels.MAGIC)
    theirs.sendall(frame(Abort(2)))
    assert drain(channel) == ([Abort(2)], [])


def test_a_message_that_nobody_would_take_is_not_sent(
    ends: tuple[socket.socket, Channel[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, channel = ends
    monkeypatch.setattr(channels, "MAX_MESSAGE_NBYTES", 8)
    with pytest.raises(MessageTooLong, match=r"the message takes \d+ bytes, expected at most 8"):
        channel.send(Abort(1))
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_a_socket_that_another_descriptor_makes_blocking_blocks_nobody(
    ends: tuple[socket.socket, Channel[Any]],
) -> None:
    theirs, channel = ends
    with socket.socket(fileno=os.dup(channel.fileno())) as other:
        other.setblocking(True)  # a flag of the socket, not of the descriptor

    def too_late(*_: object) -> None:
        raise TimeoutError("blocked for 2 s, expected no blocking")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        theirs.sendall(frame(Abort(1)))
        assert list(channel.receive()) == [Abort(1)]
        while not channel.pending_nbytes:
            channel.send(Abort(2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_who_does_not_go_on_takes_an_unreadable_message_as_the_end(ends: tuple[socket.socket, Channel[Any]]) -> None:
    theirs, channel = ends
    theirs.sendall(frame(b"garbage"))
    with pytest.raises(ChannelClosed):
        list(channel.receive())
    theirs.close()
    with pytest.raises(ChannelClosed, match="end of file"):
        list(channel.receive())


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (msgspec.msgpack.encode({"type": "Submit", "request": 7, "prompt": 3}), 7),
        (msgspec.msgpack.encode({"type": "Defragment", "query": 8, "max_moves": "x"}), 8),
        (msgspec.msgpack.encode(GetStats(9)), 9),
        (msgspec.msgpack.encode({"type": "Submit", "request": "x"}), None),
        (msgspec.msgpack.encode([1]), None),
        (b"garbage", None),
        (b"", None),
    ],
)
def test_the_number_of_who_waits_is_found_where_there_is_one(body: bytes, number: int | None) -> None:
    assert number_of(body) == number
