"""Where each weight of a checkpoint lies on disk.

The dense weights are read through one shared read-only mapping of each file, so that all processes of the
machine use the same memory. Experts are only located here: the pager reads their bytes into the arena's
slots.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel
from hotset.runtime.model.expert_parts import ExpertPart, are_stacked, expert_parts
from hotset.runtime.model.tensor_index import (
    EXPERT_DTYPES,
    MATRIX_DTYPES,
    QUANTIZED_DTYPES,
    STORED_DTYPES,
    VECTOR_DTYPES,
    TensorLocation,
    read_index,
)
from hotset.runtime.model.tensors import Tensor, dense_tensors


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
        self._expert_dtypes: dict[tuple[int, int], str] = {}
        self._mappings: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | Path, config: ModelConfig | None = None, *, to_convert: bool = False) -> Self:
        """Read the headers of model.safetensors, or of the shards that model.safetensors.index.json lists.

        `to_convert`: experts may be in formats that nothing computes on, as long as they can be decoded.

        Raises ModelNotFound, UnsupportedModel, or CorruptCheckpoint naming the file and the tensor.
        """
        folder = Path(folder)
        config = config or ModelConfig.load(folder)
        # transformers 5 has one name for all families and may save under it.
        block = f".{config.family.expert_block}."
        tensors = {name.replace(".mlp.", block): location for name, location in read_index(folder).items()}
        checkpoint = cls(folder, config, tensors)
        checkpoint._check_tensors(to_convert)
        return checkpoint

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert; of the largest, if they are not all of one format."""
        return max(self.expert(*ids).nbytes for ids in self.expert_ids)

    def expert_dtype(self, layer: int, expert: int) -> str:
        """One of EXPERT_DTYPES, or mxfp4; "" if its matrices are not all the same."""
        return self._expert_dtypes[layer, expert]

    @property
    def expert_ids(self) -> Sequence[tuple[int, int]]:
        """(layer, expert) of all experts, in order."""
        return tuple(self._expert_dtypes)

    def expert(self, layer: int, expert: int) -> ExpertLocation:
        """`layer` is one that has experts."""
        parts = self.expert_parts(layer, expert)
        return ExpertLocation(
            tuple(self.tensors[part.tensor.name].share(part.index, part.of) for part in parts),
            tuple(index for index, part in enumerate(parts) if part.transposed),
        )

    def expert_parts(self, layer: int, expert: int) -> tuple[ExpertPart, ...]:
        """Those of `expert`, by their names."""
        return expert_parts(self.config, layer, expert, stacked=self._stacked)

    def dense(self, name: str) -> NDArray[Any]:
        """A read-only view of the stored values: float32, float16, or uint16 with the bits of bfloat16; of quantised
        ones the bytes, uint8 [rows, bytes of a row].
        """
        location = self.tensors[name]
        mapping = self._mappings.get(location.file)
        if mapping is None:
            with location.file.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mappings[location.file] = mapping
        if location.dtype in QUANTIZED_DTYPES:
            values = np.frombuffer(mapping, np.uint8, location.nbytes, location.offset)
            return values.reshape(*location.shape[:-1], -1)
        values = np.frombuffer(mapping, STORED_DTYPES[location.dtype], prod(location.shape), location.offset)
        return values.reshape(location.shape)

    @property
    def dense_nbytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in dense_tensors(self.config))

    def _check_tensors(self, to_convert: bool) -> None:
        config = self.config
        for tensor in dense_tensors(config).values():
            self._check(tensor, VECTOR_DTYPES if len(tensor.shape) == 1 else MATRIX_DTYPES)
        for layer in config.expert_layers:
            for expert in range(config.num_experts):
                self._expert_dtypes[layer, expert] = self._check_expert(layer, expert, to_convert)

    def _check_expert(self, layer: int, expert: int, to_convert: bool) -> str:
        """Its dtype, which all its matrices have, unless they are to be converted."""
        dtype = "bfloat16" if self.config.mxfp4_experts else None  # of the biases beside packed numbers
        for part in self.expert_parts(layer, expert):
            fixed = "uint8" if part.tensor.of_bytes else part.dtype
            location = self._check(part.tensor, (fixed,) if fixed else EXPERT_DTYPES, to_convert and not fixed)
            dtype = dtype or location.dtype
            if location.dtype == dtype or fixed:
                continue
            if to_convert:
                return ""
            raise UnsupportedModel(
                location.file,
                location.dtype,
                f"{location.file}: {part.tensor.name} is {location.dtype}, other matrices of this expert {dtype}."
                f"{_how_to_convert(location)}",
            )
        return "mxfp4" if self.config.mxfp4_experts else dtype or ""

    def _check(self, tensor: Tensor, expected: Sequence[str], to_convert: bool = False) -> TensorLocation:
        """`expected`: the dtypes that it may have, besides those from which it can be converted."""
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
        if location.dtype not in expected and not (to_convert and _is_convertible(location)):
            raise UnsupportedModel(
                location.file,
                location.dtype,
                f"{location.file}: tensor {name} is stored as {location.dtype}; hotset reads {', '.join(expected)}."
                f"{_how_to_convert(location)}",
            )
        return location


def _is_convertible(location: TensorLocation) -> bool:
    """A GGUF file's index has no tensors that cannot be decoded (gguf_tensors.py)."""
    return location.file.suffix == ".gguf"


def _how_to_convert(location: TensorLocation) -> str:
    command = f" `hotset pack {location.file} OUT --format q8_0` converts the experts."
    return command if _is_convertible(location) else ""
