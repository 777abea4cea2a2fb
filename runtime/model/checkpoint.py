"""Where each weight of a checkpoint lies on disk.

The dense weights are read through one shared read-only mapping of each file, so that all processes of the
machine use the same memory. Experts are only located here: the pager reads their bytes into the arena's
slots.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
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
        tensors = {name.replace(".mlp.", block): location for name, location in read_index(folder).items()}
        checkpoint = cls(folder, config, tensors)
        checkpoint._check_tensors()
        return checkpoint

    @property
    def expert_dtype(self) -> str:
        """float32, float16, bfloat16, q8_0, q4_0 or mxfp4; the same for all experts."""
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
        expected = ("uint8",) if tensor.of_bytes else VECTOR_DTYPES if len(shape) == 1 else MATRIX_DTYPES
        if location.dtype not in expected:
            raise UnsupportedModel(
                location.file,
                location.dtype,
                f"{location.file}: tensor {name} is stored as {location.dtype}; hotset reads {', '.join(expected)}.",
            )
        return location
