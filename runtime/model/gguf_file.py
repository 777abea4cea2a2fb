"""The metadata and the tensors of a GGUF file, or of all the parts of one that was split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel


class GgufTensor(msgspec.Struct, frozen=True):
    """`nbytes` bytes at `offset` of `file`, also mapped as `data`: `shape` values, the innermost dimension last.

    `kind` is GGML's name of the format. Where that has blocks, `data` is uint8 [..., rows, bytes of a row].
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    data: Any


class GgufFile(msgspec.Struct, frozen=True):
    """`metadata` is the first part's: the others repeat nothing but their number."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, parts: Sequence[Path]) -> GgufFile:
        """`parts` as `gguf_parts` finds them. Raises UnsupportedModel or CorruptCheckpoint."""
        path = parts[0]
        try:
            import gguf
        except ImportError as error:
            raise UnsupportedModel(path, "gguf", f"{path} is a GGUF file: install hotset[gguf] to read it.") from error
        metadata: dict[str, Any] = {}
        tensors: dict[str, GgufTensor] = {}
        for number, part in enumerate(parts):
            try:
                reader = gguf.GGUFReader(part)
            except (ValueError, IndexError, OSError) as error:
                raise CorruptCheckpoint(part, f"{part} cannot be read as a GGUF file: {error}.") from error
            fields = {name: field.contents() for name, field in reader.fields.items()}
            count, at = max(1, fields.get("split.count", 1)), fields.get("split.no", 0)
            if (count, at) != (len(parts), number):
                raise CorruptCheckpoint(
                    part,
                    f"{part} says it is part {at + 1} of {count}, by its name it is part {number + 1} of {len(parts)}; "
                    "the parts of a file are to be named ...-00001-of-00002.gguf.",
                )
            metadata = metadata or fields
            for tensor in reader.tensors:
                tensors[tensor.name] = GgufTensor(
                    part,
                    tensor.name,
                    tensor.tensor_type.name,
                    tuple(int(size) for size in reversed(tensor.shape)),  # GGUF names the innermost dimension first
                    int(tensor.data_offset),
                    int(tensor.n_bytes),
                    tensor.data,
                )
        return cls(path, metadata, tensors)


def gguf_parts(path: Path) -> list[Path]:
    """All parts of the file, of which `path` is any: itself alone, unless its name says otherwise.

    Raises ModelNotFound naming the part that is missing.
    """
    path = path.resolve()
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    parts = [path]
    if match is not None:
        parts = [path.with_name(f"{match[1]}-{n:05}-of-{match[2]}.gguf") for n in range(1, int(match[2]) + 1)]
    for part in parts:
        if not part.is_file():
            which = "" if len(parts) == 1 else f", one of {len(parts)} parts"
            raise ModelNotFound(part, f"There is no GGUF file at {part}{which}.")
    return parts
