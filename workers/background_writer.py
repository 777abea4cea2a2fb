"""Files that a process of the instance keeps for later ones, written beside its work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Writes one file, in a thread, so that a disk that is slow holds up nothing but the next write.

    Args:
        subject: what is written, for the sentence that says that it cannot be.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # the thread's, as long as there is one
        self._problem: str | None = None
        self._gave_up = False

    def is_free(self) -> bool:
        """Whether a write can begin: the last one is done, and none has failed. Raises what was not the disk's fault,
        but a mistake in this program."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        return self._thread is None and not self._gave_up

    def begin(self, write: Callable[[], None]) -> None:
        """Calls `write` in the thread, if it `is_free`. After an `OSError` nothing is written any more."""
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written; raises as `is_free` does."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self._gave_up = True
            self._problem = f"{self._subject} cannot be written: {error}"
        elif error is not None:
            raise error

    def take_problem(self) -> str | None:
        """Why nothing is written any more; said once."""
        self.is_free()
        problem, self._problem = self._problem, None
        return problem

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # the owner's thread has to know of it
            self._error = error
