"""The layout of the arena: which sections it has, how long they are, and who may write them.

This is the only declaration. From it come the header's section table (which the C core reads), the numpy views and
the layout hash that refuses a foreign arena. `shm/core/arena.h` lists the same sections in the same order, with the
writer of each; a test compares the two.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from hotset.shm.geometry import CACHE_LINE, PAGE, Geometry, round_up

HEADER_NBYTES = PAGE
STATE_OFFSET = HEADER_NBYTES - CACHE_LINE
MAX_SECTIONS = 40
COUNTERS_PER_PROCESS = 128
HISTOGRAM_BUCKETS = 256
HISTOGRAMS_PER_PROCESS = 5
DEMAND_RING_HEADER = 64  # bytes before the words


class ArenaState(enum.IntEnum):
    """Stored last of all: an arena is usable only while READY."""

    BUILDING = 0
    READY = 1
    CLOSED = 2


class SlotState(enum.IntEnum):
    EMPTY = 0
    LOADING = 1
    RESIDENT = 2
    EVICTING = 3


class WeightFormat(enum.IntEnum):
    """How the weights in an expert slot are stored (INV-4: it travels with the slot)."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    Q8_0 = 3  # GGML's blocks of 32: a float16 scale, then 32 int8
    Q4_0 = 4  # the same with 4-bit numbers
    MXFP4 = 5  # blocks of 32 E2M1 numbers, and behind all rows of a matrix an E8M0 scale for each block
    MXFP4_GGML = 6  # GGML's blocks of 32: an E8M0 scale, then E2M1 numbers


class PrefetchSource(enum.IntEnum):
    """Who asked for the expert in a slot before it was needed: workers/prefetch has a module for each but the last."""

    NONE = 0  # nobody: a worker waited for it
    GATE_AHEAD = 1
    GATE_AHEAD_2 = 2
    RUNNERS_UP = 3
    AFFINITY = 4
    TRANSITIONS = 5
    ENGINE = 6  # somebody else's, which has only the expert cache


class Section(enum.IntEnum):
    RESIDENT_MASK = 0
    LOADING_MASK = 1
    FAILED_MASK = 2
    URGENT_MASK = 3
    PREFETCH_MASK = 4
    PREFETCHED_MASK = 5
    LAYERS = 6
    AFFINITY = 7
    COUNTERS = 8
    HISTOGRAMS = 9
    ACTIVATIONS = 10
    PINS = 11
    DIRECTORY = 12
    SLOT_WORDS = 13
    SLOT_INFO = 14
    SEQUENCES = 15
    BLOCK_TABLES = 16
    TOKEN_IDS = 17
    PAGE_GENERATIONS = 18
    KV_PAGES = 19
    EXPERT_SLOTS = 20
    DEMANDS = 21
    USER_PINS = 22


LAYER_STATE = np.dtype(
    {
        "names": ["affinity_epoch", "logit_range", "expert_norm", "residency_generation"],
        "formats": ["<u8", "<f4", "<f4", "<u4"],
        "offsets": [0, 8, 12, 64],
        "itemsize": 128,
    }
)
SLOT_INFO = np.dtype([("checksum", "<u8"), ("nbytes", "<u4"), ("format", "<u2"), ("source", "<u2")])
SEQUENCE_STATE = np.dtype(
    {"names": ["committed", "granted_blocks"], "formats": ["<u8", "<u4"], "offsets": [0, 8], "itemsize": 64}
)
SECTION_ENTRY = np.dtype([("name", "S24"), ("offset", "<u8"), ("length", "<u8"), ("stride", "<u4"), ("count", "<u4")])
HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("abi_version", "<u4"),
        ("crc", "<u4"),
        ("total_nbytes", "<u8"),
        ("layout_hash", "<u8"),
        ("instance_uuid", "V16"),
        ("boot_id", "V16"),
        ("creator_pid", "<u8"),
        ("creator_start_time", "<u8"),
        ("num_layers", "<u4"),
        ("num_experts", "<u4"),
        ("num_processes", "<u4"),
        ("pins_per_process", "<u4"),
        ("num_slots", "<u4"),
        ("num_pages", "<u4"),
        ("max_sequences", "<u4"),
        ("section_count", "<u4"),
        ("sections", SECTION_ENTRY, (MAX_SECTIONS,)),
    ]
)


class SectionLayout(msgspec.Struct, frozen=True):
    """Where one section lies. Rows are `stride` bytes apart and hold `columns` items of `dtype`."""

    section: Section
    dtype: npt.DTypeLike
    rows: int
    columns: int
    stride: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.stride


def _declarations(g: Geometry) -> Iterator[tuple[Section, npt.DTypeLike, int, int, int]]:
    """(section, dtype, rows, columns, row alignment). Rows with different writers start a cache line of their own."""
    for section in (
        Section.RESIDENT_MASK,
        Section.LOADING_MASK,
        Section.FAILED_MASK,
        Section.URGENT_MASK,
        Section.PREFETCH_MASK,
        Section.PREFETCHED_MASK,
    ):
        yield section, np.dtype("<u8"), g.num_layers, g.mask_words, CACHE_LINE
    yield Section.LAYERS, LAYER_STATE, g.num_layers, 1, CACHE_LINE
    yield Section.AFFINITY, np.dtype("<u8"), g.num_layers, g.num_experts, CACHE_LINE
    yield Section.COUNTERS, np.dtype("<u8"), g.num_processes, COUNTERS_PER_PROCESS, CACHE_LINE
    yield (
        Section.HISTOGRAMS,
        np.dtype("<u8"),
        g.num_processes,
        HISTOGRAMS_PER_PROCESS * HISTOGRAM_BUCKETS,
        CACHE_LINE,
    )
    yield Section.ACTIVATIONS, np.dtype("<u8"), g.num_processes, g.num_layers * g.num_experts, CACHE_LINE
    yield Section.PINS, np.dtype("<u4"), g.num_processes, g.pins_per_process, CACHE_LINE
    yield Section.DIRECTORY, np.dtype("<u4"), g.num_layers * g.num_experts, 1, 4
    yield Section.SLOT_WORDS, np.dtype("<u8"), g.num_slots, 1, 8
    yield Section.SLOT_INFO, SLOT_INFO, g.num_slots, 1, 16
    yield Section.SEQUENCES, SEQUENCE_STATE, g.max_sequences, 1, CACHE_LINE
    yield Section.BLOCK_TABLES, np.dtype("<u4"), g.max_sequences, g.kv_groups * g.max_blocks, CACHE_LINE
    yield Section.TOKEN_IDS, np.dtype("<i4"), g.max_sequences, g.max_model_len, CACHE_LINE
    pages = g.num_pages + 1 if g.num_pages else 0
    yield Section.PAGE_GENERATIONS, np.dtype("<u4"), pages, 1, 4
    yield Section.KV_PAGES, np.dtype("u1"), pages, g.page_nbytes, CACHE_LINE
    yield Section.EXPERT_SLOTS, np.dtype("u1"), g.slots_nbytes // PAGE, PAGE, PAGE
    rings = g.num_processes if g.demand_words else 0
    yield Section.DEMANDS, np.dtype("<u2"), rings, DEMAND_RING_HEADER // 2 + g.demand_words, CACHE_LINE
    yield Section.USER_PINS, np.dtype("<u8"), g.num_layers, g.mask_words, CACHE_LINE


class Layout:
    """All sections of an arena of one geometry.

    Attributes:
        sections: one `SectionLayout` per `Section`, in order; offsets are multiples of 64 bytes.
        nbytes: size of the whole arena, a multiple of the page size.
        hash: of the section table and the geometry (several geometries round up to one table); processes that
            disagree about either cannot attach to each other.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        offset = HEADER_NBYTES
        sections: list[SectionLayout] = []
        for section, dtype, rows, columns, alignment in _declarations(geometry):
            offset = round_up(offset, max(alignment, CACHE_LINE))
            stride = round_up(max(columns, 1) * np.dtype(dtype).itemsize, alignment)
            sections.append(SectionLayout(section, dtype, rows, columns, stride, offset))
            offset += rows * stride
        self.sections = tuple(sections)
        self.nbytes = round_up(offset, PAGE)
        self.hash = xxhash.xxh3_64_intdigest(self.table().tobytes() + msgspec.msgpack.encode(geometry))

    def slots(self, memory: memoryview | mmap.mmap) -> list[npt.NDArray[np.uint8]]:
        """Each expert slot's bytes, by its number, nothing copied."""
        pages: npt.NDArray[np.uint8] = self.view(memory, Section.EXPERT_SLOTS).reshape(-1).view(np.uint8)
        views: list[npt.NDArray[np.uint8]] = []
        at = 0
        for slots in self.geometry.slot_classes:
            for _ in range(slots.count):
                views.append(pages[at : at + slots.nbytes])
                at += round_up(slots.nbytes, PAGE)
        return views

    def table(self) -> npt.NDArray[np.void]:
        """The section table as it stands in the header page."""
        table = np.zeros(MAX_SECTIONS, SECTION_ENTRY)
        for s in self.sections:
            table[s.section] = (s.section.name.lower().encode(), s.offset, s.nbytes, s.stride, s.rows)
        return table

    def write_header(self, memory: memoryview, *, uuid: bytes, boot_id: bytes, pid: int, start_time: int) -> None:
        """Writes the header page but for the state word, which the creator stores last."""
        from hotset.shm import _core

        g = self.geometry
        header = np.zeros((), HEADER)
        header["magic"] = _core.MAGIC
        header["abi_version"] = _core.ABI_VERSION
        header["total_nbytes"] = self.nbytes
        header["layout_hash"] = self.hash
        header["instance_uuid"] = np.void(uuid)
        header["boot_id"] = np.void(boot_id)
        header["creator_pid"] = pid
        header["creator_start_time"] = start_time
        for name in (
            "num_layers",
            "num_experts",
            "num_processes",
            "pins_per_process",
            "num_slots",
            "num_pages",
            "max_sequences",
        ):
            header[name] = getattr(g, name)
        header["section_count"] = len(self.sections)
        header["sections"] = self.table()
        header["crc"] = header_crc(header.tobytes())
        memory[: HEADER.itemsize] = header.tobytes()

    def view(self, memory: memoryview | mmap.mmap, section: Section) -> npt.NDArray[np.generic]:
        """The section as an array of shape [rows, columns] over `memory`, nothing copied.

        Live fields with other writers must be read and written through `Arena`, not through this view: numpy
        promises neither atomicity nor order.
        """
        s = self.sections[section]
        dtype = np.dtype(s.dtype)
        # frombuffer, because ndarray(buffer=memory) lets go of the buffer at once: `memory` could then be
        # unmapped under the array.
        whole = np.frombuffer(memory, np.uint8)
        return np.ndarray((s.rows, s.columns), dtype, buffer=whole, offset=s.offset, strides=(s.stride, dtype.itemsize))


def header_crc(header: bytes) -> int:
    """Checksum of a header's bytes, its own field taken as zero."""
    fields = HEADER.fields
    if fields is None:  # pragma: no cover - HEADER is a structured dtype
        raise TypeError("HEADER has no fields")
    at = fields["crc"][1]
    return xxhash.xxh32_intdigest(header[:at] + bytes(4) + header[at + 4 : HEADER.itemsize])
