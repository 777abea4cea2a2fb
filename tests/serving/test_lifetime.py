"""Starting, stopping, and what happens when a process is killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from instances import PROMPTS, processes_of, processes_with, queue_exists, segment_exists, wait_until

from hotset.runtime import Backend, BackendConfig, BackendError, SamplingParams
from hotset.runtime import connection as connection_module
from hotset.runtime.connection import COORDINATOR_MODULE
from hotset.runtime.messages.client import StartInstance, ToClient
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.supervision import Child
from hotset.shm.segment import new_instance_name, remove_stale_instances

LONG = SamplingParams(temperature=0, max_tokens=300, routing="off", ignore_eos=True)


def all_pids(backend: Backend) -> list[int]:
    return [backend.coordinator_pid, backend.pager_pid, *backend.worker_pids]


def test_close_leaves_nothing_and_may_be_called_again() -> None:
    backend = Backend(workers=2)
    pids, instance = all_pids(backend), backend.instance
    assert len(processes_of(pids)) == 4
    assert segment_exists(instance) and queue_exists(instance)
    backend.close()
    backend.close()
    assert not segment_exists(instance) and not queue_exists(instance)
    assert processes_of(pids) == []
    with pytest.raises(BackendError, match="closed"):
        backend.generate(PROMPTS[0])


def test_twenty_starts_and_stops_leave_nothing() -> None:
    for number in range(20):
        with Backend(workers=1 + number % 2) as backend:
            assert backend.generate(PROMPTS[0], SamplingParams(max_tokens=1)).token_ids
        assert not segment_exists(backend.instance) and not queue_exists(backend.instance)


def test_two_backends_in_one_program_do_not_touch_each_other() -> None:
    with Backend(workers=1) as first:
        with Backend(workers=1) as second:
            params = SamplingParams(temperature=0, max_tokens=8, routing="off")
            assert first.generate(PROMPTS[0], params).text == second.generate(PROMPTS[0], params).text
        assert first.generate(PROMPTS[0], params).token_ids


def test_a_backend_that_nobody_has_any_more_ends_and_one_that_a_stream_has_does_not() -> None:
    backend = Backend(workers=1)
    pids, instance = all_pids(backend), backend.instance
    stream = backend.stream(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))
    del backend
    gc.collect()
    assert sum(len(piece.token_ids) for piece in stream) == 20
    del stream
    gc.collect()
    assert wait_until(lambda: not processes_of(pids))
    assert wait_until(lambda: not segment_exists(instance)) and not queue_exists(instance)


def test_an_instance_name_is_given_once() -> None:
    name = f"test-{os.getpid()}"
    with Backend(workers=1, name=name) as first:
        with pytest.raises(BackendError, match=name):
            Backend(workers=1, name=name)
        assert first.generate(PROMPTS[0], SamplingParams(max_tokens=2)).token_ids


@pytest.mark.parametrize("victim", ["worker", "pager"])
def test_the_answer_is_the_same_when_a_child_is_killed_in_the_middle(victim: str) -> None:
    with Backend(workers=2, expert_budget="25%") as backend:
        expected = [answer.token_ids for answer in backend.generate(PROMPTS, LONG)]
        streams = [backend.stream(prompt, LONG) for prompt in PROMPTS]
        got = [next(stream).token_ids for stream in streams]
        os.kill(backend.worker_pids[0] if victim == "worker" else backend.pager_pid, signal.SIGKILL)
        for tokens, stream in zip(got, streams, strict=True):
            for piece in stream:
                tokens.extend(piece.token_ids)
        assert got == expected
        stats = backend.stats()
        assert (stats.worker_restarts, stats.pager_restarts) == ((1, 0) if victim == "worker" else (0, 1))
        assert [answer.token_ids for answer in backend.generate(PROMPTS, LONG)] == expected


def test_all_workers_killed_at_once_are_replaced() -> None:
    with Backend(workers=2) as backend:
        stream = backend.stream(PROMPTS[0], LONG)
        next(stream)
        for pid in backend.worker_pids:
            os.kill(pid, signal.SIGKILL)
        assert sum(len(piece.token_ids) for piece in stream) == 299
        assert backend.stats().worker_restarts == 2


def test_a_killed_coordinator_ends_every_request_with_a_clear_error() -> None:
    backend = Backend()
    pids = all_pids(backend)
    stream = backend.stream(PROMPTS[0], LONG)
    next(stream)
    os.kill(backend.coordinator_pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="coordinator was killed by SIGKILL"):
        list(stream)
    with pytest.raises(BackendError, match="coordinator was killed by SIGKILL"):
        backend.stats()
    assert wait_until(lambda: processes_of(pids) == [])
    assert wait_until(lambda: not segment_exists(backend.instance))
    assert not queue_exists(backend.instance)
    backend.close()
    with Backend() as again:
        assert again.generate(PROMPTS[0], SamplingParams(max_tokens=2)).token_ids


def test_children_that_are_still_importing_go_with_their_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its death must reach them before they have code of their own that could notice it."""
    mark = f"{os.getpid()}-importing"
    monkeypatch.setenv("HOTSET_TEST", mark)
    coordinator: Child[ToClient] = Child(COORDINATOR_MODULE, ToClient, dies_with_us=False, own_session=True)
    monkeypatch.delenv("HOTSET_TEST")
    config = BackendConfig(workers=2)
    model = ModelConfig.load(config.model)
    plan = plan_instance(config, model, Checkpoint.open(config.model, model))
    coordinator.channel.send(StartInstance(new_instance_name(), config, plan))

    def workers() -> list[int]:
        pids = processes_with("HOTSET_TEST", mark)
        return [pid for pid in pids if b"hotset.workers." in Path(f"/proc/{pid}/cmdline").read_bytes()]

    assert wait_until(lambda: len(workers()) == 3)  # with the pager
    for pid in workers():
        os.kill(pid, signal.SIGSTOP)  # so that they get no further
    coordinator.kill()
    coordinator.reap()
    assert wait_until(lambda: not processes_with("HOTSET_TEST", mark))
    remove_stale_instances()


def test_a_close_that_is_interrupted_kills_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "STOP_SECONDS", 3600)  # an undisturbed close would wait so long
    backend = Backend(workers=1)
    pids = all_pids(backend)
    os.kill(backend.coordinator_pid, signal.SIGSTOP)  # it would not close in time
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            backend.close()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert wait_until(lambda: processes_of(pids) == [])
    assert not segment_exists(backend.instance) and not queue_exists(backend.instance)
    with pytest.raises(BackendError, match="closed"):
        backend.stats()


HOST = """
import sys, time
from hotset.runtime import Backend, SamplingParams
backend = Backend()
print(backend.instance, backend.coordinator_pid, backend.pager_pid, *backend.worker_pids, flush=True)
stream = backend.stream("def f(", SamplingParams(max_tokens=900, ignore_eos=True))
next(stream)
print("streaming", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_host_that_is_killed_takes_everything_with_it(how: signal.Signals) -> None:
    host = subprocess.Popen(
        [sys.executable, "-P", "-c", HOST], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert host.stdout is not None
    instance, *pids = host.stdout.readline().split()
    assert host.stdout.readline() == "streaming\n"
    host.send_signal(how)
    host.wait(10)
    assert wait_until(lambda: processes_of([int(pid) for pid in pids]) == [])
    assert wait_until(lambda: not segment_exists(instance))
    assert not queue_exists(instance)


def test_nobody_waits_for_an_interpreter_to_be_taken_down(tmp_path: Path) -> None:
    """It takes a process 30 to 100 ms, and three of them leave one after the other. Here it would leave a mark."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, pathlib, sys\n"
        "mark = pathlib.Path(__file__).with_name(f'taken-down-{os.getpid()}')\n"
        "atexit.register(lambda: mark.write_text(' '.join(sys.orig_argv)))\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-P", "-c", HOST],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert host.stdout is not None
    instance, *pids = host.stdout.readline().split()
    assert host.stdout.readline() == "streaming\n"
    host.kill()
    host.wait()
    assert wait_until(lambda: processes_of([int(pid) for pid in pids]) == [])
    assert not segment_exists(instance) and not queue_exists(instance)
    assert [mark.read_text() for mark in tmp_path.glob("taken-down-*")] == []


def test_G8_the_hosts_own_child_and_signal_handler_are_left_alone() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with Backend(workers=1) as backend:
            backend.generate(PROMPTS[0], SamplingParams(max_tokens=2))
        assert child.poll() is None
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        child.kill()
        child.wait()


def test_a_backend_started_in_a_thread_outlives_it() -> None:
    import threading

    started: list[Backend] = []
    thread = threading.Thread(target=lambda: started.append(Backend(workers=1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    with started[0] as backend:
        assert backend.generate(PROMPTS[0], SamplingParams(max_tokens=4)).token_ids
