"""Writes a packed model: each expert one aligned block of a single file, with a checksum, in a format of choice.

Packing may be killed at any time and begun again with the same command: blocks that were finished are checked and kept.
What says that the model is complete, tensors.json, is put in place last, by a rename.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.expert_parts import expert_parts
from hotset.runtime.model.pack_manifest import BLOCK_ALIGNMENT, DENSE_FILE, EXPERTS_FILE, MANIFEST, PackManifest
from hotset.runtime.model.tensor_index import (
    QUANTIZED_DTYPES,
    STORED_DTYPES,
    TENSORS_JSON,
    StoredTensor,
    TensorLocation,
)
from hotset.runtime.model.tensors import dense_tensors
from hotset.shm.kv_page_format import QUANT_BLOCK, KvFormat, encode

PackFormat = Literal["bf16", "q8_0", "q4_0"]

_DTYPES: Final = {"bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}
_JOURNAL: Final = "packing.journal"  # the identity of what is packed, then the checksum of each finished block
_COPIED: Final = ("*.json", "*.jinja", "*.model", "*.txt")


class CannotPack(HotsetError):
    """The model cannot be packed as asked, or not there."""


class Packer:
    """One run of `hotset pack`.

    Args:
        model: folder of the checkpoint.
        out: folder of the packed model; new, empty, or left by a run that was killed.
        format: of the experts; None leaves them as they are. Dense weights are copied as they are.
    """

    def __init__(self, model: Path, out: Path, format: str | None = None) -> None:
        if format is not None and format not in get_args(PackFormat):
            raise ValueError(f"format is {format!r}, expected one of {', '.join(get_args(PackFormat))}")
        self._out = out
        self._checkpoint = checkpoint = Checkpoint.open(model)
        self._config = checkpoint.config
        self._dtype = _DTYPES[format] if format else checkpoint.expert_dtype
        self._experts = [
            (layer, expert)
            for layer in range(self._config.num_layers)
            if layer not in self._config.dense_layers
            for expert in range(self._config.num_experts)
        ]
        self._check_format()
        first = self._converted(*self._experts[0])
        self._part_nbytes = [len(part) for part in first]
        self.expert_nbytes = sum(self._part_nbytes)
        self.block_nbytes = -(-self.expert_nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        self.count = len(self._experts)

    def run(self, progress: Callable[[int], None]) -> None:
        """`progress` is told the number of finished blocks. Raises `CannotPack` or `OSError`."""
        self._check_folder()
        (self._out / EXPERTS_FILE).touch()  # and not opened for appending, which would ignore where a block goes
        with (self._out / _JOURNAL).open("a+b") as journal, (self._out / EXPERTS_FILE).open("r+b") as blocks:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotPack(f"another process is packing into {self._out}") from None
            checksums = self._finished_blocks(journal.fileno(), blocks.fileno())
            self._check_space((self.count - len(checksums)) * self.block_nbytes)
            for number in range(len(checksums), self.count):
                progress(number)
                checksums.append(self._write_block(blocks.fileno(), number))
                os.write(journal.fileno(), checksums[-1].to_bytes(8, "little"))
            progress(self.count)
            os.fsync(blocks.fileno())
            self._finish(checksums)
        (self._out / _JOURNAL).unlink()

    # ---- experts

    def _check_format(self) -> None:
        folder, stored = self._checkpoint.folder, self._checkpoint.expert_dtype
        if self._config.family.interleaved_experts:
            raise CannotPack(f"{folder}: experts whose rows of gate and up alternate cannot be packed")
        if self._dtype == stored:
            return
        if stored not in STORED_DTYPES:
            raise CannotPack(f"{folder}: its experts are {stored} already; pack it without a format, or the original")
        widths = (self._config.hidden_size, self._config.intermediate_size)
        if self._dtype in QUANTIZED_DTYPES and any(width % QUANT_BLOCK for width in widths):
            raise CannotPack(
                f"{folder}: hidden_size and intermediate_size are {widths[0]} and {widths[1]}, "
                f"{self._dtype} needs multiples of {QUANT_BLOCK}"
            )

    def _converted(self, layer: int, expert: int) -> list[NDArray[np.uint8]]:
        return [self._convert(part) for part in self._checkpoint.expert(layer, expert).parts]

    def _convert(self, part: TensorLocation) -> NDArray[np.uint8]:
        stored = np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset)
        if part.dtype == self._dtype:
            return stored
        values = _as_float32(stored.view(STORED_DTYPES[part.dtype]).reshape(part.shape))
        rows = encode(values, KvFormat(self._dtype)) if self._dtype in QUANTIZED_DTYPES else _as_bfloat16(values)
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)

    def _write_block(self, fd: int, number: int) -> int:
        """Returns the checksum of the expert's bytes; what is left of the block stays zero."""
        block = np.concatenate(self._converted(*self._experts[number]))
        memory, start = block.data, number * self.block_nbytes
        os.ftruncate(fd, start)
        os.ftruncate(fd, start + self.block_nbytes)
        done = 0
        while done < len(memory):
            done += os.pwrite(fd, memory[done:], start + done)
        return xxhash.xxh3_64_intdigest(memory)

    def _finished_blocks(self, journal: int, blocks: int) -> list[int]:
        """Checksums of the blocks that an earlier run of the same command has finished, checked once more."""
        identity = self._identity()
        written = os.pread(journal, len(identity) + 8 * self.count, 0)
        checksums: list[int] = []
        if written[: len(identity)] == identity:
            for at in range(len(identity), len(written) - 7, 8):
                checksum = int.from_bytes(written[at : at + 8], "little")
                block = os.pread(blocks, self.expert_nbytes, len(checksums) * self.block_nbytes)
                if len(block) < self.expert_nbytes or xxhash.xxh3_64_intdigest(block) != checksum:
                    break
                checksums.append(checksum)
        else:
            os.ftruncate(journal, 0)
            os.write(journal, identity)
        os.ftruncate(journal, len(identity) + 8 * len(checksums))
        return checksums

    def _identity(self) -> bytes:
        """Of the source and the format: a run that was killed is only continued by the same command."""
        files = {location.file for location in self._checkpoint.tensors.values()}
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
        return xxhash.xxh3_128_digest(msgspec.json.encode((states, self._dtype)))

    # ---- the folder

    def _check_folder(self) -> None:
        if (self._out / TENSORS_JSON).exists():
            raise CannotPack(f"{self._out} is a complete model already")
        self._out.mkdir(parents=True, exist_ok=True)
        if any(self._out.iterdir()) and not (self._out / _JOURNAL).exists():
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
                if file.name not in names:
                    shutil.copyfile(file, self._out / file.name)
        by_layer: dict[int, list[int]] = {}
        for (layer, _), checksum in zip(self._experts, checksums, strict=True):
            by_layer.setdefault(layer, []).append(checksum)
        manifest = PackManifest(
            format=self._dtype,
            block_nbytes=self.block_nbytes,
            expert_nbytes=self.expert_nbytes,
            checksums=by_layer,
        )
        _write_durably(self._out / MANIFEST, msgspec.json.encode(manifest))
        _write_durably(self._out / TENSORS_JSON, msgspec.json.encode(stored))

    def _expert_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        for number, (layer, expert) in enumerate(self._experts):
            offset = number * self.block_nbytes
            for part, nbytes in zip(expert_parts(self._config, layer, expert), self._part_nbytes, strict=True):
                yield part.tensor.name, StoredTensor(EXPERTS_FILE, offset, nbytes, self._dtype, part.tensor.shape)
                offset += nbytes


def _write_durably(path: Path, data: bytes) -> None:
    """Under its name only when it is whole."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _as_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def _as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; numbers that are none stay so."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), bits >> np.uint32(16) | np.uint32(64), rounded).astype(np.uint16)
