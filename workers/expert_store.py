"""Where experts come from: which bytes of which files make up an expert, and whether they are what they were."""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_slots import SLOT_ALIGNMENT
from hotset.runtime.model.checkpoint import Checkpoint, ExpertLocation
from hotset.runtime.model.pack_manifest import PackManifest
from hotset.runtime.model.tensor_index import STORED_DTYPES, TensorLocation
from hotset.shm.layout import WeightFormat

Int64 = npt.NDArray[np.int64]

CHUNK_NBYTES = 256 << 10  # about the least that one read takes: see reading/core/lanes.h


class ExpertReadError(HotsetError):
    """An expert's bytes cannot be had, or are not what they were."""

    def __init__(self, path: str, layer: int, expert: int, offset: int, problem: str) -> None:
        super().__init__(f"expert {expert} of layer {layer} cannot be loaded from {path} at byte {offset}: {problem}")
        self.layer = layer
        self.expert = expert
        self.offset = offset


class Chunk(NamedTuple):
    """What lies at `offset` of `path` and goes to `pieces` of a slot: (start, nbytes), one after the other."""

    path: str
    offset: int
    pieces: tuple[tuple[int, int], ...]


class ExpertStore:
    """The experts of an open checkpoint, their parts one behind the other (runtime/model/expert_parts.py).

    A packed model comes with checksums (INV-1). Of others, the checksum of the first whole read is the store's checksum
    from then on: weights that change under a running instance are refused instead of served.

    Args:
        direct: to be read past the page cache, by O_DIRECT. For packed models: their blocks begin at multiples of what
            it wants (see `SLOT_ALIGNMENT`), and so do slots and chunks.
    """

    def __init__(self, checkpoint: Checkpoint, *, direct: bool = False) -> None:
        self._checkpoint = checkpoint
        self.direct = direct
        self._num_experts = checkpoint.config.num_experts
        self._checksums: list[int | None] = [None] * (checkpoint.config.num_layers * self._num_experts)
        self._manifest = PackManifest.of(checkpoint.folder)
        if self._manifest is not None:
            for layer, experts in self._manifest.experts.items():
                first = layer * self._num_experts
                self._checksums[first : first + len(experts)] = [expert.checksum for expert in experts]
        self._files: dict[str, int] = {}
        self._locations: dict[int, ExpertLocation] = {}

    def pieces(self, expert_id: int) -> tuple[Int64, Int64]:
        """What has to be read, as nearly in the order of the slot as the file allows, and which matrices have to be
        turned then: rows as `_core.Lanes.know` takes them (reading/_core.pyi). Raises `ExpertReadError`."""
        pieces: list[tuple[int, int, int, int, int]] = []
        for number, chunk in enumerate(self._cut(expert_id)):
            offset = chunk.offset
            for start, nbytes in chunk.pieces:
                pieces.append((number, self._file(expert_id, chunk), offset, start, nbytes))
                offset += nbytes
        return np.array(pieces, np.int64), np.array(_transposed(self._location(expert_id)), np.int64).reshape(-1, 4)

    def _cut(self, expert_id: int) -> list[Chunk]:
        location = self._location(expert_id)
        starts = itertools.accumulate((part.nbytes for part in location.parts[:-1]), initial=0)
        parts = sorted(zip(location.parts, starts, strict=True), key=lambda part: (part[0].file, part[0].offset))
        chunks: list[Chunk] = []
        run: list[tuple[TensorLocation, int]] = []  # parts that follow one another in a file
        for tensor, start in parts:
            if run and (run[-1][0].file != tensor.file or run[-1][0].offset + run[-1][0].nbytes != tensor.offset):
                chunks += _cut(run)
                run = []
            run.append((tensor, start))
        return sorted(chunks + _cut(run), key=lambda chunk: min(chunk.pieces))

    def drop_from_page_cache(self, expert_id: int) -> None:
        for _, fd, offset, _, nbytes in self.pieces(expert_id)[0].tolist():
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def checksum(self, expert_id: int) -> int | None:
        """What its bytes in a slot have to have; None if it is not known yet."""
        return self._checksums[expert_id]

    def weight_format(self, expert_id: int) -> WeightFormat:
        return WeightFormat[self._checkpoint.expert_dtype(*divmod(expert_id, self._num_experts)).upper()]

    def verify(self, expert_id: int, checksum: int) -> None:
        """Raises `ExpertReadError` if an expert whose bytes in a slot have this checksum is not what it was."""
        expected = self._checksums[expert_id]
        if expected is not None and checksum != expected:
            origin = "when it was first read" if self._manifest is None else "when it was packed"
            problem = f"its checksum is {checksum:#x}, it was {expected:#x} {origin}"
            first = self._location(expert_id).parts[0]
            raise ExpertReadError(str(first.file), *divmod(expert_id, self._num_experts), first.offset, problem)
        self._checksums[expert_id] = checksum

    def _location(self, expert_id: int) -> ExpertLocation:
        location = self._locations.get(expert_id)
        if location is None:
            location = self._checkpoint.expert(*divmod(expert_id, self._num_experts))
            self._locations[expert_id] = location
        return location

    def _file(self, expert_id: int, chunk: Chunk) -> int:
        fd = self._files.get(chunk.path)
        if fd is None:
            try:
                fd = os.open(chunk.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0))
            except OSError as error:
                layer, expert = divmod(expert_id, self._num_experts)
                problem = error.strerror or str(error)
                raise ExpertReadError(chunk.path, layer, expert, chunk.offset, problem) from error
            self._files[chunk.path] = fd
            # The next expert lies elsewhere: reading ahead doubled the bytes from disk under a memory limit.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def error(self, expert_id: int, fd: int, offset: int, problem: str) -> ExpertReadError:
        """Of a read from one of its files."""
        path = next(path for path, file in self._files.items() if file == fd)
        return ExpertReadError(path, *divmod(expert_id, self._num_experts), offset, problem)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _cut(run: list[tuple[TensorLocation, int]]) -> list[Chunk]:
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
        chunks.append(Chunk(str(first.file), first.offset + begin, tuple(pieces)))
    return chunks


def _transposed(location: ExpertLocation) -> list[tuple[int, int, int, int]]:
    """(start in the slot, rows, columns, bytes of a value) of the parts that the checkpoint has the other way round."""
    starts = list(itertools.accumulate((part.nbytes for part in location.parts), initial=0))
    return [
        (starts[index], *location.parts[index].shape, STORED_DTYPES[location.parts[index].dtype].itemsize)
        for index in location.transposed
    ]


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> npt.NDArray[np.uint8]:
    """The bytes of a slot with this expert, read and turned by numpy."""
    location = checkpoint.expert(layer, expert)
    parts = [np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset) for part in location.parts]
    for index in location.transposed:
        part = location.parts[index]
        stored = parts[index].view(STORED_DTYPES[part.dtype]).reshape(part.shape)
        parts[index] = stored.T.ravel().view(np.uint8)  # ravel copies
    return np.concatenate(parts)
