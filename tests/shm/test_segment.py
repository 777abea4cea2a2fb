"""Segments: created whole or not at all, attached only if both sides agree, unmapped when nobody looks."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
import weakref

import msgspec
import numpy as np
import posix_ipc
import pytest

from hotset.shm import segment as segment_module
from hotset.shm.geometry import PAGE, Geometry, SlotClass
from hotset.shm.layout import HEADER, ArenaState, Layout, Section, header_crc
from hotset.shm.process import boot_id, start_time
from hotset.shm.segment import (
    SHM_FOLDER,
    NotEnoughSharedMemory,
    Segment,
    SegmentError,
    remove_ipc_objects,
    segment_name,
)


@pytest.fixture
def created(instance: str, geometry: Geometry):
    segment = Segment.create(instance, geometry)
    yield segment
    segment.close()
    remove_ipc_objects(instance)


def overwrite(instance: str, offset: int, data: bytes) -> None:
    path = SHM_FOLDER / segment_name(instance).lstrip("/")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def field_offset(field: str) -> int:
    fields = HEADER.fields
    assert fields is not None
    return fields[field][1]


def test_a_new_segment_is_whole_private_to_the_user_and_zero(created: Segment, geometry: Geometry) -> None:
    status = (SHM_FOLDER / segment_name("mine").lstrip("/")).stat()
    assert status.st_size == Layout(geometry).nbytes
    assert status.st_blocks * 512 >= status.st_size, "every byte is backed: no SIGBUS later"
    assert status.st_mode & 0o777 == 0o600
    assert created.arena.state == ArenaState.READY
    for section in Section:
        assert not created.view(section).view(np.uint8).any() if created.view(section).size else True


def test_the_header_says_who_made_it(created: Segment) -> None:
    path = SHM_FOLDER / segment_name("mine").lstrip("/")
    header = np.frombuffer(path.read_bytes()[: HEADER.itemsize], HEADER)[0]
    assert header["creator_pid"] == os.getpid()
    assert header["creator_start_time"] == start_time(os.getpid())
    assert bytes(header["boot_id"]) == boot_id()
    assert header["crc"] == header_crc(header.tobytes())


def test_attached_segments_see_each_others_stores(created: Segment, geometry: Geometry) -> None:
    other = Segment.attach("mine", geometry)
    other.arena.store_u64(Section.AFFINITY, 2, 69, 2**64 - 1)
    assert created.arena.load_u64(Section.AFFINITY, 2, 69) == 2**64 - 1
    assert created.view(Section.AFFINITY)[2, 69] == 2**64 - 1
    other.close()


def test_attaching_leaves_the_size_alone(created: Segment, geometry: Geometry) -> None:
    Segment.attach("mine", geometry).close()
    assert (SHM_FOLDER / segment_name("mine").lstrip("/")).stat().st_size == Layout(geometry).nbytes


def test_a_missing_segment_is_named(namespace: str, geometry: Geometry) -> None:
    with pytest.raises(SegmentError, match=f"there is no segment /{namespace}nobody"):
        Segment.attach("nobody", geometry)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (field_offset("magic"), b"elephant", "was not made by this version"),
        (field_offset("abi_version"), b"\xff", "was not made by this version"),
        (field_offset("crc"), b"\x00\x00\x00\x00", "damaged: its checksum does not match"),
        (field_offset("num_experts"), b"\x01", "damaged: its checksum does not match"),
        (field_offset("sections"), b"x", "damaged: its checksum does not match"),
        (HEADER.itemsize - 1, b"\x01", "damaged: its checksum does not match"),
    ],
)
def test_a_damaged_header_is_refused(
    created: Segment, geometry: Geometry, offset: int, data: bytes, message: str
) -> None:
    overwrite("mine", offset, data)
    with pytest.raises(SegmentError, match=message):
        Segment.attach("mine", geometry)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"pins_per_process": 3}, {"block_size": 8}])
def test_another_layout_is_refused(created: Segment, geometry: Geometry, change: dict[str, int]) -> None:
    with pytest.raises(SegmentError, match=r"has layout 0x[0-9a-f]+, this process expects 0x[0-9a-f]+"):
        Segment.attach("mine", msgspec.structs.replace(geometry, **change))


def test_a_too_small_segment_is_refused(created: Segment, geometry: Geometry) -> None:
    larger = msgspec.structs.replace(geometry, slot_classes=(*geometry.slot_classes, SlotClass(1, 100)))
    with pytest.raises(SegmentError, match=rf"has {Layout(geometry).nbytes} bytes, expected {Layout(larger).nbytes}"):
        Segment.attach("mine", larger)


@pytest.mark.parametrize("state", [ArenaState.BUILDING, ArenaState.CLOSED])
def test_a_segment_that_is_not_ready_is_refused(created: Segment, geometry: Geometry, state: ArenaState) -> None:
    created.arena.state = state
    with pytest.raises(SegmentError, match=f"is {state.name}, expected READY"):
        Segment.attach("mine", geometry)


def test_a_segment_whose_creator_died_before_sizing_it_is_refused(instance: str, geometry: Geometry) -> None:
    posix_ipc.SharedMemory(segment_name(instance), posix_ipc.O_CREX, size=0).close_fd()
    with pytest.raises(SegmentError, match="is empty: it was never finished"):
        Segment.attach(instance, geometry)


def test_creating_twice_fails_and_harms_nothing(created: Segment, geometry: Geometry) -> None:
    created.arena.store_u64(Section.AFFINITY, 0, 0, 7)
    with pytest.raises(posix_ipc.ExistentialError):
        Segment.create("mine", geometry)
    assert Segment.attach("mine", geometry).arena.load_u64(Section.AFFINITY, 0, 0) == 7


def test_removing_says_whether_there_was_a_segment(instance: str, geometry: Geometry) -> None:
    Segment.create(instance, geometry).close()
    assert remove_ipc_objects(instance)
    assert not remove_ipc_objects(instance)


def shared_memory_in_use() -> int:
    space = os.statvfs(SHM_FOLDER)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def too_large() -> Geometry:
    """Needs more than `/dev/shm` could hold even if it were empty."""
    space = os.statvfs(SHM_FOLDER)
    slots = SlotClass(space.f_blocks * space.f_frsize // (1 << 30) + 1, 1 << 30)
    return Geometry(num_layers=1, num_experts=8, slot_classes=(slots,))


def test_too_little_shared_memory_is_an_error_with_both_numbers(instance: str) -> None:
    space = os.statvfs(SHM_FOLDER)
    with pytest.raises(NotEnoughSharedMemory) as caught:
        Segment.create(instance, too_large())
    assert caught.value.needed == Layout(too_large()).nbytes
    assert 0 <= caught.value.available <= space.f_blocks * space.f_frsize
    assert str(caught.value.needed) in str(caught.value)
    assert str(caught.value.available) in str(caught.value)
    assert not remove_ipc_objects(instance), "nothing is left"


def test_shared_memory_that_runs_out_meanwhile_is_the_same_error(
    instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds room; the kernel's own refusal must end as cleanly."""
    monkeypatch.setattr(segment_module, "free_shared_memory", lambda: 1 << 60)
    before = shared_memory_in_use()
    with pytest.raises(NotEnoughSharedMemory) as caught:
        Segment.create(instance, too_large())
    assert caught.value.needed == Layout(too_large()).nbytes
    assert not remove_ipc_objects(instance), "nothing is left"
    # Others use /dev/shm too, but nobody else takes gigabytes of it.
    assert shared_memory_in_use() - before < 1 << 30


def test_another_failure_of_allocation_is_not_called_a_lack_of_memory(
    instance: str, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="refused"):
        Segment.create(instance, geometry)
    assert not remove_ipc_objects(instance), "nothing is left"


def test_private_segments_have_no_name_and_nothing_in_common(geometry: Geometry) -> None:
    one, two = Segment.private(geometry), Segment.private(geometry)
    one.arena.store_u64(Section.AFFINITY, 0, 0, 1)
    assert one.instance is None
    assert two.arena.load_u64(Section.AFFINITY, 0, 0) == 0
    one.close()
    two.close()


def test_views_stay_readable_after_close(created: Segment) -> None:
    view = created.view(Section.AFFINITY)
    view[0, 0] = 5
    created.close()
    assert view[0, 0] == 5


def test_slices_of_views_keep_the_mapping_too(geometry: Geometry) -> None:
    segment = Segment.private(geometry)
    tail = segment.view(Section.TOKEN_IDS)[1, 3:]
    segment.close()
    tail[:] = 9
    assert int(tail.sum()) == 9 * len(tail)


def test_the_mapping_goes_with_its_last_view(geometry: Geometry) -> None:
    segment = Segment.private(geometry)
    mapping = weakref.ref(segment._mmap)
    view = segment.view(Section.AFFINITY)
    segment.close()
    del segment
    gc.collect()
    assert mapping() is not None
    del view
    gc.collect()
    assert mapping() is None


def test_closing_twice_is_harmless(geometry: Geometry) -> None:
    segment = Segment.private(geometry)
    segment.close()
    segment.close()


def test_a_view_has_the_sections_shape_and_place(private: Segment, geometry: Geometry) -> None:
    assert private.view(Section.PINS).shape == (geometry.num_processes, geometry.pins_per_process)
    assert private.view(Section.KV_PAGES).shape == (geometry.num_pages + 1, geometry.page_nbytes)
    assert private.view(Section.BLOCK_TABLES).shape == (geometry.max_sequences, 3)
    private.view(Section.PINS)[1, 3] = 17
    pins = Layout(geometry).sections[Section.PINS]
    assert memoryview(private._mmap)[pins.offset + pins.stride + 3 * 4] == 17


def test_slots_of_each_class_are_whole_pages_apart(geometry: Geometry) -> None:
    classes = (SlotClass(2, PAGE + 1), SlotClass(0, 7), SlotClass(3, 100))
    segment = Segment.private(msgspec.structs.replace(geometry, slot_classes=classes))
    slots = segment.slots()
    assert [len(slot) for slot in slots] == [PAGE + 1, PAGE + 1, 100, 100, 100]
    for number, slot in enumerate(slots):
        slot[:] = number
    begin = segment.layout.sections[Section.EXPERT_SLOTS].offset
    memory = memoryview(segment._mmap)
    assert [memory[begin + page * PAGE] for page in (0, 2, 4, 5, 6)] == [0, 1, 2, 3, 4]
    assert segment.layout.geometry.classes_of_slots == [0, 0, 2, 2, 2]


def test_a_process_started_afresh_attaches(created: Segment, geometry: Geometry, namespace: str) -> None:
    program = (
        "import sys, msgspec\n"
        "from hotset.shm import segment\n"
        "from hotset.shm.geometry import Geometry\n"
        "from hotset.shm.layout import Section\n"
        "segment.PREFIX = sys.argv[1]\n"
        "mine = segment.Segment.attach('mine', msgspec.json.decode(sys.argv[2], type=Geometry))\n"
        "mine.arena.store_u32(Section.DIRECTORY, 5, 0, 77)\n"
    )
    arguments = [namespace, msgspec.json.encode(geometry).decode()]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=60)
    assert created.arena.load_u32(Section.DIRECTORY, 5, 0) == 77


def test_memory_that_is_no_arena_is_refused(geometry: Geometry) -> None:
    from hotset.shm import _core

    blank = mmap.mmap(-1, Layout(geometry).nbytes)
    with pytest.raises(ValueError, match="does not begin with hotset's magic number"):
        _core.Arena(blank)
    with pytest.raises(ValueError, match="is smaller than an arena header"):
        _core.Arena(memoryview(blank)[:64])
    with pytest.raises(ValueError, match="is not aligned to 64 bytes"):
        _core.Arena(memoryview(blank)[8:])
    with pytest.raises(BufferError):
        _core.Arena(bytes(4096))
    blank.close()  # none of the refused arenas holds on to it
