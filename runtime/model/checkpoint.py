"""Where each weight of a checkpoint lies on disk.

The dense weights are read through one shared read-only mapping of each file, so that all processes of the
machine use the same memory. Experts are only located here: the pager reads their bytes into the arena's
slots.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.runtime.model.expert_parts import ExpertPart, are_stacked, expert_parts
from hotset.runtime.model.tensors import Tensor, dense_tensors

# numpy has no bfloat16: its bits are kept as uint16, and nothing else here is uint16.
STORED_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),  # packed numbers
}
FLOAT_DTYPES: Final = ("float32", "float16", "bfloat16")
_SAFETENSORS_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors format


class TensorLocation(msgspec.Struct, frozen=True):
    """`nbytes` bytes at `offset` of `file`: `shape` values of `dtype` (float32, float16, bfloat16 or uint8), row by
    row.
    """

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


class ExpertLocation(msgspec.Struct, frozen=True):
    """The parts of one expert, in the order in which they follow one another in a slot (expert_parts.py).

    Those whose numbers are in `transposed` have a row for each input; in the slot they have one for each output.
    """

    parts: tuple[TensorLocation, ...]
    transposed: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Checkpoint:
    """The tensors of a model folder. After `open`, every one that the model needs is there with the right
    shape.
    """

    def __init__(self, folder: Path, config: ModelConfig, tensors: Mapping[str, TensorLocation]) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self._stacked = are_stacked(config, tensors)
        self._mappings: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | Path, config: ModelConfig | None = None) -> Self:
        """Read the headers of model.safetensors, or of the shards that model.safetensors.index.json lists.

        Raises ModelNotFound, UnsupportedModel, or CorruptCheckpoint naming the file and the tensor.
        """
        folder = Path(folder)
        config = config or ModelConfig.load(folder)
        # transformers 5 has one name for all families and may save under it.
        block = f".{config.family.expert_block}."
        tensors = {name.replace(".mlp.", block): location for name, location in _read_index(folder).items()}
        checkpoint = cls(folder, config, tensors)
        checkpoint._check_tensors()
        return checkpoint

    @property
    def expert_dtype(self) -> str:
        """float32, float16, bfloat16 or mxfp4; the same for all experts."""
        return "mxfp4" if self.config.mxfp4_experts else self._first_expert.parts[0].dtype

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert, the same for all: the size of a slot."""
        return self._first_expert.nbytes

    def expert(self, layer: int, expert: int) -> ExpertLocation:
        """`layer` is one that has experts."""
        parts = self._expert_parts(layer, expert)
        return ExpertLocation(
            tuple(self.tensors[part.tensor.name].share(part.index, part.of) for part in parts),
            tuple(index for index, part in enumerate(parts) if part.transposed),
        )

    def _expert_parts(self, layer: int, expert: int) -> tuple[ExpertPart, ...]:
        return expert_parts(self.config, layer, expert, stacked=self._stacked)

    @property
    def _first_expert(self) -> ExpertLocation:
        return self.expert(min(set(range(self.config.num_layers)) - self.config.dense_layers), 0)

    def dense(self, name: str) -> NDArray[Any]:
        """A read-only view of the stored values: float32, float16, or uint16 with the bits of bfloat16."""
        location = self.tensors[name]
        mapping = self._mappings.get(location.file)
        if mapping is None:
            with location.file.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mappings[location.file] = mapping
        values = np.frombuffer(mapping, STORED_DTYPES[location.dtype], prod(location.shape), location.offset)
        return values.reshape(location.shape)

    @property
    def dense_nbytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in dense_tensors(self.config))

    def _check_tensors(self) -> None:
        config = self.config
        for tensor in dense_tensors(config).values():
            self._check(tensor)
        dtype = "bfloat16" if config.mxfp4_experts else None  # of the biases beside packed numbers
        for layer in range(config.num_layers):
            for tensor in self._expert_tensors(layer):
                location = self._check(tensor)
                dtype = dtype or location.dtype
                if location.dtype != dtype and not tensor.of_bytes:
                    raise CorruptCheckpoint(
                        location.file,
                        f"{location.file}: {tensor.name} is {location.dtype}, other experts {dtype}.",
                        tensor.name,
                    )

    def _expert_tensors(self, layer: int) -> Iterable[Tensor]:
        """Each once."""
        if layer in self.config.dense_layers:
            return ()
        experts = (self._expert_parts(layer, expert) for expert in range(self.config.num_experts))
        return {part.tensor.name: part.tensor for parts in experts for part in parts}.values()

    def _check(self, tensor: Tensor) -> TensorLocation:
        name, shape = tensor.name, tensor.shape
        location = self.tensors.get(name)
        if location is None:
            raise CorruptCheckpoint(self.folder, f"{self.folder}: the checkpoint has no tensor {name}.", name)
        if location.shape != shape:
            raise CorruptCheckpoint(
                location.file,
                f"{location.file}: tensor {name} has shape {list(location.shape)}, config.json needs {list(shape)}.",
                name,
            )
        expected = ("uint8",) if tensor.of_bytes else FLOAT_DTYPES
        if location.dtype not in expected:
            raise UnsupportedModel(
                location.file,
                location.dtype,
                f"{location.file}: tensor {name} is stored as {location.dtype}; hotset reads {', '.join(expected)}.",
            )
        return location


def _read_index(folder: Path) -> dict[str, TensorLocation]:
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
    if dtype in STORED_DTYPES and end - begin != prod(entry.shape) * STORED_DTYPES[dtype].itemsize:
        raise CorruptCheckpoint(
            path,
            f"{path}: tensor {name} has {end - begin} bytes, {list(entry.shape)} of {dtype} need others.",
            name,
        )
    return TensorLocation(path, data + begin, end - begin, dtype, entry.shape)
