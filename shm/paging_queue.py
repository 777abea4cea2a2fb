# posix_ipc comes without type information
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false
"""The paging queue: requests for experts, urgent before page-out before prefetch.

An unprivileged POSIX queue holds 10 messages of 8,192 bytes, so one message carries a layer's whole list of experts,
and the queue is allowed to be full: the request bits in the arena are the truth, the message only makes it quick.
An urgent request whose message did not fit is found by the pager's next rescan of the bits.
"""

from __future__ import annotations

import enum
import os
import resource
from types import TracebackType

import msgspec
import posix_ipc

from hotset.shm.layout import PrefetchSource
from hotset.shm.segment import SegmentError, queue_name

MAX_MESSAGES = 10
MAX_MESSAGE_NBYTES = 8192
QUEUE_NBYTES = MAX_MESSAGES * (MAX_MESSAGE_NBYTES + 96)
"""What the kernel counts of one queue against its user's limit: the messages, and for each two entries of its own."""


class TooManyQueues(SegmentError):
    """All message queues of this user may take `limit` bytes, and one more needs `needed`."""

    def __init__(self, needed: int, limit: int) -> None:
        super().__init__(
            f"the instance needs {needed} bytes of message queues, but all queues of this user may take {limit} "
            "(ulimit -q): close another instance, or raise the limit"
        )
        self.needed = needed
        self.limit = limit


class PagingPriority(enum.IntEnum):
    """A POSIX queue hands out the largest number first."""

    PREFETCH = 0
    NORMAL = 1
    URGENT = 2


class PagingDirection(enum.IntEnum):
    IN = 0
    OUT = 1


class PagingMessage(msgspec.Struct, frozen=True, array_like=True):
    """Experts of one layer to page in or out; `experts` are numbered within the layer. A prefetch names its source."""

    layer: int
    experts: list[int]
    direction: PagingDirection = PagingDirection.IN
    priority: PagingPriority = PagingPriority.URGENT
    source: PrefetchSource = PrefetchSource.NONE


class PagingQueue:
    """The instance's message queue. Sending never blocks; receiving is for the pager, which polls `fd`."""

    def __init__(self, queue: posix_ipc.MessageQueue) -> None:
        self._queue = queue
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(PagingMessage).decode
        # block is a flag of this process's descriptor: False makes send and receive raise BusyError instead
        self._queue.block = False

    @classmethod
    def create(cls, instance: str) -> PagingQueue:
        """Raises `TooManyQueues` where this user may have no further one."""
        try:
            queue = posix_ipc.MessageQueue(
                queue_name(instance),
                posix_ipc.O_CREX,
                mode=0o600,
                max_messages=MAX_MESSAGES,
                max_message_size=MAX_MESSAGE_NBYTES,
            )
        except OSError as error:
            # EMFILE, which the module turns into words: of the files that are open, or of the user's queues.
            limit = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
            if "files open" in str(error) and _can_open_files() and limit != resource.RLIM_INFINITY:
                raise TooManyQueues(QUEUE_NBYTES, limit) from error
            raise
        return cls(queue)

    @classmethod
    def attach(cls, instance: str) -> PagingQueue:
        return cls(posix_ipc.MessageQueue(queue_name(instance)))

    @property
    def fd(self) -> int:
        """Readable while a message waits."""
        return self._queue.mqd

    def send(self, message: PagingMessage) -> bool:
        """Whether the message found room; the request bits must be set before."""
        data = self._encode(message)
        if len(data) > MAX_MESSAGE_NBYTES:
            return False
        try:
            self._queue.send(data, priority=int(message.priority))
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    @property
    def waiting(self) -> int:
        """How many messages there are."""
        return self._queue.current_messages

    def receive(self) -> PagingMessage | None:
        """The waiting message of the highest priority, or None."""
        try:
            data, _ = self._queue.receive()
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return None
        return self._decode(data)

    def close(self) -> None:
        self._queue.close()

    def __enter__(self) -> PagingQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _can_open_files() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True
