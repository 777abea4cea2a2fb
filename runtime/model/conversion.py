"""Rows of weights from one format into another: for packing, and for those matrices of GGUF files that need it.

Formats are named as in tensor_index.py, or by GGML's names in lower case ("q4_k"): those that the gguf library decodes.
"""

from __future__ import annotations

import numpy as np

from hotset.runtime.model.tensor_index import MATRIX_DTYPES
from hotset.shm.kv_page_format import Bytes, Floats, KvFormat, decode, encode


def convert_rows(stored: Bytes, dtype: str, to: str) -> Bytes:
    """uint8 [rows, bytes of a row] in `dtype` -> the same in `to`, one of MATRIX_DTYPES.

    Raises `UnrepresentableValue` for what `to` cannot hold.
    """
    return stored if dtype == to else encode(decode_rows(stored, dtype), KvFormat(to))


def decode_rows(stored: Bytes, dtype: str) -> Floats:
    """uint8 [rows, bytes of a row] in `dtype` -> float32 [rows, values]; a row has whole blocks."""
    if dtype in MATRIX_DTYPES:
        format = KvFormat(dtype)
        return decode(stored, format, stored.shape[-1] // format.block_nbytes * format.values_per_block)
    import gguf

    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[_ggml_name(dtype)])


def can_decode_ggml(dtype: str) -> bool:
    """Whether the gguf library knows how."""
    import gguf

    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_ggml_name(dtype)]]
    try:
        decode_rows(np.zeros((1, nbytes), np.uint8), dtype)
    except NotImplementedError:
        return False
    return True


def _ggml_name(dtype: str) -> str:
    return dtype.removesuffix("_ggml").upper()
