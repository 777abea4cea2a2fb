"""Which format each expert of a packed model gets."""

from __future__ import annotations

from typing import Final, Literal, get_args

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.tensor_index import MATRIX_DTYPES, QUANTIZED_DTYPES
from hotset.shm.kv_page_format import QUANT_BLOCK

PackFormat = Literal["bf16", "q8_0", "q4_0"]

_DTYPES: Final = {"bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}


class CannotPack(HotsetError):
    """The model cannot be packed as asked, or not there."""


def choose_formats(checkpoint: Checkpoint, format: str | None) -> list[str]:
    """The dtype of each of `checkpoint.expert_ids`; with `format` None, the one that it has.

    Raises `CannotPack`, or `ValueError` for an unknown format.
    """
    if format is not None and format not in get_args(PackFormat):
        raise ValueError(f"format is {format!r}, expected one of {', '.join(get_args(PackFormat))}")
    if checkpoint.config.family.interleaved_experts:
        raise CannotPack(f"{checkpoint.folder}: experts whose rows of gate and up alternate cannot be packed")
    stored = [checkpoint.expert_dtype(layer, expert) for layer, expert in checkpoint.expert_ids]
    if format is None:
        _refuse_to_keep(checkpoint, stored)
        return stored
    dtype = _DTYPES[format]
    _refuse_widths(checkpoint, dtype)
    if dtype != "q4_0" and set(stored) <= set(QUANTIZED_DTYPES) - {dtype}:
        raise CannotPack(f"{checkpoint.folder}: its experts are {stored[0]} already; {dtype} would only be larger")
    return [dtype] * len(stored)


def _refuse_to_keep(checkpoint: Checkpoint, stored: list[str]) -> None:
    """Formats that nothing computes on."""
    if not set(stored) <= set(MATRIX_DTYPES):
        kinds = {part.dtype for ids in checkpoint.expert_ids for part in checkpoint.expert(*ids).parts}
        raise CannotPack(
            f"{checkpoint.folder}: its experts are stored as {', '.join(sorted(kinds))}; "
            f"give one of {', '.join(get_args(PackFormat))} as the format, to which they can be converted"
        )


def _refuse_widths(checkpoint: Checkpoint, dtype: str) -> None:
    config = checkpoint.config
    widths = (config.hidden_size, config.intermediate_size)
    if dtype in QUANTIZED_DTYPES and any(width % QUANT_BLOCK for width in widths):
        raise CannotPack(
            f"{checkpoint.folder}: hidden_size and intermediate_size are {widths[0]} and {widths[1]}, "
            f"{dtype} needs multiples of {QUANT_BLOCK}"
        )
