"""Where experts come from: reads one expert's weights from the checkpoint's files into a slot."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import xxhash

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint, ExpertLocation
from hotset.runtime.model.tensor_index import STORED_DTYPES
from hotset.shm.layout import WeightFormat

CHUNK_NBYTES = 4 << 20  # one read of at most this much


class ExpertReadError(HotsetError):
    """An expert's bytes cannot be had, or are not what they were."""

    def __init__(self, path: str, layer: int, expert: int, offset: int, problem: str) -> None:
        super().__init__(f"expert {expert} of layer {layer} cannot be loaded from {path} at byte {offset}: {problem}")
        self.layer = layer
        self.expert = expert
        self.offset = offset


class ExpertStore:
    """Reads experts of an open checkpoint, their parts one behind the other (runtime/model/expert_parts.py).

    The checksum of the first whole read is the store's checksum from then on (INV-1): weights that change under a
    running instance are refused instead of served.
    """

    def __init__(self, checkpoint: Checkpoint, num_layers: int, num_experts: int) -> None:
        self._checkpoint = checkpoint
        self._num_experts = num_experts
        self._checksums: list[int | None] = [None] * (num_layers * num_experts)
        self._files: dict[str, int] = {}
        self.nbytes = checkpoint.expert_nbytes
        self._format = WeightFormat[checkpoint.expert_dtype.upper()]

    def read(self, expert_id: int, slot: npt.NDArray[np.uint8]) -> tuple[int, WeightFormat]:
        """Fills the first `nbytes` of `slot`; returns checksum and format, or raises `ExpertReadError`."""
        layer, expert = divmod(expert_id, self._num_experts)
        location = self._checkpoint.expert(layer, expert)
        memory = memoryview(slot)
        filled = 0
        for tensor in location.parts:
            path = str(tensor.file)
            for start in range(0, tensor.nbytes, CHUNK_NBYTES):
                chunk = memory[filled : filled + min(CHUNK_NBYTES, tensor.nbytes - start)]
                self._read_chunk(path, tensor.offset + start, chunk, layer, expert)
                filled += len(chunk)
        transpose_parts(location, slot)
        checksum = xxhash.xxh3_64_intdigest(memory[:filled])
        expected = self._checksums[expert_id]
        if expected is not None and checksum != expected:
            raise ExpertReadError(
                str(location.parts[0].file),
                layer,
                expert,
                location.parts[0].offset,
                f"its checksum is {checksum:#x}, it was {expected:#x} when it was first read",
            )
        self._checksums[expert_id] = checksum
        return checksum, self._format

    def _read_chunk(self, path: str, offset: int, chunk: memoryview, layer: int, expert: int) -> None:
        done = 0
        try:
            fd = self._files.get(path)
            if fd is None:
                fd = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                # The next expert lies elsewhere: reading ahead doubled the bytes from disk under a memory limit.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            while done < len(chunk):
                count = os.preadv(fd, [chunk[done:]], offset + done)
                if count == 0:
                    raise ExpertReadError(path, layer, expert, offset + done, "the file ends there")
                done += count
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExpertReadError(path, layer, expert, offset + done, reason) from error

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


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
