"""Section E of the acceptance cases: page formats, byte for byte GGML's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hotset.shm.kv_page_format import Floats, KvFormat, KvPageLayout, UnrepresentableValue, decode, encode

QUANTISED = [KvFormat.Q8_0, KvFormat.Q4_0]


def random_blocks(name: str, count: int = 20_000) -> Floats:
    generate = np.random.default_rng(5)
    shape = (count, 32)
    draw = {
        "normal": lambda: generate.standard_normal(shape),
        "uniform": lambda: generate.uniform(-1, 1, shape),
        "student-t": lambda: generate.standard_t(2, shape),
    }[name]
    return draw().astype(np.float32)


@pytest.mark.parametrize(
    ("format", "nbytes"),
    [
        (KvFormat.FLOAT32, 65_536),
        (KvFormat.FLOAT16, 32_768),
        (KvFormat.BFLOAT16, 32_768),
        (KvFormat.Q8_0, 17_408),
        (KvFormat.Q4_0, 9_216),
    ],
)
def test_E1_page_sizes(format: KvFormat, nbytes: int) -> None:
    layout = KvPageLayout(num_layers=1, block_size=16, num_kv_heads=8, head_dim=64, format=format)
    assert layout.page_nbytes == nbytes
    three = KvPageLayout(num_layers=3, block_size=16, num_kv_heads=8, head_dim=64, format=format)
    assert three.page_nbytes == 3 * nbytes
    assert np.prod(three.shape) == three.page_nbytes
    keys_only = KvPageLayout(
        num_layers=3, block_size=16, num_kv_heads=8, head_dim=64, format=format, keys_are_values=True
    )
    assert 2 * keys_only.page_nbytes == three.page_nbytes
    assert np.prod(keys_only.shape) == keys_only.page_nbytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "q8_0"}, "format is 'q8_0', expected a KvFormat such as KvFormat.Q8_0"),
        ({"head_dim": "64"}, "head_dim is '64', expected an integer of at least 1"),
        ({"num_layers": 1.5}, "num_layers is 1.5, expected an integer of at least 1"),
    ],
)
def test_what_is_wrong_of_a_layout_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvPageLayout(**({"num_layers": 1, "block_size": 16, "num_kv_heads": 1, "head_dim": 64} | wrong))


RAMP = (np.arange(32, dtype=np.float32) - 16) * np.float32(0.1)


def test_E2_q8_0_of_a_ramp() -> None:
    data = encode(RAMP, KvFormat.Q8_0)
    expected = "7322 8189 9199 a1a9 b1b9 c0c8 d0d8 e0e8 f0f8 0008 1018 2028 3038 4047 4f57 5f67 6f77"
    assert data.tobytes() == bytes.fromhex(expected)
    assert data[:2].view("<f2")[0] == pytest.approx(0.012596, abs=1e-6)
    assert np.abs(decode(data, KvFormat.Q8_0, 32) - RAMP).max() == pytest.approx(0.00615, abs=5e-6)


def test_E3_q4_0_of_a_ramp() -> None:
    data = encode(RAMP, KvFormat.Q4_0)
    assert data.tobytes() == bytes.fromhex("6632 8091 91a1 a2b3 b3c4 c4d5 d5e6 e6f7 f7f8")
    assert data[:2].view("<f2")[0] == pytest.approx(0.2, abs=1e-4)
    assert np.abs(decode(data, KvFormat.Q4_0, 32) - RAMP).max() == pytest.approx(0.1003, abs=5e-5)


def test_E4_zeros_stay_zeros() -> None:
    zeros = np.zeros(32, np.float32)
    assert encode(zeros, KvFormat.Q8_0).tobytes() == bytes(34)
    assert encode(zeros, KvFormat.Q4_0).tobytes() == bytes.fromhex("0080" + "88" * 16)
    for format in QUANTISED:
        assert not decode(encode(zeros, format), format, 32).any()


def test_E4_a_large_value_drowns_a_small_one() -> None:
    block = np.array([1000, -1000, 0.0001] + [0] * 29, np.float32)
    q8, q4 = (decode(encode(block, format), format, 32)[:3].tolist() for format in QUANTISED)
    assert q8 == [1000.125, -1000.125, 0]
    assert q4 == [1000, -875, 0]


@pytest.mark.parametrize("name", ["normal", "uniform", "student-t"])
@pytest.mark.parametrize(("format", "bound"), [(KvFormat.Q8_0, 0.57 / 127), (KvFormat.Q4_0, 1.01 / 8)])
def test_E5_errors_are_bounded_by_the_largest_value_of_the_block(name: str, format: KvFormat, bound: float) -> None:
    blocks = random_blocks(name)
    error = np.abs(decode(encode(blocks, format), format, 32) - blocks).max(axis=1)
    assert (error <= bound * np.abs(blocks).max(axis=1)).all()


@pytest.mark.parametrize("name", ["normal", "uniform", "student-t"])
@pytest.mark.parametrize("format", [*QUANTISED, KvFormat.BFLOAT16])
def test_E5_bytes_are_those_of_gguf(name: str, format: KvFormat) -> None:
    blocks = random_blocks(name)
    kind = {"q8_0": "Q8_0", "q4_0": "Q4_0", "bfloat16": "BF16"}[format.value]
    expected = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(encode(blocks, format), expected)
    assert np.array_equal(
        decode(expected, format, 32), gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[kind])
    )


@pytest.mark.parametrize("format", QUANTISED)
def test_E5_bytes_are_those_that_gguf_gave(format: KvFormat) -> None:
    vectors = np.load(Path(__file__).parent / "data" / "gguf_blocks.npz")
    assert np.array_equal(encode(vectors["blocks"], format), vectors[format.value])


@pytest.mark.parametrize("head_dim", [64, 16, 40])
@pytest.mark.parametrize("format", list(KvFormat))
def test_E6_no_block_straddles_heads_or_tokens(format: KvFormat, head_dim: int) -> None:
    rows = np.stack([np.full((2, head_dim), 1000, np.float32), np.ones((2, head_dim), np.float32)])
    data = encode(rows, format)
    assert data.shape == (2, 2, format.nbytes(head_dim))
    assert np.abs(decode(data, format, head_dim)[1] - 1).max() <= 0.005


@pytest.mark.parametrize("format", list(KvFormat))
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_E8_what_is_not_finite_is_refused_by_position(format: KvFormat, value: float) -> None:
    rows = np.ones((3, 64), np.float32)
    rows[1, 40] = value
    with pytest.raises(UnrepresentableValue, match=rf"{value} at position \(1, 40\) .* as {format.value}") as refused:
        encode(rows, format)
    assert refused.value.position == (1, 40)


@pytest.mark.parametrize(
    ("format", "largest"),
    [(KvFormat.FLOAT16, 65519.0), (KvFormat.Q8_0, 65519.0 * 127), (KvFormat.Q4_0, -65519.0 * 8)],
)
def test_E8_what_would_become_infinite_is_refused(format: KvFormat, largest: float) -> None:
    block = np.zeros(32, np.float32)
    block[7] = largest
    assert np.isfinite(decode(encode(block, format), format, 32)).all()
    block[7] = largest * 1.001
    with pytest.raises(UnrepresentableValue):
        encode(block, format)
    block[7] = 1e7
    with pytest.raises(UnrepresentableValue, match="value 10000000"):
        encode(block, format)


@pytest.mark.parametrize("format", QUANTISED)
def test_values_too_small_for_a_scale_read_as_zero(format: KvFormat) -> None:
    block = np.full(32, 1e-40, np.float32)
    assert not decode(encode(block, format), format, 32).any()


@pytest.mark.parametrize("format", [KvFormat.FLOAT32, KvFormat.FLOAT16, KvFormat.BFLOAT16])
def test_values_that_the_format_has_are_kept_exactly(format: KvFormat) -> None:
    values = np.array([0.0, -0.0, 1.0, -2.5, 0.15625, 1024.0], np.float32)
    assert np.array_equal(decode(encode(values, format), format, 6), values)


@pytest.mark.parametrize("name", ["num_layers", "block_size", "num_kv_heads", "head_dim"])
def test_impossible_layouts_are_refused(name: str) -> None:
    sizes = {"num_layers": 1, "block_size": 16, "num_kv_heads": 8, "head_dim": 64, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        KvPageLayout(**sizes)
