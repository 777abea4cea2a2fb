"""How KV rows lie in a page: the formats of the rows, the layout of a page, and a numpy reference of the conversions.

Q8_0 and Q4_0 are GGML's, byte for byte (ggml-quants.c; the same results as gguf-py): blocks of 32 values, first a
float16 scale d, then 32 int8 with value = d * q (Q8_0), or 16 bytes with two 4-bit numbers each and value = d * (q -
8), the low halves first (Q4_0). A block never spans two heads or two tokens: a head whose size is not a multiple of 32
is padded with zeros.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

QUANT_BLOCK = 32


class KvFormat(enum.Enum):
    """Names as users give them in `kv_cache_dtype`."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    @property
    def values_per_block(self) -> int:
        return QUANT_BLOCK if self in (KvFormat.Q8_0, KvFormat.Q4_0) else 1

    @property
    def block_nbytes(self) -> int:
        return _BLOCK_NBYTES[self]

    def nbytes(self, num_values: int) -> int:
        """Bytes of one row of values, the last block padded."""
        return -(-num_values // self.values_per_block) * self.block_nbytes


_BLOCK_NBYTES = {
    KvFormat.FLOAT32: 4,
    KvFormat.FLOAT16: 2,
    KvFormat.BFLOAT16: 2,
    KvFormat.Q8_0: 34,
    KvFormat.Q4_0: 18,
}


class UnrepresentableValue(ValueError):
    """A value that the format cannot hold: infinite, not a number, or so large that it would become infinite.

    Attributes:
        position: index of the value in the array that was to be stored.
    """

    def __init__(self, position: tuple[int, ...], value: float, format: KvFormat) -> None:
        super().__init__(f"the value {value} at position {position} cannot be stored as {format.value}")
        self.position = position
        self.value = value
        self.format = format


class KvPageLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A page holds `block_size` tokens of all layers: `[layer][keys, values][token][head][row]`, without gaps.

    `keys_are_values`: values are the first numbers of their keys, and are not stored again.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    format: KvFormat = KvFormat.FLOAT32
    keys_are_values: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "block_size", "num_kv_heads", "head_dim"):
            value: Any = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        given: Any = self.format
        if not isinstance(given, KvFormat):
            raise ValueError(f"format is {given!r}, expected a KvFormat such as KvFormat.Q8_0")

    @property
    def head_nbytes(self) -> int:
        return self.format.nbytes(self.head_dim)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys, or values, in one layer."""
        return self.num_kv_heads * self.head_nbytes

    @property
    def planes(self) -> int:
        """2, keys and values; or 1."""
        return 1 if self.keys_are_values else 2

    @property
    def page_nbytes(self) -> int:
        return self.num_layers * self.planes * self.block_size * self.token_nbytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of one page's bytes."""
        return (self.num_layers, self.planes, self.block_size, self.num_kv_heads, self.head_nbytes)


def encode(values: npt.ArrayLike, format: KvFormat) -> Bytes:
    """Rows of values in a page's format.

    Args:
        values: `[..., n]`, converted to float32.

    Returns:
        uint8 `[..., format.nbytes(n)]`.

    Raises:
        UnrepresentableValue: and then nothing is returned, so nothing can have been stored.
    """
    rows = np.ascontiguousarray(values, np.float32)
    limit = _LARGEST[format]
    bad = ~(np.abs(rows) < limit)  # catches NaN too
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UnrepresentableValue(position, float(rows[position]), format)
    n = rows.shape[-1]
    padding = -n % format.values_per_block
    if padding:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], padding), np.float32)], axis=-1)
    match format:
        case KvFormat.FLOAT32:
            data = rows.view(np.uint8)
        case KvFormat.FLOAT16:
            data = rows.astype("<f2").view(np.uint8)
        case KvFormat.BFLOAT16:
            bits = rows.view(np.uint32)
            data = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)
        case KvFormat.Q8_0:
            data = _quantize_q8_0(rows.reshape(-1, QUANT_BLOCK))
        case KvFormat.Q4_0:
            data = _quantize_q4_0(rows.reshape(-1, QUANT_BLOCK))
    return data.reshape(*rows.shape[:-1], format.nbytes(n))


def decode(data: Bytes, format: KvFormat, num_values: int) -> Floats:
    """The values of rows: uint8 `[..., format.nbytes(num_values)]` to float32 `[..., num_values]`."""
    data = np.ascontiguousarray(data)
    match format:
        case KvFormat.FLOAT32:
            rows = data.view("<f4")
        case KvFormat.FLOAT16:
            rows = data.view("<f2").astype(np.float32)
        case KvFormat.BFLOAT16:
            rows = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case KvFormat.Q8_0 | KvFormat.Q4_0:
            blocks = data.reshape(-1, format.block_nbytes)
            scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
            packed = blocks[:, 2:]
            if format is KvFormat.Q8_0:
                numbers = packed.view(np.int8).astype(np.float32)
            else:
                numbers = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) - 8
            rows = (scale * numbers).reshape(*data.shape[:-1], data.shape[-1] // format.block_nbytes * QUANT_BLOCK)
    return rows[..., :num_values]


def _largest_float16_scale(divisor: float) -> float:
    """The least magnitude whose scale would be rounded to infinity in float16."""
    return 65520.0 * divisor


_LARGEST = {
    KvFormat.FLOAT32: np.inf,
    KvFormat.FLOAT16: _largest_float16_scale(1),
    KvFormat.BFLOAT16: float(np.array(0x7F7F8000, np.uint32).view(np.float32)),
    KvFormat.Q8_0: _largest_float16_scale(127),
    KvFormat.Q4_0: _largest_float16_scale(8),
}


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 where that is infinite: such a scale is stored as zero, so the block reads as zeros anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scale
    return np.where(np.isinf(inverse), np.float32(0), inverse)


def _quantize_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))  # halves away from zero, as roundf
    return np.concatenate([scale.astype("<f2").view(np.uint8), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _quantize_q4_0(blocks: Floats) -> Bytes:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)  # the value of largest magnitude becomes 0, which stands for -8
    numbers = np.trunc(blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    packed = numbers[:, : QUANT_BLOCK // 2] | (numbers[:, QUANT_BLOCK // 2 :] << np.uint8(4))
    return np.concatenate([scale.astype("<f2").view(np.uint8), packed], axis=1)
