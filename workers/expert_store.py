"""Where experts come from: which bytes of which files make up an expert, and reading them into a slot."""

from __future__ import annotations

import errno
import itertools
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_slots import SLOT_ALIGNMENT
from hotset.runtime.model.checkpoint import Checkpoint, ExpertLocation
from hotset.runtime.model.pack_manifest import PackManifest
from hotset.runtime.model.tensor_index import STORED_DTYPES, TensorLocation
from hotset.shm.layout import WeightFormat

CHUNK_NBYTES = 1 << 20  # about what one read takes; between two of them an urgent load may go first


class ExpertReadError(HotsetError):
    """An expert's bytes cannot be had, or are not what they were."""

    def __init__(self, path: str, layer: int, expert: int, offset: int, problem: str) -> None:
        super().__init__(f"expert {expert} of layer {layer} cannot be loaded from {path} at byte {offset}: {problem}")
        self.layer = layer
        self.expert = expert
        self.offset = offset


class Chunk(NamedTuple):
    """`nbytes` bytes at `offset` of `path`, which go to `pieces` of a slot: (start, nbytes), one after the other."""

    expert_id: int
    path: str
    offset: int
    nbytes: int
    pieces: tuple[tuple[int, int], ...]


class ExpertStore:
    """Reads experts of an open checkpoint, their parts one behind the other (runtime/model/expert_parts.py).

    A packed model comes with checksums (INV-1). Of others, the checksum of the first whole read is the store's checksum
    from then on: weights that change under a running instance are refused instead of served. `read` may be called
    from several threads at once.

    Args:
        direct: read past the page cache, by O_DIRECT. For packed models: their blocks begin at multiples of what it
            wants (see `SLOT_ALIGNMENT`), and so do slots and chunks.
    """

    def __init__(self, checkpoint: Checkpoint, *, direct: bool = False) -> None:
        self._checkpoint = checkpoint
        self._direct = direct
        self._asks_page_cache = not direct
        self._num_experts = checkpoint.config.num_experts
        self._checksums: list[int | None] = [None] * (checkpoint.config.num_layers * self._num_experts)
        self._manifest = PackManifest.of(checkpoint.folder)
        if self._manifest is not None:
            for layer, experts in self._manifest.experts.items():
                first = layer * self._num_experts
                self._checksums[first : first + len(experts)] = [expert.checksum for expert in experts]
        self._files: dict[str, int] = {}
        self._locations: dict[int, ExpertLocation] = {}
        self._chunks: dict[int, list[Chunk]] = {}

    def nbytes(self, expert_id: int) -> int:
        """What it takes in a slot."""
        return self._location(expert_id).nbytes

    def chunks(self, expert_id: int) -> list[Chunk]:
        """What has to be read, as nearly in the order of the slot as the file allows."""
        chunks = self._chunks.get(expert_id)
        if chunks is None:
            chunks = self._chunks[expert_id] = self._cut(expert_id)
        return chunks

    def _cut(self, expert_id: int) -> list[Chunk]:
        location = self._location(expert_id)
        starts = itertools.accumulate((part.nbytes for part in location.parts[:-1]), initial=0)
        parts = sorted(zip(location.parts, starts, strict=True), key=lambda part: (part[0].file, part[0].offset))
        chunks: list[Chunk] = []
        run: list[tuple[TensorLocation, int]] = []  # parts that follow one another in a file
        for tensor, start in parts:
            if run and (run[-1][0].file != tensor.file or run[-1][0].offset + run[-1][0].nbytes != tensor.offset):
                chunks += _cut(expert_id, run)
                run = []
            run.append((tensor, start))
        return sorted(chunks + _cut(expert_id, run), key=lambda chunk: min(chunk.pieces))

    def read(self, chunk: Chunk, slot: npt.NDArray[np.uint8]) -> bool:
        """Whether it came from the disk, not from the page cache. Raises `ExpertReadError`."""
        memory = memoryview(slot)
        buffers = [memory[start : start + nbytes] for start, nbytes in chunk.pieces]
        if self._direct:  # a single piece; the last one of an expert ends within its block
            start, nbytes = chunk.pieces[0]
            buffers = [memory[start : start + -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT]]
        done = 0
        from_disk = not self._asks_page_cache
        try:
            while done < chunk.nbytes:
                try:
                    flags = 0 if from_disk else os.RWF_NOWAIT
                    count = os.preadv(self._file(chunk.path), buffers, chunk.offset + done, flags)
                except OSError as error:
                    if from_disk or error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                        raise
                    from_disk = True
                    self._asks_page_cache &= error.errno != errno.EOPNOTSUPP
                    continue
                if count == 0:
                    raise self._error(chunk, done, "the file ends there")
                done += count
                while buffers and count >= len(buffers[0]):
                    count -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][count:]
        except OSError as error:
            raise self._error(chunk, done, error.strerror or str(error)) from error
        return from_disk

    def drop_from_page_cache(self, expert_id: int) -> None:
        for chunk in self.chunks(expert_id):
            os.posix_fadvise(self._file(chunk.path), chunk.offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)

    def complete(self, expert_id: int, slot: npt.NDArray[np.uint8], checksum: int) -> tuple[int, WeightFormat]:
        """Checksum and format of an expert whose chunks are all in `slot`, with `checksum` as they were read.

        Raises `ExpertReadError` if its bytes are not what they were.
        """
        location = self._location(expert_id)
        if location.transposed:
            transpose_parts(location, slot)
            checksum = xxhash.xxh3_64_intdigest(memoryview(slot)[: location.nbytes])
        expected = self._checksums[expert_id]
        if expected is not None and checksum != expected:
            origin = "when it was first read" if self._manifest is None else "when it was packed"
            problem = f"its checksum is {checksum:#x}, it was {expected:#x} {origin}"
            first = location.parts[0]
            layer, expert = divmod(expert_id, self._num_experts)
            raise ExpertReadError(str(first.file), layer, expert, first.offset, problem)
        self._checksums[expert_id] = checksum
        dtype = self._checkpoint.expert_dtype(*divmod(expert_id, self._num_experts))
        return checksum, WeightFormat[dtype.upper()]

    def _location(self, expert_id: int) -> ExpertLocation:
        location = self._locations.get(expert_id)
        if location is None:
            location = self._checkpoint.expert(*divmod(expert_id, self._num_experts))
            self._locations[expert_id] = location
        return location

    def _file(self, path: str) -> int:
        fd = self._files.get(path)
        if fd is None:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0))
            # The next expert lies elsewhere: reading ahead doubled the bytes from disk under a memory limit.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            # Two threads may get here at once; the one that comes second uses the first one's file.
            if (first := self._files.setdefault(path, fd)) != fd:
                os.close(fd)
                return first
        return fd

    def _error(self, chunk: Chunk, done: int, problem: str) -> ExpertReadError:
        return ExpertReadError(chunk.path, *divmod(chunk.expert_id, self._num_experts), chunk.offset + done, problem)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _cut(expert_id: int, run: list[tuple[TensorLocation, int]]) -> list[Chunk]:
    """The chunks of tensors that follow one another in a file; each comes with its start in the slot."""
    first = run[0][0]
    nbytes = sum(tensor.nbytes for tensor, _ in run)
    count = max(1, round(nbytes / CHUNK_NBYTES))
    cuts = [nbytes * index // count // SLOT_ALIGNMENT * SLOT_ALIGNMENT for index in range(count)]
    bounds = [*cuts, nbytes]
    chunks: list[Chunk] = []
    for begin, end in itertools.pairwise(bounds):
        pieces: list[tuple[int, int]] = []
        at = 0  # of the tensor within the run
        for tensor, start in run:
            low, high = max(begin, at), min(end, at + tensor.nbytes)
            if low < high:
                into, nbytes = start + low - at, 0
                if pieces and sum(pieces[-1]) == into:
                    into, nbytes = pieces.pop()
                pieces.append((into, nbytes + high - low))
            at += tensor.nbytes
        chunks.append(Chunk(expert_id, str(first.file), first.offset + begin, end - begin, tuple(pieces)))
    return chunks


def transpose_parts(location: ExpertLocation, slot: npt.NDArray[np.uint8]) -> None:
    """Of an expert whose parts are in `slot` as the checkpoint has them: those that it has the other way round."""
    start = 0
    for index, part in enumerate(location.parts):
        if index in location.transposed:
            stored = slot[start : start + part.nbytes].view(STORED_DTYPES[part.dtype])
            stored[:] = stored.reshape(part.shape).T.ravel()  # ravel copies first
        start += part.nbytes


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> npt.NDArray[np.uint8]:
    """The bytes of a slot with this expert."""
    location = checkpoint.expert(layer, expert)
    parts = [np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset) for part in location.parts]
    slot = np.concatenate(parts)
    transpose_parts(location, slot)
    return slot
