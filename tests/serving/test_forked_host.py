"""A process forked from a host has no part in the host's instance: it is told so, and cannot end it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from forks import raised_in_a_fork

from hotset.runtime import Backend, BackendError, SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=4)


@pytest.mark.parametrize(
    "use",
    [
        lambda backend: backend.generate("import", SHORT),
        lambda backend: list(backend.stream("import", SHORT)),
        lambda backend: backend.stats(),
        lambda backend: backend.reset_stats(),
        lambda backend: backend.pin_experts(0, [1]),
    ],
    ids=["generate", "stream", "stats", "reset_stats", "pin_experts"],
)
def test_a_fork_is_told_that_it_needs_a_backend_of_its_own(use: Callable[[Backend], object]) -> None:
    with Backend(workers=1, user_pins=1) as backend:
        said = raised_in_a_fork(lambda: use(backend))
        assert said.startswith(f"{BackendError.__name__}: this Backend belongs to process {os.getpid()}, and process ")
        assert said.endswith("was forked from it: it needs a Backend of its own")
        assert backend.generate("import", SHORT).token_ids


def test_a_fork_that_closes_it_or_ends_leaves_the_parents_instance_alone() -> None:
    with Backend(workers=1) as backend:
        stream = backend.stream("import", SHORT)
        first = next(stream)
        assert raised_in_a_fork(backend.close) == ""
        assert "belongs to process" in raised_in_a_fork(lambda: [*stream])
        assert raised_in_a_fork(stream.close) == ""
        assert len([first, *stream]) > 1


def test_a_fork_may_have_a_backend_of_its_own() -> None:
    def serve() -> None:
        with Backend(workers=1) as own:
            assert own.generate("import", SHORT).token_ids

    with Backend(workers=1):
        assert raised_in_a_fork(serve) == ""
