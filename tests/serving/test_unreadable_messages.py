"""Whatever comes over its socket, the coordinator goes on: one sentence in its log, an error for who waits."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from instances import PROMPTS, wait_until

from hotset.runtime import Backend, RequestFailed, SamplingParams
from hotset.runtime.channel import HEADER, MAGIC, MAX_MESSAGE_NBYTES
from hotset.runtime.messages.client import Defragment, PinExperts, Submit, UnpinExperts

PARAMS = SamplingParams(temperature=0, max_tokens=8, routing="off", ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, routing="off", ignore_eos=True)


def frame(body: bytes) -> bytes:
    return HEADER.pack(MAGIC, len(body)) + body


def write(backend: Backend, data: bytes) -> None:
    """Past the backend, which sends nothing but messages."""
    backend._connection._channel.send_frame(data)


def log(backend: Backend) -> list[str]:
    return Path(f"/proc/{backend.coordinator_pid}/fd/2").read_text().splitlines()


WRONG: dict[str, tuple[bytes, str]] = {
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", "expected a message"),
    "a length without end": (b"\x00\x00\x00\x01", "expected a message"),
    "wrong shape": (frame(msgspec.msgpack.encode({"type": "GetStats", "query": "one"})), "a message of 25 bytes"),
    "no such message": (frame(msgspec.msgpack.encode({"type": "Format"})), "a message of 13 bytes"),
    "over-long": (HEADER.pack(MAGIC, MAX_MESSAGE_NBYTES + 1), f"a message of {MAX_MESSAGE_NBYTES + 1} bytes"),
}


@pytest.mark.parametrize(("data", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_another_request_is_answered_after_what_is_no_message(backend: Backend, data: bytes, sentence: str) -> None:
    before, pids = len(log(backend)), (backend.coordinator_pid, backend.stats().worker_restarts)
    expected = backend.generate(PROMPTS[0], LONG).token_ids
    stream = backend.stream(PROMPTS[0], LONG)
    got = next(stream).token_ids
    write(backend, data)
    assert backend.generate(PROMPTS[1], PARAMS).token_ids
    for piece in stream:
        got += piece.token_ids
    assert got == expected
    assert pids == (backend.coordinator_pid, backend.stats().worker_restarts)
    added = log(backend)[before:]
    assert len(added) == 1 and added[0].startswith("the client: ") and sentence in added[0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda number: Submit(number, b"abc", PARAMS), "3 bytes"),
        (lambda number: {"type": "Submit", "request": number, "prompt": b"", "params": {"top_k": "x"}}, "top_k"),
        (lambda number: {"type": "Submit", "request": number}, "prompt"),
    ],
)
def test_a_request_that_cannot_be_read_fails_and_says_why(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], Any], sentence: str
) -> None:
    send = backend._connection.send

    def spoil(message: msgspec.Struct) -> None:
        if isinstance(message, Submit):
            write(backend, frame(msgspec.msgpack.encode(wrong(message.request))))
        else:
            send(message)

    monkeypatch.setattr(backend._connection, "send", spoil)
    with pytest.raises(RequestFailed, match=sentence):
        backend.generate(PROMPTS[0], PARAMS)
    monkeypatch.undo()
    assert backend.generate(PROMPTS[0], PARAMS).token_ids


@pytest.mark.parametrize(
    "question",
    [
        lambda query: Defragment(query, "all"),  # type: ignore[arg-type]
        lambda query: PinExperts(query, 10**6, [0]),
        lambda query: UnpinExperts(query, 0, [-1]),
    ],
)
def test_a_question_that_cannot_be_answered_is_an_error(backend: Backend, question: Callable[[int], Any]) -> None:
    with pytest.raises(RequestFailed, match=r"[Ee]xpected"):
        backend._connection.ask(question)
    assert backend.check_cache() is None


def test_a_worker_that_says_what_is_no_message_is_replaced() -> None:
    with Backend(workers=2) as backend:
        expected = backend.generate(PROMPTS[0], LONG).token_ids
        stream = backend.stream(PROMPTS[0], LONG)
        got = next(stream).token_ids
        for victim in (backend.worker_pids[0], backend.pager_pid):
            fd = int(Path(f"/proc/{victim}/cmdline").read_bytes().split(b"\0")[-2])
            pidfd = os.pidfd_open(victim)
            with socket.socket(fileno=_fd_of(pidfd, fd)) as theirs:
                theirs.setblocking(True)
                theirs.sendall(frame(b"garbage"))
            os.close(pidfd)
        for piece in stream:
            got += piece.token_ids
        assert got == expected
        assert wait_until(lambda: (backend.stats().worker_restarts, backend.stats().pager_restarts) == (1, 1))
        assert sorted(line.split(":")[0] for line in log(backend)) == ["the pager", "worker 0"]


def _fd_of(pidfd: int, fd: int) -> int:
    """pidfd_getfd: the same open socket as another process has."""
    import ctypes

    got = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)
    if got < 0:
        pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return got
