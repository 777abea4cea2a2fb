"""What a packed model says about its experts: one aligned block for each, its format, and the checksum of its bytes.

A packed model is a folder like any other: config.json, tokenizer, and a tensors.json that says where each tensor lies.
tensors.json is written last, so a folder without it is not a model yet (pack.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel
from hotset.runtime.model.tensor_index import TENSORS_JSON

MANIFEST: Final = "manifest.json"
EXPERTS_FILE: Final = "experts.bin"
DENSE_FILE: Final = "dense.bin"
JOURNAL: Final = "packing.journal"  # while it is made: the identity of what is packed, each finished block's checksum
BLOCK_ALIGNMENT: Final = 4096
_VERSION: Final = 2


def is_unfinished_pack(folder: Path) -> bool:
    """Whether `hotset pack` has begun to write there, and something ended it."""
    return (folder / JOURNAL).exists() and not (folder / TENSORS_JSON).exists()


class PackedExpert(msgspec.Struct, frozen=True, array_like=True):
    """`nbytes` bytes at `offset` of experts.bin, a multiple of BLOCK_ALIGNMENT: the weights as `dtype` of
    tensor_index.py, in the order of expert_parts.py, and their xxh3-64. `activations` were recorded when formats were
    chosen by them, else 0."""

    dtype: str
    offset: int
    nbytes: int
    checksum: int
    activations: int = 0


class PackManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`experts`: for each layer that has experts, all of it in order."""

    version: int = _VERSION
    experts: dict[int, list[PackedExpert]]

    @classmethod
    def of(cls, folder: Path) -> PackManifest | None:
        """None if the model is not a packed one. Raises CorruptCheckpoint or UnsupportedModel."""
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / EXPERTS_FILE).is_file():
                raise CorruptCheckpoint(path, f"{path} is missing: the experts cannot be checked.")
            return None
        try:
            content = path.read_bytes()
            version = msgspec.json.decode(content, type=_Version).version
            if version != _VERSION:
                raise UnsupportedModel(
                    path, "version", f"{path} is of version {version}, expected {_VERSION}: pack the model again."
                )
            return msgspec.json.decode(content, type=cls)
        except msgspec.DecodeError as error:
            raise CorruptCheckpoint(path, f"{path} cannot be read: {error}.") from error


class _Version(msgspec.Struct):
    version: int
