"""Which tensors a model folder has, and where each lies on disk: from the headers of its safetensors files, or from
the tensors.json of a folder that stands for a GGUF file (gguf_folder.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound
from hotset.shm.kv_page_format import QUANT_BLOCK, KvFormat

# numpy has no bfloat16: its bits are kept as uint16, and nothing else here is uint16.
STORED_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),  # packed numbers
}
QUANTIZED_DTYPES: Final = ("q8_0", "q4_0")  # GGML's blocks of QUANT_BLOCK values of one row
MATRIX_DTYPES: Final = ("float32", "float16", "bfloat16", *QUANTIZED_DTYPES)
EXPERT_DTYPES: Final = (*MATRIX_DTYPES, "mxfp4_ggml")  # what gpt-oss calls mxfp4 is two tensors of uint8
VECTOR_DTYPES: Final = ("float32", "float16", "bfloat16")
TENSORS_JSON: Final = "tensors.json"
_SAFETENSORS_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
_BLOCK_NBYTES: Final = {dtype: KvFormat(dtype).block_nbytes for dtype in QUANTIZED_DTYPES} | {"mxfp4_ggml": 17}
_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors format


class TensorLocation(msgspec.Struct, frozen=True):
    """`nbytes` bytes at `offset` of `file`: `shape` values of `dtype` (of EXPERT_DTYPES, or uint8), row by row."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def share(self, index: int, of: int) -> TensorLocation:
        """The `index`th of `of` equal shares along the leading axes, as a matrix of rows."""
        nbytes = self.nbytes // of
        shape = (prod(self.shape[:-1]) // of, self.shape[-1])
        return TensorLocation(self.file, self.offset + index * nbytes, nbytes, self.dtype, shape)


class StoredTensor(msgspec.Struct, frozen=True):
    """An entry of tensors.json: `shape` values at `offset` of `file` (absolute, or within the folder)."""

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_index(folder: Path) -> dict[str, TensorLocation]:
    """All tensors of a folder, by name. Raises ModelNotFound, or CorruptCheckpoint naming the file."""
    if (folder / TENSORS_JSON).is_file():
        return _read_tensors_json(folder / TENSORS_JSON)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        raise ModelNotFound(folder, f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(index, f"{index} is not an index of shards: {error}.") from error
    shards = {file: _read_header(_shard(folder, index, file)) for file in _distinct(weight_map.values())}
    tensors: dict[str, TensorLocation] = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CorruptCheckpoint(
                folder / file, f"{folder / file} has no tensor {name}, {index.name} says it has.", name
            )
        tensors[name] = shards[file][name]
    return tensors


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _distinct(names: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(names)


def _shard(folder: Path, index: Path, file: str) -> Path:
    if Path(file).name != file:
        raise CorruptCheckpoint(index, f"{index} names {file!r}, which is not a file of the same folder.")
    if not (folder / file).is_file():
        raise CorruptCheckpoint(folder / file, f"The shard {folder / file} is missing; {index.name} names it.")
    return folder / file


def _read_header(path: Path) -> dict[str, TensorLocation]:
    """The header of a safetensors file: its length as u64, then JSON; offsets count from the end of the
    header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise CorruptCheckpoint(path, f"{path} is not a safetensors file: no header fits its {size} bytes.")
        text = file.read(length)
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(path, f"{path} has a header that cannot be read: {error}.") from error
    data = 8 + length
    return {name: _location(path, name, entry, data, size) for name, entry in entries.items()}


def _location(path: Path, name: str, entry: _Entry, data: int, size: int) -> TensorLocation:
    begin, end = entry.data_offsets
    dtype = _SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype)
    if not 0 <= begin <= end or min(entry.shape, default=0) < 0:
        raise CorruptCheckpoint(path, f"{path}: tensor {name} has offsets {begin} to {end}.", name)
    if data + end > size:
        raise CorruptCheckpoint(
            path, f"{path} is truncated: tensor {name} ends at byte {data + end}, the file has {size}.", name
        )
    return _checked(name, TensorLocation(path, data + begin, end - begin, dtype, entry.shape))


def _read_tensors_json(path: Path) -> dict[str, TensorLocation]:
    try:
        tensors = msgspec.json.decode(path.read_bytes(), type=dict[str, StoredTensor])
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(path, f"{path} cannot be read: {error}.") from error
    found: dict[str, TensorLocation] = {}
    sizes: dict[Path, int] = {}
    for name, tensor in tensors.items():
        file = path.parent / tensor.file  # which may be absolute
        if file not in sizes:
            if not file.is_file():
                raise CorruptCheckpoint(file, f"{file} is missing; {path} names it.")
            sizes[file] = file.stat().st_size
        if tensor.offset + tensor.nbytes > sizes[file]:
            end = tensor.offset + tensor.nbytes
            raise CorruptCheckpoint(
                file, f"{file} is truncated: tensor {name} ends at byte {end}, the file has {sizes[file]}.", name
            )
        found[name] = _checked(name, TensorLocation(file, tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape))
    return found


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None if that is not for us to know. Raises ValueError if rows would share a block."""
    if dtype in STORED_DTYPES:
        return prod(shape) * STORED_DTYPES[dtype].itemsize
    if dtype not in _BLOCK_NBYTES:
        return None
    if shape[-1] % QUANT_BLOCK:
        raise ValueError(f"rows of {shape[-1]} values have no whole number of blocks of {QUANT_BLOCK}")
    return prod(shape) // QUANT_BLOCK * _BLOCK_NBYTES[dtype]


def _checked(name: str, tensor: TensorLocation) -> TensorLocation:
    try:
        needed = nbytes_of(tensor.dtype, tensor.shape)
    except ValueError as error:
        raise CorruptCheckpoint(tensor.file, f"{tensor.file}: tensor {name}: {error}.", name) from error
    if needed is not None and needed != tensor.nbytes:
        raise CorruptCheckpoint(
            tensor.file,
            f"{tensor.file}: tensor {name} has {tensor.nbytes} bytes, "
            f"{list(tensor.shape)} of {tensor.dtype} need {needed}.",
            name,
        )
    return tensor
