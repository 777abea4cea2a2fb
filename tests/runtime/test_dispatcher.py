"""The dispatcher with workers that are played by the test: it writes what a worker would write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from played_instance import END_OF_TEXT, PlayedInstance

from hotset.runtime.dispatcher import MAX_LOST_WORKERS
from hotset.runtime.messages.client import Defragment, Defragmented, Submit
from hotset.runtime.messages.worker import PagesGranted, RowProgress, RunSequence, StopSequence
from hotset.runtime.sampling_params import SamplingParams


class Office(PlayedInstance):
    """Two played workers, and steps by the number of the request."""

    def submit(self, request: int, length: int = 3, max_tokens: int = 40) -> None:
        prompt = np.full(length, request, np.int32)
        self.dispatcher.submit(Submit(request, prompt.tobytes(), SamplingParams(max_tokens=max_tokens)))
        self.dispatcher.dispatch([0, 1])

    def request(self, number: int) -> Any:
        return next(r for r in self.scheduler.running.values() if r.client == number)

    def room_of(self, number: int) -> int:
        return self.room(self.request(number).row)

    def advance(self, number: int, committed: int, *, report: bool = True) -> None:
        """What the serving worker does in its steps until `committed`; token ids are positions."""
        request = self.request(number)
        assert committed <= self.room(request.row), "a worker never writes beyond its block table"
        start = len(request.prompt)
        self.token_ids[request.row, start : committed + 1] = np.arange(start, committed + 1) + 100
        self.commit(request.row, committed)
        if report:
            self.dispatcher.progress(request.worker, RowProgress(request.row, committed))

    def acknowledge(self, number: int) -> None:
        request = self.request(number)
        self.dispatcher.stopped(request.row, number)
        self.dispatcher.dispatch([0, 1])


@pytest.fixture
def office() -> Iterator[Office]:
    yield Office(num_pages=32)


def test_requests_are_spread_and_get_a_spare_page(office: Office) -> None:
    office.submit(1)
    office.submit(2)
    assert [type(m) for m in office.inbox[0]] == [type(m) for m in office.inbox[1]] == [RunSequence]
    assert office.room_of(1) == 8
    office.advance(1, 4)
    assert office.room_of(1) == 12
    assert office.client.tokens(1) == [103, 104]


def test_tokens_are_sent_once_and_the_end_once(office: Office) -> None:
    office.submit(1, max_tokens=4)
    office.advance(1, 3)
    office.advance(1, 5)
    request = office.request(1)
    office.token_ids[request.row, 6] = 106
    office.commit(request.row, 6)
    office.dispatcher.progress(request.worker, RowProgress(request.row, 6, "length"))
    assert office.client.tokens(1) == [103, 104, 105, 106]
    assert office.client.finish(1) == "length"
    assert not office.scheduler.running
    office.cache.check()


@pytest.mark.parametrize("boundary", [8, 12])
def test_a_sequence_that_fills_its_pages_while_it_migrates_gets_more(office: Office, boundary: int) -> None:
    for number in range(1, 5):
        office.submit(number)
    for number in (1, 3):
        office.advance(number, 4)
    # Workers 0 and 1 have two sequences each; both of worker 1 end, so that one of worker 0's is asked to move.
    for number in (2, 4):
        request = office.request(number)
        office.dispatcher.progress(1, RowProgress(request.row, 3, "stop"))
    office.dispatcher.dispatch([0, 1])
    moving = next(m.request for m in office.inbox[0] if isinstance(m, StopSequence))
    office.advance(moving, min(boundary, office.room_of(moving)))
    full = office.room_of(moving)
    office.advance(moving, full)  # it goes on until there is no room
    office.acknowledge(moving)
    assert isinstance(office.inbox[1][-1], RunSequence | PagesGranted)
    assert office.request(moving).worker == 1
    assert office.room_of(moving) > full, "it would stand still for ever"
    office.cache.check()


def test_a_dead_workers_sequences_go_on_elsewhere_from_what_they_committed(office: Office) -> None:
    office.submit(1)
    office.advance(1, 5, report=False)  # died before it could say so
    office.dispatcher.worker_died(0, "was killed by SIGKILL")
    office.dispatcher.dispatch([1])
    (run,) = (message for message in office.inbox[1] if isinstance(message, RunSequence))
    assert run.known == 6
    assert office.client.tokens(1) == [103, 104, 105]


def test_a_sequence_that_was_complete_when_its_worker_died_ends_as_it_would_have(office: Office) -> None:
    office.submit(1)
    request = office.request(1)
    office.advance(1, 4, report=False)
    office.token_ids[request.row, 4] = END_OF_TEXT
    office.dispatcher.worker_died(0, "was killed by SIGKILL")
    assert office.client.finish(1) == "stop"
    assert office.client.tokens(1) == [103, END_OF_TEXT]


def test_a_request_that_workers_die_of_is_given_up(office: Office) -> None:
    office.submit(1)
    for _ in range(MAX_LOST_WORKERS):
        assert office.client.finish(1) is None
        office.dispatcher.worker_died(office.request(1).worker, "was killed by SIGSEGV")
        office.dispatcher.dispatch([0])
    last = office.client.messages[-1]
    assert last.finish == "error" and f"{MAX_LOST_WORKERS} workers died" in last.error and "SIGSEGV" in last.error
    office.cache.check()


def test_the_last_admitted_gives_its_pages_to_one_that_stands_still_and_resumes_with_its_tokens() -> None:
    office = Office(num_pages=6)
    office.submit(1, max_tokens=21)
    office.submit(2, max_tokens=21)
    for committed in (4, 8):
        for number in (1, 2):
            office.advance(number, min(committed, office.room_of(number)))
    office.advance(1, office.room_of(1))
    office.advance(2, office.room_of(2))
    stopped = [m for inbox in office.inbox.values() for m in inbox if isinstance(m, StopSequence)]
    assert [m.request for m in stopped] == [2]
    before, had = office.client.tokens(2), office.room_of(1)
    office.acknowledge(2)
    assert office.room_of(1) > had
    assert office.scheduler.preemptions == 1
    office.dispatcher.progress(
        office.request(1).worker, RowProgress(office.request(1).row, office.room_of(1) - 1, "stop")
    )
    office.dispatcher.dispatch([0, 1])
    run = office.inbox[office.request(2).worker][-1]
    assert isinstance(run, RunSequence)
    assert run.known == 3 + len(before)
    assert office.token_ids[run.row, 3 : run.known].tolist() == before
    office.cache.check()


def test_an_abort_waits_for_the_worker_to_let_go(office: Office) -> None:
    office.submit(1)
    used = office.cache.num_used_pages
    office.dispatcher.abort(1)
    assert office.cache.num_used_pages == used
    assert isinstance(office.inbox[0][-1], StopSequence)
    office.acknowledge(1)
    assert office.cache.num_used_pages == 0
    assert office.client.finish(1) == "abort"


def test_pages_move_only_while_nobody_serves_them(office: Office) -> None:
    office.submit(1, length=16)
    office.submit(2, length=16)
    for number in (1, 2):
        office.advance(number, 16)
    keeper = office.request(2)
    for index, page in enumerate(office.cache.block_table(keeper.sequence)):
        office.pages[page] = index + 1
    office.dispatcher.progress(0, RowProgress(office.request(1).row, 16, "stop"))
    office.cache.reset_prefix_cache()
    office.dispatcher.defragment(Defragment(7, None))
    assert not [m for m in office.client.messages if isinstance(m, Defragmented)]
    office.acknowledge(2)
    assert office.client.messages[-1] == Defragmented(7, office.client.messages[-1].moves)
    table = office.cache.block_table(keeper.sequence)
    assert [int(office.pages[page, 0]) for page in table] == list(range(1, len(table) + 1))
    row = office.block_tables[keeper.row, 0, : len(table)]
    assert row.tolist() == table
    assert any(isinstance(message, RunSequence) for message in office.inbox[keeper.worker][-2:])
    office.cache.check()


def test_compaction_waits_for_a_sequence_on_its_way_to_another_worker_and_no_longer(office: Office) -> None:
    for number in range(1, 5):
        office.submit(number)
    for number in (2, 4):
        office.dispatcher.progress(1, RowProgress(office.request(number).row, 3, "stop"))
    office.dispatcher.dispatch([0, 1])
    moving = next(m.request for m in office.inbox[0] if isinstance(m, StopSequence))
    other = 4 - moving
    office.dispatcher.defragment(Defragment(7, None))
    office.acknowledge(other)
    assert not [m for m in office.client.messages if isinstance(m, Defragmented)]
    office.acknowledge(moving)
    assert [m for m in office.client.messages if isinstance(m, Defragmented)]
    assert {office.request(moving).worker, office.request(other).worker} == {0, 1}


def test_a_page_has_its_new_generation_before_compaction_writes_it(office: Office) -> None:
    office.submit(1, length=16)
    office.submit(2, length=16)
    for number in (1, 2):
        office.advance(number, 16)
    office.dispatcher.progress(0, RowProgress(office.request(1).row, 16, "stop"))
    office.cache.reset_prefix_cache()
    seen: list[tuple[int, int]] = []

    class Pages:
        def __getitem__(self, page: int) -> Any:
            return office.pages[page]

        def __setitem__(self, page: int, rows: Any) -> None:
            seen.append((int(office.generations[page]), office.cache.generation(page)))
            office.pages[page] = rows

    office.dispatcher._sequences._pages = Pages()  # type: ignore[assignment]
    office.dispatcher.defragment(Defragment(7, None))
    office.acknowledge(2)
    assert seen and all(stored == current for stored, current in seen)
