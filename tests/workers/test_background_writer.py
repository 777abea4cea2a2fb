"""A file that is written beside its owner's work, and what the owner gets to know of it."""

from __future__ import annotations

import threading

import pytest

from hotset.runtime.model.model_cache import NoCacheFolder
from hotset.workers.background_writer import BackgroundWriter


def fail(error: Exception) -> None:
    raise error


def test_a_write_holds_up_the_next_one_and_not_its_owner() -> None:
    writer, goes_on, written = BackgroundWriter("the file"), threading.Event(), list[int]()

    def write() -> None:
        assert goes_on.wait(10)
        written.append(1)

    assert writer.is_free()
    writer.begin(write)
    assert not writer.is_free() and not written
    goes_on.set()
    writer.wait()
    assert writer.is_free() and written == [1]
    assert writer.take_problem() is None


@pytest.mark.parametrize("error", [OSError("the disk is full"), NoCacheFolder()])
def test_what_cannot_be_written_is_said_once_and_not_tried_again(error: Exception) -> None:
    writer = BackgroundWriter("the file")
    writer.begin(lambda: fail(error))
    writer.wait()
    assert not writer.is_free()
    assert writer.take_problem() == f"the file cannot be written: {error}"
    assert writer.take_problem() is None


def test_a_mistake_in_the_program_reaches_the_owner() -> None:
    writer = BackgroundWriter("the file")
    writer.begin(lambda: fail(ValueError("a mistake")))
    with pytest.raises(ValueError, match="a mistake"):
        writer.wait()
