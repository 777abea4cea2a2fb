"""The paging queue: urgent first, never blocking, allowed to be full."""

from __future__ import annotations

import resource
import select
from collections.abc import Iterator

import posix_ipc
import pytest

from hotset.shm.paging_queue import (
    MAX_MESSAGE_NBYTES,
    MAX_MESSAGES,
    QUEUE_NBYTES,
    PagingDirection,
    PagingMessage,
    PagingPriority,
    PagingQueue,
    TooManyQueues,
)
from hotset.shm.segment import remove_ipc_objects


@pytest.fixture
def queue(instance: str) -> Iterator[PagingQueue]:
    with PagingQueue.create(instance) as queue:
        yield queue
    remove_ipc_objects(instance)


def test_messages_arrive_whole(queue: PagingQueue) -> None:
    message = PagingMessage(3, [0, 69], PagingDirection.OUT, PagingPriority.NORMAL)
    assert queue.send(message)
    assert queue.receive() == message
    assert queue.receive() is None


def test_urgent_comes_before_page_out_before_prefetch(queue: PagingQueue) -> None:
    prefetch = PagingMessage(0, [1], priority=PagingPriority.PREFETCH)
    page_out = PagingMessage(0, [2], PagingDirection.OUT, PagingPriority.NORMAL)
    first, second = PagingMessage(0, [3]), PagingMessage(0, [4])
    for message in (prefetch, page_out, first, second):
        assert queue.send(message)
    assert [queue.receive() for _ in range(4)] == [first, second, page_out, prefetch]


def test_it_says_how_many_messages_wait(queue: PagingQueue) -> None:
    assert queue.waiting == 0
    for _ in range(2):
        assert queue.send(PagingMessage(0, [1]))
    assert queue.waiting == 2


def test_a_full_queue_refuses_instead_of_blocking(queue: PagingQueue) -> None:
    for expert in range(MAX_MESSAGES):
        assert queue.send(PagingMessage(0, [expert]))
    assert not queue.send(PagingMessage(0, [99]))
    assert queue.receive() == PagingMessage(0, [0])
    assert queue.send(PagingMessage(0, [99]))


def test_one_message_holds_all_experts_of_the_largest_layer(queue: PagingQueue) -> None:
    message = PagingMessage(16_000, list(range(1024)))
    assert queue.send(message)
    assert queue.receive() == message


def test_a_waiting_message_makes_the_descriptor_readable(queue: PagingQueue) -> None:
    poll = select.poll()
    poll.register(queue.fd, select.POLLIN)
    assert poll.poll(0) == []
    queue.send(PagingMessage(0, [1]))
    assert poll.poll(0) == [(queue.fd, select.POLLIN)]


def test_workers_attach_by_the_instances_name(queue: PagingQueue, instance: str) -> None:
    with PagingQueue.attach(instance) as worker:
        assert worker.send(PagingMessage(1, [2]))
        assert queue.receive() == PagingMessage(1, [2])


def test_there_is_one_queue_per_instance(queue: PagingQueue, instance: str) -> None:
    with pytest.raises(posix_ipc.ExistentialError):
        PagingQueue.create(instance)
    with pytest.raises(posix_ipc.ExistentialError):
        PagingQueue.attach("nobody")


def test_the_limit_of_queues_is_named_and_not_that_of_open_files(instance: str) -> None:
    """The kernel says EMFILE of both."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (QUEUE_NBYTES - 1, hard))
    try:
        with pytest.raises(TooManyQueues, match=r"needs 82880 bytes .* may take 82879 .ulimit -q") as caught:
            PagingQueue.create(instance)
    finally:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (soft, hard))
    assert (caught.value.needed, caught.value.limit) == (82880, 82879)


def test_where_no_file_can_be_opened_the_limit_of_queues_is_not_blamed(
    instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_queue(*arguments: object, **options: object) -> None:
        raise OSError("This process already has the maximum number of files open")

    monkeypatch.setattr(posix_ipc, "MessageQueue", no_queue)
    monkeypatch.setattr("hotset.shm.paging_queue._can_open_files", lambda: False)
    with pytest.raises(OSError, match="files open"):
        PagingQueue.create(instance)


def test_a_message_that_no_queue_holds_is_refused(queue: PagingQueue) -> None:
    assert not queue.send(PagingMessage(0, [1000] * MAX_MESSAGE_NBYTES))
    assert queue.receive() is None
