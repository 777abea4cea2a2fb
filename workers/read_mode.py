"""Through the page cache or past it: how a model's experts are read.

O_DIRECT needs blocks aligned in the file and in memory, which a packed model has. It saves a copy and leaves the page
cache to others; reading through the page cache gets back for nothing what the memory beside the slots still holds. So
"auto" reads directly only what that memory cannot hold, and only where a measurement says that it is faster. Rates are
measured once for a model and the disk it lies on, and kept in the model's cache folder.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time
from pathlib import Path

import msgspec
import numpy as np

from hotset.runtime.config import ReadMode, format_nbytes
from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_slots import SLOT_ALIGNMENT
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.model_cache import model_cache, replace_file
from hotset.runtime.model.pack_manifest import EXPERTS_FILE, PackManifest
from hotset.workers.expert_store import ExpertReadError, ExpertStore
from hotset.workers.read_lanes import Load, ReadLanes

RATES_FILE = "read_rates.json"
SAMPLE_NBYTES = 64 << 20  # read in each mode
SAMPLE_SECONDS = 0.5  # at most, in each mode
GAIN = 1.1  # by which direct reads must be faster: their rate varies, and the page cache may hold more than expected
CGROUP_LIMITS = ("/sys/fs/cgroup{}/memory.max", "/sys/fs/cgroup/memory{}/memory.limit_in_bytes")


class CannotReadDirectly(HotsetError):
    """`read_mode="direct"` was asked for, and `problem` is in the way."""

    def __init__(self, model: Path, problem: str) -> None:
        super().__init__(f"read_mode is 'direct', but the experts of {model} cannot be read so: {problem}")


class ReadRates(msgspec.Struct, frozen=True):
    """Of reads that the page cache did not serve, in bytes per second, from one disk; 0 where it is impossible."""

    device: int
    buffered: float
    direct: float


class Chosen(msgspec.Struct, frozen=True):
    direct: bool
    reason: str


def choose_read_mode(asked: ReadMode, checkpoint: Checkpoint, lanes: int) -> Chosen:
    """Raises `CannotReadDirectly`."""
    if asked == "buffered":
        return Chosen(False, "asked for")
    problem = _direct_problem(checkpoint)
    if asked == "direct":
        if problem is not None:
            raise CannotReadDirectly(checkpoint.folder, problem)
        return Chosen(True, "asked for")
    if problem is not None:
        return Chosen(False, problem)
    needed = sum(checkpoint.expert(*ids).nbytes for ids in checkpoint.expert_ids)
    if needed <= (available := available_memory()):
        return Chosen(False, f"the page cache can hold all experts ({format_nbytes(available)} are available)")
    rates = _remembered(checkpoint) or _measured(checkpoint, lanes)
    direct, buffered = (
        f"{rates.direct / 1e6:.0f} MB/s direct",
        f"{rates.buffered / 1e6:.0f} MB/s through the page cache",
    )
    return Chosen(rates.direct > GAIN * rates.buffered, f"cold reads {direct}, {buffered}")


def available_memory() -> int:
    """Bytes that this process and the page cache may still get, by the machine or by its control group."""
    with Path("/proc/meminfo").open() as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        for pattern in CGROUP_LIMITS:
            with contextlib.suppress(OSError, ValueError):  # not of this version of the interface, or "max"
                available = min(available, int(Path(pattern.format(line.split(":", 2)[2])).read_text()))
    return available


def _direct_problem(checkpoint: Checkpoint) -> str | None:
    """Why its experts cannot be read by O_DIRECT; None if they can."""
    if PackManifest.of(checkpoint.folder) is None:
        return "they do not lie in aligned blocks, which `hotset pack` writes"
    try:
        fd = os.open(checkpoint.folder / EXPERTS_FILE, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return f"the file system does not do it ({error.strerror})"
    try:
        os.preadv(fd, [mmap.mmap(-1, mmap.PAGESIZE)], 0)  # a mapping is aligned
    except OSError as error:
        return f"the file system does not do it ({error.strerror})"
    finally:
        os.close(fd)
    return None


def _remembered(checkpoint: Checkpoint) -> ReadRates | None:
    try:
        rates = msgspec.json.decode((model_cache(checkpoint.folder) / RATES_FILE).read_bytes(), type=ReadRates)
    except (OSError, msgspec.DecodeError):
        return None
    return rates if rates.device == _device(checkpoint) else None


def _device(checkpoint: Checkpoint) -> int:
    return (checkpoint.folder / EXPERTS_FILE).stat().st_dev


def _measured(checkpoint: Checkpoint, lanes: int) -> ReadRates:
    ids = [layer * checkpoint.config.num_experts + expert for layer, expert in checkpoint.expert_ids]
    largest = max(checkpoint.expert(*each).nbytes for each in checkpoint.expert_ids)
    count = max(lanes, SAMPLE_NBYTES // largest)
    sample = ids[:: max(1, len(ids) // (2 * count))][: 2 * count]
    rates = ReadRates(
        _device(checkpoint),
        buffered=_rate(checkpoint, sample[::2], lanes, largest, direct=False),
        direct=_rate(checkpoint, sample[1::2], lanes, largest, direct=True),
    )
    with contextlib.suppress(OSError):  # then it is measured again next time
        replace_file(model_cache(checkpoint.folder) / RATES_FILE, msgspec.json.encode(rates))
    return rates


def _rate(checkpoint: Checkpoint, sample: list[int], lanes: int, largest: int, *, direct: bool) -> float:
    """Bytes per second of loading the sample cold, as the pager does; 0 if it cannot be read so."""
    store = ExpertStore(checkpoint, direct=direct)
    stride = -(-largest // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    slots = np.frombuffer(mmap.mmap(-1, 2 * lanes * stride), np.uint8).reshape(2 * lanes, stride)
    readers = ReadLanes(store, list(slots), lanes)
    try:
        for expert in sample:
            store.drop_from_page_cache(expert)
        began = time.monotonic()
        waiting = iter(sample)
        for slot, expert in zip(range(len(slots)), waiting, strict=False):
            readers.begin(Load(expert, slot, urgent=True))
        done = 0
        while (left := began + SAMPLE_SECONDS - time.monotonic()) > 0 and done < len(sample):
            select.select([readers.fd], [], [], left)
            for load in readers.take_finished():
                if load.error is not None:
                    return 0.0
                done += 1
                if (expert := next(waiting, None)) is not None:
                    readers.begin(Load(expert, load.slot, urgent=True))
        return done * largest / (time.monotonic() - began)
    except ExpertReadError:
        return 0.0
    finally:
        readers.close()
        store.close()
