"""Any thread sends, wherever it is interrupted, and waits for nothing; what came is heard to the last word."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.messages.client import Abort, CheckCache, Submit
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.shared_channel import SharedChannel

LARGE = Submit(1, bytes(1 << 21), SamplingParams())  # more than a socket takes


class Ends:
    """A shared channel whose messages a thread collects, and a plain one at the other end."""

    def __init__(self) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.theirs = Channel[Any](theirs, Submit | Abort | CheckCache)
        self.shared = SharedChannel(Channel[Any](ours, Abort))
        self.heard: list[Any] = []
        self.reader = threading.Thread(target=self._hear, daemon=True)
        self.reader.start()

    def _hear(self) -> None:
        self.heard.extend(self.shared.messages())

    def receive(self, count: int) -> list[Any]:
        """The next messages at the other end."""
        messages: list[Any] = []
        while len(messages) < count:
            messages.append(self.theirs.wait())
            messages.extend(self.theirs.receive())
        return messages

    def close(self) -> None:
        self.theirs.close()
        self.reader.join(10)
        assert not self.reader.is_alive()
        self.shared.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_messages_of_many_threads_arrive_whole_and_each_threads_in_order(ends: Ends) -> None:
    def send(first: int) -> None:
        for number in range(first, first + 200):
            ends.shared.send(Submit(number, bytes(number), SamplingParams()))

    threads = [threading.Thread(target=send, args=(1000 * thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    received = ends.receive(800)
    assert sorted(message.request for message in received) == sorted(
        first + number for first in range(0, 4000, 1000) for number in range(200)
    )
    assert all(len(message.prompt) == message.request for message in received)
    for thread in range(4):
        numbers = [message.request for message in received if message.request // 1000 == thread]
        assert numbers == sorted(numbers)
    for thread in threads:
        thread.join(10)


def test_a_send_waits_neither_for_the_other_end_nor_for_another_send(ends: Ends) -> None:
    for _ in range(4):
        ends.shared.send(LARGE)
    ends.shared.send(Abort(2))
    assert ends.receive(5) == [LARGE] * 4 + [Abort(2)]


def test_a_send_may_interrupt_a_send(ends: Ends) -> None:
    """As a signal handler does, or the garbage collector."""
    interruptions = 0

    def interrupt(*_: object) -> None:
        nonlocal interruptions
        interruptions += 1
        ends.shared.send(CheckCache(interruptions))

    before = signal.signal(signal.SIGALRM, interrupt)
    sent = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        while interruptions < 50:
            ends.shared.send(Submit(sent, bytes(1000), SamplingParams()))
            sent += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    received = ends.receive(sent + interruptions)
    assert [message.request for message in received if isinstance(message, Submit)] == list(range(sent))
    # A slow handler is interrupted itself, between counting and sending.
    queries = sorted(message.query for message in received if isinstance(message, CheckCache))
    assert queries == list(range(1, interruptions + 1))


def test_the_last_words_of_who_does_not_listen_are_heard(ends: Ends) -> None:
    ends.theirs.send(Abort(1))
    ends.theirs.send(Abort(2))
    ends.theirs.close()
    ends.shared.send(LARGE)
    ends.reader.join(10)
    assert ends.heard == [Abort(1), Abort(2)]
    ends.shared.send(LARGE)  # nobody hears it


def test_a_close_ends_it_and_a_later_send_is_lost() -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    shared = SharedChannel(Channel[Any](ours, Abort))
    with theirs:
        shared.close()
        shared.send(Abort(1))
        assert list(shared.messages()) == []


@pytest.mark.usefixtures("many_open_files")
def test_descriptors_beyond_those_of_select_will_do() -> None:
    ends = Ends()
    assert ends.theirs.fileno() > 1024
    ends.shared.send(LARGE)
    assert ends.receive(1) == [LARGE]
    ends.theirs.send(Abort(1))
    ends.close()
    assert ends.heard == [Abort(1)]
    with pytest.raises(ChannelClosed):
        ends.theirs.send(Abort(1))
