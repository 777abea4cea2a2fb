# posix_ipc comes without type information
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false
"""One POSIX shared-memory segment per instance: create, attach, remove, and clean up after the killed.

Names follow from the instance name, so that whatever a killed instance left can be found without its help. Objects
are made in the order lock, segment, queue and removed in the opposite order: a queue never outlives its segment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import posix_ipc

from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import HEADER, ArenaState, Layout, Section, header_crc
from hotset.shm.process import boot_id, start_time

PREFIX = "hotset."
LOCK_SUFFIX = ".lock"  # instance names have no dot
QUEUE_SUFFIX = ".paging"
SHM_FOLDER = Path("/dev/shm")
QUEUE_FOLDER = Path("/dev/mqueue")  # where the kernel lists message queues, if that is mounted


class SegmentError(Exception):
    """The segment cannot be used; the message says which and why."""


class NotEnoughSharedMemory(SegmentError):
    """`/dev/shm` has `available` bytes free, the arena needs `needed`."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(
            f"the arena needs {needed} bytes of shared memory but {SHM_FOLDER} has {available} bytes free; "
            "give a smaller expert or KV budget, or enlarge it (mount -o remount,size=...)"
        )
        self.needed = needed
        self.available = available


class InstanceNameTaken(SegmentError):
    """A running instance has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"an instance named {name!r} is running already; choose another name")
        self.name = name


def check_instance_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ValueError(f"the instance name is {name!r}, expected 1 to 64 of A-Z a-z 0-9 _ -")
    return name


def new_instance_name() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def segment_name(instance: str) -> str:
    return f"/{PREFIX}{instance}"


def queue_name(instance: str) -> str:
    return f"/{PREFIX}{instance}{QUEUE_SUFFIX}"


class InstanceLock:
    """Guards an instance name with `flock`: held means alive, for the kernel lets go of it with the process.

    The file lies beside the segment, so that whoever sees the one sees the other; a folder that the environment
    names could differ between two processes of one user, and the janitor of one would remove what the other uses.

    Args:
        name: of the instance.
        patience: seconds to go on trying; a janitor that looks whether the name is in use holds it for a moment.
    """

    def __init__(self, name: str, *, patience: float = 0.0) -> None:
        self.name = check_instance_name(name)
        deadline = time.monotonic() + patience
        self._path = SHM_FOLDER / f"{PREFIX}{name}{LOCK_SUFFIX}"
        while True:
            self._fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                if time.monotonic() >= deadline:
                    raise InstanceNameTaken(name) from None
                time.sleep(0.01)
                continue
            # The last holder may have removed the file between our open and our lock: then ours guards nothing.
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                    return
            os.close(self._fd)

    def release(self) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def remove_ipc_objects(instance: str) -> bool:
    """Unlinks the queue and the segment of an instance; whether there was any of them."""
    removed = 0
    for unlink, name in (
        (posix_ipc.unlink_message_queue, queue_name(instance)),
        (posix_ipc.unlink_shared_memory, segment_name(instance)),
    ):
        with contextlib.suppress(posix_ipc.ExistentialError):
            unlink(name)
            removed += 1
    return removed > 0


def remove_stale_instances() -> list[str]:
    """The janitor: removes what killed instances of this user left, and returns their names.

    A queue that is left alone, for its segment was removed by hand, is seen where the kernel lists queues. The lock's
    file may have gone the same way under an instance that runs: what somebody has open stays.
    """
    in_shm = _names_in(SHM_FOLDER, LOCK_SUFFIX)
    queues_only = _names_in(QUEUE_FOLDER, QUEUE_SUFFIX) - in_shm
    removed: list[str] = []
    for name in sorted(in_shm | queues_only):
        try:
            lock = InstanceLock(name)
        except (InstanceNameTaken, ValueError):
            continue
        try:
            if not (name in queues_only and _is_open(queue_name(name))) and remove_ipc_objects(name):
                removed.append(name)
        finally:
            lock.release()
    return removed


def _names_in(folder: Path, suffix: str) -> set[str]:
    """Of this user's instances; perhaps not only theirs, which their characters tell."""
    found: set[str] = set()
    for path in folder.glob(PREFIX + "*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid():
                found.add(path.name.removeprefix(PREFIX).removesuffix(suffix))
    return found


def _is_open(queue: str) -> bool:
    """Whether a process of this user has it open."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended by now, or is another user's
            for descriptor in [*(process / "fd").iterdir()]:
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) == queue:
                        return True
    return False


def free_shared_memory() -> int:
    """Bytes that `/dev/shm` still has."""
    space = os.statvfs(SHM_FOLDER)
    return space.f_bavail * space.f_frsize


class Segment:
    """The mapped arena of an instance, or private memory with the same layout.

    Attributes:
        arena: the atomic operations (`hotset.shm._core.Arena`).
        layout: where each section lies.
    """

    def __init__(self, memory: mmap.mmap, layout: Layout, instance: str | None) -> None:
        self._mmap = memory
        self.layout = layout
        self.instance = instance
        self.arena = _core.Arena(memory)

    @property
    def memory(self) -> mmap.mmap:
        """The whole arena, for C extensions that attach themselves to it."""
        return self._mmap

    @property
    def uuid(self) -> str:
        """Of this arena and no other; an instance's name may be used again."""
        return np.frombuffer(self._mmap[: HEADER.itemsize], HEADER)[0]["instance_uuid"].tobytes().hex()

    @classmethod
    def private(cls, geometry: Geometry) -> Segment:
        """Anonymous memory of this process alone, for the router or the cache without an instance."""
        layout = Layout(geometry)
        memory = mmap.mmap(-1, layout.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return cls._build(memory, layout, None)

    @classmethod
    def create(cls, instance: str, geometry: Geometry) -> Segment:
        """A new segment, every byte of it backed; the caller holds the instance's lock.

        Raises `NotEnoughSharedMemory` instead of letting a later store die of SIGBUS.
        """
        layout = Layout(geometry)
        name = segment_name(instance)
        # Asked first: fallocate would fill all that is free before it fails, at the cost of others.
        if layout.nbytes > (free := free_shared_memory()):
            raise NotEnoughSharedMemory(layout.nbytes, free)
        # size 0: posix_ipc would unlink an existing segment whose resize fails.
        shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=0)
        try:
            try:
                os.posix_fallocate(shared.fd, 0, layout.nbytes)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # What fallocate took before it failed counts as free again once the segment is gone.
                free = free_shared_memory() + os.fstat(shared.fd).st_blocks * 512
                raise NotEnoughSharedMemory(layout.nbytes, free) from error
            memory = mmap.mmap(shared.fd, layout.nbytes)
        except BaseException:
            posix_ipc.unlink_shared_memory(name)
            raise
        finally:
            shared.close_fd()
        return cls._build(memory, layout, instance)

    @classmethod
    def _build(cls, memory: mmap.mmap, layout: Layout, instance: str | None) -> Segment:
        layout.write_header(
            memoryview(memory),
            uuid=secrets.token_bytes(16),
            boot_id=boot_id(),
            pid=os.getpid(),
            start_time=start_time(os.getpid()) or 0,
        )
        segment = cls(memory, layout, instance)
        segment.arena.state = ArenaState.READY
        return segment

    @classmethod
    def attach(cls, instance: str, geometry: Geometry) -> Segment:
        """Maps the segment of a running instance and checks that both builds agree about its layout."""
        try:
            shared = posix_ipc.SharedMemory(segment_name(instance), size=0)
        except posix_ipc.ExistentialError:
            raise SegmentError(f"there is no segment {segment_name(instance)}") from None
        try:
            # Its creator was killed, or is still at work, between making the name and sizing it.
            if os.fstat(shared.fd).st_size == 0:
                raise SegmentError(f"{segment_name(instance)} is empty: it was never finished")
            memory = mmap.mmap(shared.fd, 0)
        finally:
            shared.close_fd()
        layout = Layout(geometry)
        try:
            check_header(memory, layout, segment_name(instance))
            segment = cls(memory, layout, instance)
        except BaseException:
            memory.close()
            raise
        if (state := ArenaState(segment.arena.state)) != ArenaState.READY:
            segment.close()
            raise SegmentError(f"{segment_name(instance)} is {state.name}, expected READY")
        return segment

    def block_tables(self) -> npt.NDArray[np.uint32]:
        """The section BLOCK_TABLES as [sequences, groups, blocks], nothing copied."""
        geometry = self.layout.geometry
        tables = self.view(Section.BLOCK_TABLES)
        return tables.reshape(len(tables), geometry.kv_groups, geometry.max_blocks)

    def view(self, section: Section) -> np.ndarray:
        """The section as an array over the arena, shape [rows, columns]; see `Layout.view`."""
        return self.layout.view(self._mmap, section)

    def slots(self) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each expert slot, uint8 [nbytes of its class], by the slot's number."""
        return self.layout.slots(self._mmap)

    def close(self) -> None:
        """Lets go of the mapping. Views that are still alive keep it until they are gone."""
        self.arena.close()
        with contextlib.suppress(BufferError):
            self._mmap.close()


def check_header(memory: mmap.mmap, layout: Layout, name: str) -> None:
    """Raises `SegmentError` unless `memory` begins with a finished header for `layout`."""
    if len(memory) < layout.nbytes:
        raise SegmentError(f"{name} has {len(memory)} bytes, expected {layout.nbytes}")
    raw = memory[: HEADER.itemsize]
    header = np.frombuffer(raw, HEADER)[0]
    if int(header["magic"]) != _core.MAGIC or int(header["abi_version"]) != _core.ABI_VERSION:
        raise SegmentError(f"{name} was not made by this version of hotset")
    if int(header["crc"]) != header_crc(raw):
        raise SegmentError(f"the header of {name} is damaged: its checksum does not match")
    if int(header["layout_hash"]) != layout.hash:
        raise SegmentError(f"{name} has layout {int(header['layout_hash']):#x}, this process expects {layout.hash:#x}")
