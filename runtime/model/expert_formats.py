"""Which format each expert of a packed model gets: one for all, or by how often each was used."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, get_args

import msgspec
import numpy as np

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.heat import Heat
from hotset.runtime.model.tensor_index import EXPERT_DTYPES, QUANTIZED_DTYPES
from hotset.runtime.model.tensors import layer_tensors
from hotset.shm.kv_page_format import QUANT_BLOCK

PackFormat = Literal["bf16", "q8_0", "q4_0", "mixed"]

_DTYPES: Final = {"bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}


class CannotPack(HotsetError):
    """The model cannot be packed as asked, or not there."""


class PrecisionTiers(msgspec.Struct, frozen=True, kw_only=True):
    """Experts from the percentile `hot` of activations on get the finest format, those below `cold` the coarsest, q4_0,
    and those between q8_0. The finest is bfloat16; the source's where that has 16 bits; q8_0 where it has fewer.
    """

    hot: float = 0.9
    cold: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.cold <= self.hot <= 1:
            raise ValueError(f"cold is {self.cold} and hot is {self.hot}, expected 0 <= cold <= hot <= 1")

    def dtype(self, percentile: float, stored: str) -> str:
        """Of an expert that is `stored` in the source."""
        if percentile < self.cold:
            return "q4_0"
        if percentile < self.hot:
            return "q8_0"
        return {"float32": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}.get(stored, "q8_0")


def choose_formats(
    checkpoint: Checkpoint,
    format: str | None,
    heat: Heat | None = None,
    tiers: PrecisionTiers | None = None,
    *,
    heat_of: Path | None = None,
) -> list[str]:
    """The dtype of each of `checkpoint.expert_ids`; with `format` None, the one that it has.

    `heat`, recorded of the model `heat_of`, is for "mixed", which is refused without it, and `tiers` too.

    Raises `CannotPack`, or `ValueError` for an unknown format.
    """
    if format is not None and format not in get_args(PackFormat):
        raise ValueError(f"format is {format!r}, expected one of {', '.join(get_args(PackFormat))}")
    stored = [checkpoint.expert_dtype(layer, expert) for layer, expert in checkpoint.expert_ids]
    if format is None:
        _refuse_to_keep(checkpoint, stored)
        return stored
    if checkpoint.config.expert_layout == "interleaved_with_biases":
        raise CannotPack(
            f"{checkpoint.folder}: experts whose rows of gate and up alternate are not converted; pack them without a "
            "format, as they are"
        )
    if format == "mixed":
        dtypes = _by_heat(checkpoint, stored, heat, heat_of or checkpoint.folder, tiers or PrecisionTiers())
    else:
        dtypes = [_DTYPES[format]] * len(stored)
    _refuse_widths(checkpoint, dtypes)
    if "q4_0" not in dtypes and set(stored) <= {*QUANTIZED_DTYPES, "mxfp4_ggml"} - set(dtypes):
        raise CannotPack(f"{checkpoint.folder}: its experts are {stored[0]} already; {dtypes[0]} would only be larger")
    return dtypes


def _by_heat(
    checkpoint: Checkpoint, stored: list[str], heat: Heat | None, heat_of: Path, tiers: PrecisionTiers
) -> list[str]:
    if set(stored) == {"q4_0"}:
        raise CannotPack(f"{checkpoint.folder}: its experts are q4_0 already; finer formats would only be larger")
    if heat is None or not heat.activations.any():
        raise CannotPack(
            f"{heat_of}: no use of its experts is recorded, and 'mixed' goes by that; serve it for a while "
            "(`hotset generate --model ...` records it), or name a pack of the same model that was served (--heat)"
        )
    percentiles = heat.percentiles()
    ids = checkpoint.expert_ids
    return [tiers.dtype(float(percentiles[at]), dtype) for at, dtype in zip(ids, stored, strict=True)]


def read_heat(checkpoint: Checkpoint, model: Path) -> Heat | None:
    """What is recorded of `model`, which is `checkpoint`'s or another pack of the same. Raises `UnusableHeat`, or
    `CannotPack` if it is none."""
    if model != checkpoint.folder:
        _refuse_another_model(checkpoint, model)
    return Heat.load(model, (checkpoint.config.num_layers, checkpoint.config.num_experts))


def _refuse_another_model(checkpoint: Checkpoint, model: Path) -> None:
    """By the first gate, which packs keep as it is."""
    other = Checkpoint.open(model, to_convert=True)
    config = checkpoint.config
    name = layer_tensors(config, config.expert_layers[0])["router"].name
    if name in other.tensors:
        mine, theirs = checkpoint.dense(name), other.dense(name)
        # Of another dtype it may be the same all the same.
        if mine.dtype != theirs.dtype or np.array_equal(mine, theirs):
            return
    raise CannotPack(f"{model} is another model than {checkpoint.folder}: their gates differ")


def _refuse_to_keep(checkpoint: Checkpoint, stored: list[str]) -> None:
    """Formats that nothing computes on."""
    if not set(stored) <= {*EXPERT_DTYPES, "mxfp4"}:
        kinds = {part.dtype for ids in checkpoint.expert_ids for part in checkpoint.expert(*ids).parts}
        raise CannotPack(
            f"{checkpoint.folder}: its experts are stored as {', '.join(sorted(kinds))}; "
            f"give one of {', '.join(get_args(PackFormat))} as the format, to which they can be converted"
        )


def _refuse_widths(checkpoint: Checkpoint, dtypes: list[str]) -> None:
    config = checkpoint.config
    widths = (config.hidden_size, config.intermediate_size)
    quantized = next((dtype for dtype in dtypes if dtype in QUANTIZED_DTYPES), None)
    if quantized is not None and any(width % QUANT_BLOCK for width in widths):
        raise CannotPack(
            f"{checkpoint.folder}: hidden_size and intermediate_size are {widths[0]} and {widths[1]}, "
            f"{quantized} needs multiples of {QUANT_BLOCK}"
        )
