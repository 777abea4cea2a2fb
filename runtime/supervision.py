"""Child processes: started so that they die with their parent, watched through a pidfd, talked to over a channel."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any, Generic, NoReturn, TypeVar

from hotset.runtime.channel import Channel, ChannelClosed, channel_pair
from hotset.runtime.errors import HotsetError
from hotset.runtime.messages.message import ProcessFailed
from hotset.shm import _core
from hotset.shm.segment import SegmentError

Received = TypeVar("Received")
Start = TypeVar("Start")

# Read by the math libraries when numpy is first imported, so it must be in the environment before.
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child(Generic[Received]):
    """A process running `python -m module`, and this process's end of the channel to it.

    `pidfd` becomes readable when the child dies. Until `reap` it is a zombie, so its pid cannot be used again: whoever
    cleans up after it does so before reaping.

    Args:
        module: to run; it calls `run_child` or `enter_child`.
        received: the union of message types that the child sends.
        dies_with_us: the kernel kills it when this *thread* ends, also while it is still importing. So False for those
            who may start children from any thread; such a child takes the end of file on its channel for our death.
        own_session: away from the terminal's Ctrl-C.
        threads: of its math libraries.
    """

    def __init__(
        self,
        module: str,
        received: Any,
        *,
        dies_with_us: bool = True,
        own_session: bool = False,
        stderr: IO[bytes] | None = None,
        threads: int = 1,
    ) -> None:
        self.channel: Channel[Received]
        self.channel, theirs = channel_pair(received)
        environment = os.environ | dict.fromkeys(_THREAD_LIMITS, str(threads))
        with theirs:
            # -P: the working directory is the user's, and must not shadow our imports or theirs.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                start_new_session=own_session,
                env=environment,
                preexec_fn=functools.partial(_die_with, os.getpid()) if dies_with_us else None,
            )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    def reap(self, timeout: float | None = None, *, close_channel: bool = True) -> str:
        """Waits for the child and says how it ended; raises `subprocess.TimeoutExpired`.

        `close_channel`: False while another thread is about to receive its end of file.
        """
        code = self._process.wait(timeout)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if close_channel:
            self.channel.close()
        return describe_exit(code)


def last_words(stderr: IO[bytes]) -> str:
    """Of a child whose errors went into this file, as the end of a sentence; "" if it said nothing."""
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return f"; its last line was: {lines[-1]}" if lines else ""


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _die_with(parent: int) -> None:
    if not _core.die_with_parent(parent):
        os._exit(1)  # it is dead already


def enter_child(arguments: list[str], received: Any) -> Channel[Any]:
    """What every child does first: opens its end of the channel."""
    fd = int(arguments[0])
    os.set_inheritable(fd, False)
    return Channel[Any](socket.socket(fileno=fd), received)


def run_child(
    arguments: list[str], received: Any, start: type[Start], serve: Callable[[Channel[Any], Start], None]
) -> NoReturn:
    """The life of a child that begins with a message of type `start`: `serve` returns when it is told to stop.

    Leaves with status 0 when `serve` is done, the parent is gone or had it stop at once, and with 1 after a
    `ProcessFailed`. What nobody expected comes out as an exception.
    """
    channel = enter_child(arguments, received)
    try:
        message = channel.wait()
        if isinstance(message, start):
            serve(channel, message)
    except ChannelClosed:
        pass
    except (HotsetError, SegmentError, OSError) as error:
        channel.send(ProcessFailed(str(error)))
        leave(1)
    leave(0)


def leave(status: int) -> NoReturn:
    """Ends this process, which has cleaned up, without taking its interpreter down: that takes 30 to 100 ms with all
    that is imported, and the workers, the pager and the coordinator leave one after the other.
    """
    sys.stderr.flush()
    os._exit(status)
