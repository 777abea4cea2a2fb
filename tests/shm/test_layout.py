"""The arena's layout: C and Python agree, sections follow one another, bad geometries are refused."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.shm import _core
from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.geometry import CACHE_LINE, PAGE, Geometry, SlotClass
from hotset.shm.layout import (
    COUNTERS_PER_PROCESS,
    HEADER,
    HEADER_NBYTES,
    HISTOGRAM_BUCKETS,
    HISTOGRAMS_PER_PROCESS,
    LAYER_STATE,
    MAX_SECTIONS,
    SECTION_ENTRY,
    SEQUENCE_STATE,
    SLOT_INFO,
    STATE_OFFSET,
    Layout,
    PrefetchSource,
    Section,
)

CORE = Path(__file__).parents[2] / "shm" / "core"

geometries = st.builds(
    Geometry,
    num_layers=st.integers(1, 40),
    num_experts=st.integers(1, 1024),
    num_processes=st.integers(1, 9),
    pins_per_process=st.integers(0, 40),
    slot_classes=st.lists(st.builds(SlotClass, st.integers(0, 50), st.integers(1, 20_000)), max_size=3).map(tuple),
    num_pages=st.integers(0, 50),
    page_nbytes=st.integers(0, 20_000),
    block_size=st.integers(1, 64),
    max_sequences=st.integers(0, 9),
    max_model_len=st.integers(0, 500),
)


def test_structs_have_the_offsets_that_c_sees() -> None:
    structs = {
        "arena_header": HEADER,
        "section_entry": SECTION_ENTRY,
        "layer_state": LAYER_STATE,
        "slot_info": SLOT_INFO,
        "sequence_state": SEQUENCE_STATE,
    }
    offsets = _core.offsets()
    assert offsets.pop("state") == STATE_OFFSET
    assert offsets.pop("header") == HEADER_NBYTES
    for name, offset in offsets.items():
        struct, field = name.split(".")
        fields = structs[struct].fields
        assert fields is not None
        assert fields[field][1] == offset, name
    assert len(offsets) >= 20


def test_constants_are_those_of_c() -> None:
    assert len(Section) == _core.SECTION_COUNT <= MAX_SECTIONS
    assert COUNTERS_PER_PROCESS == _core.COUNTERS
    assert HISTOGRAM_BUCKETS == _core.BUCKETS
    assert max(Counter) < COUNTERS_PER_PROCESS
    assert len(Histogram) == HISTOGRAMS_PER_PROCESS


def test_sections_have_the_order_of_the_c_enumeration() -> None:
    enumeration = re.search(r"enum section \{(.*?)SECTION_COUNT\n", (CORE / "arena.h").read_text(), re.DOTALL)
    assert enumeration is not None
    assert re.findall(r"SECTION_(\w+),", enumeration[1]) == [section.name for section in Section]


def test_counters_have_the_numbers_of_the_c_enumeration() -> None:
    numbers = re.findall(r"COUNTER_(\w+) = (\d+),", (CORE / "counters.h").read_text())
    assert len(numbers) >= 10
    for name, number in numbers:
        assert Counter[name] == int(number)


def test_counters_of_prefetch_sources_have_the_numbers_of_the_c_core() -> None:
    header = (CORE / "counters.h").read_text()
    numbers = dict(re.findall(r"PREFETCH_COUNT_(\w+) = (\d+),", header))
    assert {name: int(number) for name, number in numbers.items()} == {count.name: count for count in PrefetchCount}
    assert f"PREFETCH_COUNTS = {len(PrefetchCount)}\n" in header
    assert f"#define PREFETCH_OF_SOURCE {prefetch_counter(PrefetchSource.NONE, PrefetchCount.REQUESTS)}u\n" in header
    assert max(prefetch_counter(source, PrefetchCount.LATE_HITS) for source in PrefetchSource) < COUNTERS_PER_PROCESS


@given(geometries)
def test_sections_are_aligned_and_do_not_overlap(geometry: Geometry) -> None:
    layout = Layout(geometry)
    end = HEADER_NBYTES
    for section, expected in zip(layout.sections, Section, strict=True):
        assert section.section == expected
        assert section.offset % CACHE_LINE == 0
        assert section.offset >= end
        assert section.stride >= max(section.columns, 1) * np.dtype(section.dtype).itemsize
        end = section.offset + section.rows * section.stride
    assert end <= layout.nbytes < end + PAGE
    assert layout.nbytes % PAGE == 0
    assert layout.sections[Section.EXPERT_SLOTS].offset % PAGE == 0
    assert layout.sections[Section.EXPERT_SLOTS].nbytes == geometry.slots_nbytes


@given(geometries)
def test_rows_of_different_writers_share_no_cache_line(geometry: Geometry) -> None:
    layout = Layout(geometry)
    for section in (
        Section.COUNTERS,
        Section.HISTOGRAMS,
        Section.ACTIVATIONS,
        Section.PINS,
        Section.SEQUENCES,
        Section.BLOCK_TABLES,
        Section.TOKEN_IDS,
    ):
        assert layout.sections[section].stride % CACHE_LINE == 0


@given(geometries)
def test_the_section_table_names_every_section_in_order(geometry: Geometry) -> None:
    layout = Layout(geometry)
    table = layout.table()
    for section in layout.sections:
        entry = table[section.section]
        assert entry["name"].decode() == section.section.name.lower()
        assert entry["offset"] == section.offset
        assert entry["length"] == section.nbytes == section.rows * section.stride
        assert (entry["stride"], entry["count"]) == (section.stride, section.rows)


def test_the_hash_tells_every_two_geometries_apart(geometry: Geometry) -> None:
    # Most of these changes round up to the same section table, yet do not mean the same.
    hashes = {Layout(geometry).hash}
    for change in (
        {"pins_per_process": 5},
        {"slot_classes": (SlotClass(5, 101),)},
        {"slot_classes": (SlotClass(2, 100), SlotClass(3, 100))},
        {"block_size": 8},
        {"max_model_len": 41},
        {"num_experts": 71},
    ):
        hashes.add(Layout(msgspec.structs.replace(geometry, **change)).hash)
    assert len(hashes) == 7
    assert Layout(geometry).hash == Layout(geometry).hash


@pytest.mark.parametrize("field", ["num_layers", "num_experts", "num_processes", "block_size"])
def test_a_geometry_of_nothing_is_refused(geometry: Geometry, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0, expected at least 1"):
        msgspec.structs.replace(geometry, **{field: 0})


@pytest.mark.parametrize("field", [field for field in Geometry.__struct_fields__ if field != "slot_classes"])
def test_a_negative_geometry_is_refused(geometry: Geometry, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1, expected at least"):
        msgspec.structs.replace(geometry, **{field: -1})


def test_more_experts_than_a_slot_word_can_name_are_refused() -> None:
    Geometry(num_layers=(1 << 14) - 1, num_experts=1 << 10)
    with pytest.raises(ValueError, match="16384 layers x 1024 experts are too many"):
        Geometry(num_layers=1 << 14, num_experts=1 << 10)


def test_a_row_longer_than_a_stride_can_say_is_refused(geometry: Geometry) -> None:
    with pytest.raises(ValueError, match="page_nbytes is 4294967296, expected at most"):
        msgspec.structs.replace(geometry, page_nbytes=1 << 32)


@pytest.mark.parametrize(("count", "nbytes"), [(-1, 100), (3, 0), (3, 1 << 32)])
def test_slots_of_no_possible_number_or_size_are_refused(geometry: Geometry, count: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"slot_classes has {count} slots of {nbytes} bytes, expected at least 0"):
        msgspec.structs.replace(geometry, slot_classes=(SlotClass(count, nbytes),))


def test_an_expert_goes_into_the_smallest_slots_that_hold_it(geometry: Geometry) -> None:
    classes = (SlotClass(2, 300), SlotClass(3, 100), SlotClass(4, 200))
    geometry = msgspec.structs.replace(geometry, slot_classes=classes)
    assert [geometry.class_for(nbytes) for nbytes in (1, 100, 101, 200, 201, 300)] == [1, 1, 2, 2, 0, 0]
    with pytest.raises(ValueError, match=r"an expert has 301 bytes, the slots \[300, 100, 200\]"):
        geometry.class_for(301)
