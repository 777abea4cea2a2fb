"""Reading KV pages from outside: bytes are told from those of a later owner by the page's generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from forks import forked

from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.page_reader import PageReader, StalePage
from hotset.shm.segment import Segment

PAGE = 3
OWNERS = 30_000


@pytest.fixture
def shared(instance: str, geometry: Geometry) -> Iterator[Segment]:
    segment = Segment.create(instance, geometry)
    yield segment
    segment.close()


@pytest.fixture
def reader(instance: str, geometry: Geometry, shared: Segment) -> PageReader:
    return PageReader(instance, geometry)


def test_the_generation_is_the_one_the_page_was_handed_out_with(shared: Segment, reader: PageReader) -> None:
    assert reader.generation(PAGE) == 0
    for generation in (1, 7, 2**32 - 1):
        shared.arena.hand_out_page(PAGE, generation)
        assert [reader.generation(page) for page in (PAGE - 1, PAGE, PAGE + 1)] == [0, generation, 0]


def test_bytes_of_another_generation_are_refused_with_both_numbers(shared: Segment, reader: PageReader) -> None:
    shared.arena.hand_out_page(PAGE, 1)
    shared.view(Section.KV_PAGES)[PAGE] = 42
    assert set(reader.read(PAGE, 1)) == {42}
    shared.arena.hand_out_page(PAGE, 2)
    with pytest.raises(StalePage, match="its generation is 2, expected 1"):
        reader.read(PAGE, 1)


def test_a_page_that_does_not_exist_is_refused(reader: PageReader) -> None:
    for page in (-1, 5):
        with pytest.raises(IndexError, match=f"^page is {page}, expected 0 <= page < 5$"):
            reader.generation(page)
    with pytest.raises(TypeError, match="generations has dtype float32, expected uint32"):
        _core.page_generation(np.zeros((5, 1), np.float32), 1)


def own_one_after_the_other(instance: str, geometry: Geometry) -> None:
    segment = Segment.attach(instance, geometry)
    numbers = segment.view(Section.KV_PAGES)[PAGE].view(np.uint64)
    for owner in range(1, OWNERS + 1):
        segment.arena.hand_out_page(PAGE, owner)
        numbers[:] = owner


def test_no_reader_takes_the_bytes_of_a_later_owner_for_those_of_an_earlier(
    instance: str, geometry: Geometry, reader: PageReader
) -> None:
    generation = 0
    with forked(functools.partial(own_one_after_the_other, instance, geometry)) as (owners,):
        while generation < OWNERS and owners.is_alive():
            generation = reader.generation(PAGE)
            try:
                numbers = np.frombuffer(reader.read(PAGE, generation), np.uint64)
            except StalePage:
                continue
            assert numbers.max() <= generation
