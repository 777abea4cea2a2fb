"""The C encoder of KV rows against the numpy reference, with and without vector instructions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from hotset.shm import _core
from hotset.shm.kv_page_format import KvFormat, UnrepresentableValue, encode

FORMATS = list(KvFormat)


def encode_in_c(values: npt.NDArray[np.float32], format: KvFormat, portable: bool) -> npt.NDArray[np.uint8]:
    out = np.full((len(values), format.nbytes(values.shape[1])), 0xEE, np.uint8)
    assert _core.encode_kv_rows(FORMATS.index(format), values, out, portable) == -1
    return out


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [64, 32, 128, 16, 40, 1, 71])
def test_the_bytes_are_those_of_the_reference(format: KvFormat, width: int, portable: bool) -> None:
    generate = np.random.default_rng(width)
    values = generate.standard_t(2, (400, width)).astype(np.float32)
    values *= np.float32(10.0) ** generate.integers(-9, 2, (400, 1)).astype(np.float32)
    assert np.array_equal(encode_in_c(values, format, portable), encode(values, format))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_special_values_are_encoded_like_the_reference(format: KvFormat, portable: bool) -> None:
    largest = {KvFormat.FLOAT16: 65519.0, KvFormat.Q8_0: 65519.0 * 127, KvFormat.Q4_0: 65519.0 * 8}.get(format, 3.3e38)
    rows = np.zeros((8, 32), np.float32)
    rows[1] = -0.0
    rows[2, 5] = largest
    rows[3, [4, 9]] = [-2.0, 2.0]  # equal magnitudes: the first decides the sign of a Q4_0 scale
    rows[4, [4, 9]] = [2.0, -2.0]
    rows[5] = 1e-40
    rows[6] = np.arange(32) * np.float32(5.9604645e-8)  # about the least float16
    rows[7] = (np.arange(32) - 16) + 0.5  # halves, which round away from zero
    rows[7, 0] = 127.0
    assert np.array_equal(encode_in_c(rows, format, portable), encode(rows, format))


REFUSED = [(format, value) for format in FORMATS for value in (np.inf, -np.inf, np.nan)]
REFUSED += [(format, 1e7) for format in (KvFormat.FLOAT16, KvFormat.Q8_0, KvFormat.Q4_0)]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("format", "value"), REFUSED)
@pytest.mark.parametrize("at", [0, 37, 44])
def test_E8_a_refusal_names_the_position_and_writes_nothing(
    format: KvFormat, value: float, at: int, portable: bool
) -> None:
    values = np.ones((3, 15), np.float32)
    values.reshape(-1)[at] = value
    out = np.full((3, format.nbytes(15)), 0xEE, np.uint8)
    assert _core.encode_kv_rows(FORMATS.index(format), values, out, portable) == at
    assert (out == 0xEE).all()
    with pytest.raises(UnrepresentableValue) as refused:
        encode(values, format)
    assert refused.value.position == divmod(at, 15)


def test_arrays_of_another_shape_are_refused() -> None:
    values = np.ones((3, 64), np.float32)
    with pytest.raises(ValueError, match=r"out has shape \(3, 67\), expected \(3, 68\)"):
        _core.encode_kv_rows(FORMATS.index(KvFormat.Q8_0), values, np.zeros((3, 67), np.uint8))
    with pytest.raises(TypeError, match="values has dtype float64, expected float32"):
        _core.encode_kv_rows(0, values.astype(np.float64), np.zeros((3, 512), np.uint8))
    with pytest.raises(IndexError, match="format is 5"):
        _core.encode_kv_rows(5, values, np.zeros((3, 512), np.uint8))
