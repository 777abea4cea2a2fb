"""Instance names: one holder each, and the janitor removes what killed holders left and nothing else."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from hotset.shm import segment as segment_module
from hotset.shm.geometry import Geometry
from hotset.shm.segment import (
    SHM_FOLDER,
    InstanceLock,
    InstanceNameTaken,
    Segment,
    check_instance_name,
    new_instance_name,
    queue_name,
    remove_ipc_objects,
    remove_stale_instances,
    segment_name,
)

HOLDER = """
import sys, time
import posix_ipc
from hotset.shm import segment
from hotset.shm.geometry import Geometry
segment.PREFIX, name = sys.argv[1:]
lock = segment.InstanceLock(name)
mine = segment.Segment.create(name, Geometry(num_layers=1, num_experts=8))
queue = posix_ipc.MessageQueue(segment.queue_name(name), posix_ipc.O_CREX, max_messages=2)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(namespace: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs an instance named "theirs" with a segment and a queue."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, namespace, "theirs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def has_segment(instance: str) -> bool:
    return (SHM_FOLDER / segment_name(instance).lstrip("/")).exists()


def has_queue(instance: str) -> bool:
    try:
        posix_ipc.MessageQueue(queue_name(instance)).close()
    except posix_ipc.ExistentialError:
        return False
    return True


def test_a_name_has_one_holder(instance: str) -> None:
    with pytest.raises(InstanceNameTaken, match="an instance named 'mine' is running already") as caught:
        InstanceLock(instance)
    assert caught.value.name == "mine"


def test_a_name_that_is_held_for_a_moment_is_waited_for(namespace: str) -> None:
    lock = InstanceLock("mine")
    threading.Timer(0.05, lock.release).start()
    InstanceLock("mine", patience=5).release()


def lock_files(namespace: str) -> list[Path]:
    return list(SHM_FOLDER.glob(f"{namespace}*.lock"))


def test_a_name_is_free_again_after_release(namespace: str) -> None:
    lock = InstanceLock("mine")
    lock.release()
    lock.release()
    InstanceLock("mine").release()
    assert not lock_files(namespace), "no lock file is left"


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder unlinks its file between our open and our flock: we must lock the new file, not the old."""
    first = InstanceLock("mine")
    flock, calls = fcntl.flock, []

    def release_first(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            first.release()
        flock(fd, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", release_first)
        second = InstanceLock("mine")
    assert len(calls) == 2
    with pytest.raises(InstanceNameTaken):
        InstanceLock("mine")
    second.release()


def test_another_process_holds_its_name_until_it_is_killed(holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InstanceNameTaken):
        InstanceLock("theirs")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    InstanceLock("theirs").release()


def test_the_janitor_leaves_a_running_instance_alone(holder: subprocess.Popen[str]) -> None:
    assert remove_stale_instances() == []
    assert has_segment("theirs")
    assert has_queue("theirs")


def test_the_janitor_removes_what_a_killed_instance_left(holder: subprocess.Popen[str], namespace: str) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert has_segment("theirs")
    assert has_queue("theirs")
    assert remove_stale_instances() == ["theirs"]
    assert not has_segment("theirs")
    assert not has_queue("theirs")
    assert not lock_files(namespace)
    assert remove_stale_instances() == []


@pytest.fixture
def queues_only(
    holder: subprocess.Popen[str], namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Where the kernel would list the queues, if that file system is not mounted here. Of what the holder has, somebody
    has removed the files in /dev/shm."""
    monkeypatch.setattr(segment_module, "QUEUE_FOLDER", tmp_path)
    (tmp_path / queue_name("theirs").lstrip("/")).touch()
    for path in SHM_FOLDER.glob(namespace + "*"):
        path.unlink()
    yield tmp_path
    remove_ipc_objects("theirs")


def test_the_janitor_removes_a_queue_that_is_all_a_killed_instance_left(
    holder: subprocess.Popen[str], queues_only: Path, namespace: str
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert remove_stale_instances() == ["theirs"]
    assert not has_queue("theirs") and not lock_files(namespace)
    assert remove_stale_instances() == []


def test_the_janitor_leaves_a_queue_that_somebody_has_open(holder: subprocess.Popen[str], queues_only: Path) -> None:
    assert remove_stale_instances() == []
    assert has_queue("theirs")


def test_the_janitor_touches_no_foreign_queues(
    holder: subprocess.Popen[str], queues_only: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for name in (f"{namespace}not.an.instance.paging", f"{namespace}theirs.other", "theirs.paging"):
        (queues_only / name).touch()
    uid = os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: uid + 1)
        assert remove_stale_instances() == []
    assert has_queue("theirs")
    assert remove_stale_instances() == ["theirs"]


def test_the_janitor_leaves_an_instance_of_its_own_process_alone(instance: str, geometry: Geometry) -> None:
    segment = Segment.create(instance, geometry)
    assert remove_stale_instances() == []
    assert has_segment(instance)
    segment.close()
    remove_ipc_objects(instance)


def test_the_janitor_touches_no_foreign_names(namespace: str) -> None:
    foreign = SHM_FOLDER / namespace.replace("hotset", "elephant").replace(".", "-mine")
    odd = SHM_FOLDER / f"{namespace}not.an.instance"
    for path in (foreign, odd):
        path.write_bytes(b"somebody's")
    try:
        assert remove_stale_instances() == []
        assert foreign.read_bytes() == odd.read_bytes() == b"somebody's"
    finally:
        foreign.unlink()
        odd.unlink()


def test_the_janitor_touches_nothing_of_another_user(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert remove_stale_instances() == []
    assert has_segment("theirs")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b", "é", "x" * 65])
def test_names_that_would_not_survive_in_a_path_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 64 of A-Z a-z 0-9 _ -"):
        check_instance_name(name)


def test_made_up_names_are_valid_and_differ() -> None:
    names = {check_instance_name(new_instance_name()) for _ in range(100)}
    assert len(names) == 100
