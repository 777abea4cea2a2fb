"""What a packed model says about its experts: one aligned block for each, and the checksum of its bytes.

A packed model is a folder like any other: config.json, tokenizer, and a tensors.json that says where each tensor lies.
tensors.json is written last, so a folder without it is not a model yet (pack.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint

MANIFEST: Final = "manifest.json"
EXPERTS_FILE: Final = "experts.bin"
DENSE_FILE: Final = "dense.bin"
BLOCK_ALIGNMENT: Final = 4096


class PackManifest(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attributes:
        format: of the experts: a dtype of tensor_index.py.
        block_nbytes: distance of two blocks in experts.bin; a multiple of BLOCK_ALIGNMENT.
        expert_nbytes: of a block, the bytes that are the expert's, to which the checksums belong.
        checksums: xxh3-64 for each layer that has experts and each expert of it, in the order of the blocks.
    """

    version: int = 1
    format: str
    block_nbytes: int
    expert_nbytes: int
    checksums: dict[int, list[int]]  # layer -> checksum of each expert

    @classmethod
    def of(cls, folder: Path) -> PackManifest | None:
        """None if the model is not a packed one. Raises CorruptCheckpoint."""
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / EXPERTS_FILE).is_file():
                raise CorruptCheckpoint(path, f"{path} is missing: the experts cannot be checked.")
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise CorruptCheckpoint(path, f"{path} cannot be read: {error}.") from error
