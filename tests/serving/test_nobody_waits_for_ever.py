"""Whatever a program does with a backend, and whatever does not listen: every call ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from instances import PROMPTS, processes_of, segment_exists, wait_until

from hotset.runtime import Backend, BackendError, SamplingParams
from hotset.runtime import connection as connection_module

SHORT = SamplingParams(temperature=0, max_tokens=4, routing="off", ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=900, routing="off", ignore_eos=True)
MORE_THAN_A_SOCKET_TAKES = 1 << 20


def test_parameters_may_be_larger_than_what_a_socket_takes_at_once(backend: Backend) -> None:
    """The worker has nothing to say until it has read all of them."""
    stop = ["x" * MORE_THAN_A_SOCKET_TAKES]
    large = SamplingParams(temperature=0, max_tokens=4, routing="off", ignore_eos=True, stop=stop)
    expected = backend.generate(PROMPTS, SHORT)
    assert [a.token_ids for a in backend.generate(PROMPTS, large)] == [a.token_ids for a in expected]


def test_a_stream_may_be_collected_while_another_request_is_sent(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector closes it, which aborts its request, in the middle of whatever it interrupts."""

    class Holder:
        stream: Any
        itself: Any

    holder = Holder()
    holder.stream, holder.itself = backend.stream(PROMPTS[0], LONG), holder
    assert next(holder.stream).token_ids
    channel = backend._connection._channel
    send = channel.send_frame

    def collect(frame: bytes) -> None:
        gc.collect()
        send(frame)

    monkeypatch.setattr(channel, "send_frame", collect)
    del holder
    assert len(backend.generate(PROMPTS[1], SHORT).token_ids) == 4
    assert wait_until(lambda: backend.stats().requests_running == 0)


def test_a_signal_handler_may_ask_while_its_thread_waits(backend: Backend) -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: asked.append(backend.stats().workers))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.02)
        while len(asked) < 10:
            backend.stats()
            backend.generate(PROMPTS[0], SHORT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_coordinator_that_does_not_listen_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "STOP_SECONDS", 0.2)
    backend = Backend(workers=1)
    pids = [backend.coordinator_pid, backend.pager_pid, *backend.worker_pids]
    os.kill(backend.coordinator_pid, signal.SIGSTOP)
    errors: list[BackendError] = []

    def ask() -> None:
        try:
            backend.generate([1] * MORE_THAN_A_SOCKET_TAKES, SHORT)
        except BackendError as error:
            errors.append(error)

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for asker in askers:
        asker.start()
    assert wait_until(lambda: len(backend._connection._waiting) == 3)
    backend.close()
    for asker in askers:
        asker.join(10)
    assert [str(error) for error in errors] == ["the backend is closed"] * 3
    assert wait_until(lambda: processes_of(pids) == [])
    assert not segment_exists(backend.instance)


def test_every_request_ends_when_the_coordinator_dies_while_they_are_being_sent() -> None:
    """Those that are being registered just then too."""
    with Backend(workers=1) as backend:
        ended: list[int] = []

        def ask(number: int) -> None:
            try:
                while True:
                    backend.stats()
                    backend.generate(PROMPTS[number % len(PROMPTS)], SHORT)
            except BackendError:
                ended.append(number)

        askers = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(16)]
        for asker in askers:
            asker.start()
        assert wait_until(lambda: backend.stats().decode_tokens > 64)
        os.kill(backend.coordinator_pid, signal.SIGKILL)
        for asker in askers:
            asker.join(20)
        assert sorted(ended) == list(range(16))


@pytest.mark.usefixtures("many_open_files")
def test_a_host_may_have_more_than_a_thousand_files_open() -> None:
    with Backend(workers=1) as backend:
        assert len(backend.generate(PROMPTS[0], SHORT).token_ids) == 4


def test_a_process_that_the_host_starts_meanwhile_does_not_hide_the_coordinators_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It inherits what is inheritable: not the coordinator's end of the socket, which would then never close."""
    popen = subprocess.Popen
    others: list[subprocess.Popen[bytes]] = []

    def beside(*arguments: Any, **options: Any) -> Any:
        others.append(popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False))
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", beside)
    backend = Backend(workers=1)
    monkeypatch.undo()
    assert len(others) == 1
    try:
        stream = backend.stream(PROMPTS[0], LONG)
        next(stream)
        os.kill(backend.coordinator_pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="coordinator was killed by SIGKILL"):
            list(stream)
    finally:
        backend.close()
        others[0].communicate(b"\n", timeout=10)
