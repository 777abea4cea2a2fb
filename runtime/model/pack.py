"""Writes a packed model: each expert one aligned block of a single file, with a checksum, in a format of choice.

Packing may be killed at any time and begun again with the same command: blocks that were finished are checked and kept.
What says that the model is complete, tensors.json, is put in place last, by a rename.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from hotset.runtime.model.calibration import CALIBRATION
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.conversion import convert_rows
from hotset.runtime.model.expert_formats import CannotPack, PrecisionTiers, choose_formats, read_heat
from hotset.runtime.model.expert_parts import expert_parts
from hotset.runtime.model.pack_manifest import (
    BLOCK_ALIGNMENT,
    DENSE_FILE,
    EXPERTS_FILE,
    JOURNAL,
    MANIFEST,
    PackedExpert,
    PackManifest,
)
from hotset.runtime.model.tensor_index import TENSORS_JSON, StoredTensor, TensorLocation, nbytes_of
from hotset.runtime.model.tensors import Tensor, dense_tensors
from hotset.shm.kv_page_format import UnrepresentableValue

_COPIED: Final = ("*.json", "*.jinja", "*.model", "*.txt")


class _Block(msgspec.Struct, frozen=True):
    """Where an expert goes in experts.bin, and as what. The next block begins at `end`."""

    layer: int
    expert: int
    dtype: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


class CannotWritePack(CannotPack):
    """Perhaps later: finished blocks are kept."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be written: {problem}")
        self.path = path


class Packer:
    """One run of `hotset pack`.

    Args:
        model: folder of the checkpoint.
        out: folder of the packed model; new, empty, or left by a run that was killed.
        format: of the experts, "mixed" by how often each was used; None leaves them as they are. Dense weights are
            copied as they are.
        heat_of: for "mixed", the model whose recorded use counts, if not `model` itself.
        tiers: for "mixed".

    Attributes:
        count: of experts.
        nbytes: of their blocks.
        formats: how many experts get each dtype.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        format: str | None = None,
        *,
        heat_of: Path | None = None,
        tiers: PrecisionTiers | None = None,
    ) -> None:
        if format != "mixed" and (heat_of or tiers):
            raise ValueError(f"format is {format!r}, expected 'mixed' where heat or tiers are given")
        if heat_of is not None:
            ModelConfig.load(heat_of)  # or it is no model
        self._out = out
        self._checkpoint = checkpoint = Checkpoint.open(model, to_convert=True)
        self._config = checkpoint.config
        self._heat = read_heat(checkpoint, heat_of or model) if format == "mixed" else None
        dtypes = choose_formats(checkpoint, format, self._heat, tiers, heat_of=heat_of)
        self.formats = Counter(dtypes)
        self._blocks = list(self._lay_out(dtypes))
        self.count = len(self._blocks)
        self.nbytes = self._blocks[-1].end

    def _lay_out(self, dtypes: list[str]) -> Iterator[_Block]:
        offset = 0
        for (layer, expert), dtype in zip(self._checkpoint.expert_ids, dtypes, strict=True):
            nbytes = sum(nbytes for *_, nbytes in self._parts(layer, expert, dtype))
            block = _Block(layer, expert, dtype, offset, nbytes)
            yield block
            offset = block.end

    def run(self, progress: Callable[[int], None]) -> None:
        """`progress` is told the number of finished blocks. Raises `CannotPack` or `OSError`."""
        self._prepare_folder()
        (self._out / EXPERTS_FILE).touch()  # and not opened for appending, which would ignore where a block goes
        with (self._out / JOURNAL).open("a+b") as journal, (self._out / EXPERTS_FILE).open("r+b") as file:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotPack(f"another process is packing into {self._out}") from None
            checksums = self._finished_blocks(journal.fileno(), file.fileno())
            self._check_space(self.nbytes - self._blocks[len(checksums)].offset if len(checksums) < self.count else 0)
            for block in self._blocks[len(checksums) :]:
                progress(len(checksums))
                checksums.append(self._write_block(file.fileno(), block))
                os.write(journal.fileno(), checksums[-1].to_bytes(8, "little"))
            progress(self.count)
            os.fsync(file.fileno())
            self._finish(checksums)
        (self._out / JOURNAL).unlink()

    # ---- experts

    def _parts(self, layer: int, expert: int, dtype: str) -> Iterator[tuple[Tensor, str, int]]:
        """The tensors of an expert that is packed in `dtype`: what they are, as what they are stored, and their bytes.

        An expert that stays as it is keeps the dtype of each of its parts: gpt-oss' have biases beside packed numbers.
        Biases that have a dtype of their own keep it in any case.
        """
        stays = dtype == self._checkpoint.expert_dtype(layer, expert)
        stored = self._checkpoint.expert(layer, expert).parts
        for part, location in zip(expert_parts(self._config, layer, expert), stored, strict=True):
            packed_as = location.dtype if stays else part.dtype or dtype
            yield part.tensor, packed_as, nbytes_of(packed_as, part.tensor.shape) or 0

    def _write_block(self, fd: int, block: _Block) -> int:
        """Returns the checksum of the expert's bytes; what is left of the block stays zero."""
        parts = self._checkpoint.expert(block.layer, block.expert).parts
        dtypes = [dtype for _, dtype, _ in self._parts(block.layer, block.expert, block.dtype)]
        try:
            memory = np.concatenate([_converted(*part) for part in zip(parts, dtypes, strict=True)]).data
        except UnrepresentableValue as error:
            raise CannotPack(f"expert {block.expert} of layer {block.layer}: {error}") from error
        try:
            os.ftruncate(fd, block.offset)
            os.ftruncate(fd, block.end)
            done = 0
            while done < len(memory):
                done += os.pwrite(fd, memory[done:], block.offset + done)
        except OSError as error:
            raise CannotWritePack(self._out / EXPERTS_FILE, error.strerror or str(error)) from None
        return xxhash.xxh3_64_intdigest(memory)

    def _finished_blocks(self, journal: int, file: int) -> list[int]:
        """Checksums of the blocks that an earlier run of the same command has finished, checked once more."""
        identity = self._identity()
        written = os.pread(journal, len(identity) + 8 * self.count, 0)
        checksums: list[int] = []
        if written[: len(identity)] == identity:
            for at, block in zip(range(len(identity), len(written) - 7, 8), self._blocks, strict=False):
                checksum = int.from_bytes(written[at : at + 8], "little")
                content = os.pread(file, block.nbytes, block.offset)
                if len(content) < block.nbytes or xxhash.xxh3_64_intdigest(content) != checksum:
                    break
                checksums.append(checksum)
        else:
            os.ftruncate(journal, 0)
            os.write(journal, identity)
        os.ftruncate(journal, len(identity) + 8 * len(checksums))
        return checksums

    def _identity(self) -> bytes:
        """Of the source, the formats and what they were chosen by: only what would write the same continues a run that
        was killed."""
        files = {location.file for location in self._checkpoint.tensors.values()}
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
        activations = None if self._heat is None else self._heat.activations.tolist()
        return xxhash.xxh3_128_digest(msgspec.json.encode((states, self._blocks, activations)))

    # ---- the folder

    def _prepare_folder(self) -> None:
        """Makes the folder if need be. Raises `CannotPack` if it has anything but what an interrupted pack has left."""
        if self._out.exists() and not self._out.is_dir():
            raise CannotPack(f"{self._out} is a file, expected a folder, or nothing yet")
        if (self._out / TENSORS_JSON).exists():
            raise CannotPack(f"{self._out} is a complete model already")
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotPack(f"the folder {self._out} cannot be made: {error.strerror}") from None
        if any(self._out.iterdir()) and not (self._out / JOURNAL).exists():
            raise CannotPack(f"{self._out} is not empty, and not what an interrupted pack has left")

    def _check_space(self, blocks: int) -> None:
        needed, free = blocks + self._checkpoint.dense_nbytes, shutil.disk_usage(self._out).free
        if needed > free:
            raise CannotPack(f"{self._out} needs {needed} more bytes, its disk has {free} free")

    def _finish(self, checksums: list[int]) -> None:
        stored = dict(self._expert_tensors())
        with (self._out / DENSE_FILE).open("wb") as dense:
            for name in dense_tensors(self._config):
                location = self._checkpoint.tensors[name]
                dense.write(bytes(-dense.tell() % BLOCK_ALIGNMENT))
                stored[name] = StoredTensor(DENSE_FILE, dense.tell(), location.nbytes, location.dtype, location.shape)
                np.fromfile(location.file, np.uint8, location.nbytes, offset=location.offset).tofile(dense)
                dense.seek(0, os.SEEK_END)
            dense.flush()
            os.fsync(dense.fileno())
        names = {TENSORS_JSON, MANIFEST, "model.safetensors.index.json"}
        for pattern in _COPIED:
            for file in self._checkpoint.folder.glob(pattern):
                if file.name not in names and not file.name.startswith(CALIBRATION):  # of other weights
                    shutil.copyfile(file, self._out / file.name)
        _write_durably(self._out / MANIFEST, msgspec.json.encode(self._manifest(checksums)))
        _write_durably(self._out / TENSORS_JSON, msgspec.json.encode(stored))

    def _manifest(self, checksums: list[int]) -> PackManifest:
        experts: dict[int, list[PackedExpert]] = {}
        for block, checksum in zip(self._blocks, checksums, strict=True):
            activations = 0 if self._heat is None else int(self._heat.activations[block.layer, block.expert])
            packed = PackedExpert(block.dtype, block.offset, block.nbytes, checksum, activations)
            experts.setdefault(block.layer, []).append(packed)
        return PackManifest(experts=experts)

    def _expert_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        for block in self._blocks:
            offset = block.offset
            for tensor, dtype, nbytes in self._parts(block.layer, block.expert, block.dtype):
                yield tensor.name, StoredTensor(EXPERTS_FILE, offset, nbytes, dtype, tensor.shape)
                offset += nbytes


def _write_durably(path: Path, data: bytes) -> None:
    """Under its name only when it is whole."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _converted(part: TensorLocation, dtype: str) -> NDArray[np.uint8]:
    stored = np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset)
    return convert_rows(stored.reshape(part.shape[0], -1), part.dtype, dtype).reshape(-1)
