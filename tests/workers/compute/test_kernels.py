"""The C kernels against float64 numpy, on every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from model_factory import stored
from numpy.typing import NDArray

from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels

FORMATS = ["float32", "float16", "bfloat16"]
random = np.random.default_rng(0)


@pytest.fixture(params=_kernels.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _kernels.use_instruction_set(request.param)
    yield request.param
    _kernels.use_instruction_set(_kernels.instruction_sets()[-1])


def normal(*shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32)


def as_float64(weights: NDArray[Any]) -> NDArray[np.float64]:
    if weights.dtype == np.uint16:
        weights = (weights.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return weights.astype(np.float64)


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def assert_close(result: NDArray[np.float32], expected: NDArray[np.float64], terms: int) -> None:
    """float32 sums of `terms` products of order 1 in 16 partial sums: errors grow like the root of the terms."""
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=4e-7 * np.sqrt(terms) * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 128, 128), (1, 16, 1), (2, 33, 5), (3, 1, 4), (7, 96, 67), (40, 300, 50)]
)
def test_linear(dtype: str, rows: int, inputs: int, outputs: int) -> None:
    x, weight = normal(rows, inputs), stored(normal(outputs, inputs), dtype)
    out = np.full((rows, outputs), np.nan, np.float32)
    _kernels.linear(x, weight, out)
    assert_close(out, x.astype(np.float64) @ as_float64(weight).T, inputs)


def test_linear_over_several_weight_blocks() -> None:
    x, weight = normal(5, 2048), normal(150, 2048)
    out = np.full((5, 150), np.nan, np.float32)
    _kernels.linear(x, weight, out)
    assert_close(out, x.astype(np.float64) @ weight.astype(np.float64).T, 2048)


def test_linear_of_no_rows() -> None:
    out = np.empty((0, 3), np.float32)
    _kernels.linear(np.empty((0, 8), np.float32), normal(3, 8), out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_stored_value_is_taken_as_it_is(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1)
    weight = bits.view(np.float16) if dtype == "float16" else bits
    out = np.empty((1, 1 << 16), np.float32)
    _kernels.linear(np.ones((1, 1), np.float32), weight, out)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out[0], as_float64(weight)[:, 0].astype(np.float32))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("width", "inner"), [(128, 64), (20, 33)])
def test_expert_fills_the_assigned_places_and_no_others(dtype: str, width: int, inner: int) -> None:
    rows, ranks = 5, 2
    hidden = normal(rows, width)
    gate, up, down = (stored(normal(*shape) / 4, dtype) for shape in [(inner, width), (inner, width), (width, inner)])
    slot = np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in (gate, up, down)])
    assignments = np.array([1, 4, 9], np.int64)
    outputs = np.full((rows, ranks, width), np.nan, np.float32)
    _kernels.expert(hidden, assignments, slot, int(WeightFormat[dtype.upper()]), inner, outputs)
    for row in range(rows):
        for rank in range(ranks):
            if row * ranks + rank in assignments:
                x = hidden[row].astype(np.float64)
                middle = silu(as_float64(gate) @ x) * (as_float64(up) @ x)
                assert_close(outputs[row, rank], as_float64(down) @ middle, width * inner)
            else:
                assert np.isnan(outputs[row, rank]).all()


def test_silu_of_extreme_gates() -> None:
    gates = np.array([-1e30, -200, -88, -20, -1e-3, 0, 1e-3, 20, 88, 200, 1e30], np.float32)
    # One input of 1: gate and up are columns [11, 1]; down would be [1, 11], so read the values back one by one.
    for index, gate in enumerate(gates):
        down = np.zeros(11, np.float32)
        down[index] = 1
        slot = np.concatenate([gates, np.ones_like(gates), down]).view(np.uint8)
        out = np.empty((1, 1, 1), np.float32)
        _kernels.expert(np.ones((1, 1), np.float32), np.zeros(1, np.int64), slot, int(WeightFormat.FLOAT32), 11, out)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(out[0, 0, 0], silu(np.float64(gate)), rtol=1e-6, atol=1e-35)


def test_combine_adds_in_rank_order() -> None:
    outputs, weights = normal(6, 3, 40), normal(6, 3)
    out = np.empty((6, 40), np.float32)
    _kernels.combine(outputs, weights, out)
    expected = np.zeros((6, 40), np.float32)
    for rank in range(3):
        expected += weights[:, rank, None] * outputs[:, rank]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("width", [1, 16, 37, 128])
def test_rms_norm(width: int) -> None:
    x, weight = normal(4, width), normal(width)
    out = np.empty_like(x)
    _kernels.rms_norm(x, weight, 1e-5, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-7)
    _kernels.rms_norm(x, weight, 1e-5, x)
    np.testing.assert_array_equal(x, out)


def test_rotation_turns_the_halves_of_a_head_against_each_other() -> None:
    positions = np.array([0, 1, 7, 100_000], np.int32)
    frequencies = (1e4 ** -(np.arange(0, 8, 2) / 8)).astype(np.float32)
    cos, sin = np.empty((4, 4), np.float32), np.empty((4, 4), np.float32)
    _kernels.rotary_angles(positions, frequencies, cos, sin)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)
    x = normal(4, 3, 8)
    first, second = x[..., :4].astype(np.float64), x[..., 4:].astype(np.float64)
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    _kernels.rotate(x, cos, sin)
    np.testing.assert_allclose(x, expected, atol=1e-6)


def test_wrong_arguments_are_refused() -> None:
    x, weight, out = normal(2, 8), normal(3, 8), np.empty((2, 3), np.float32)
    with pytest.raises(ValueError, match="the width of weight is 7, expected 8"):
        _kernels.linear(x, np.ascontiguousarray(weight[:, :7]), out)
    with pytest.raises(ValueError, match="weight is not contiguous"):
        _kernels.linear(x, normal(8, 3).T, out)
    with pytest.raises(ValueError, match="the width of out is 4, expected 3"):
        _kernels.linear(x, weight, np.empty((2, 4), np.float32))
    with pytest.raises(ValueError, match="x has 1 dimensions, expected 2"):
        _kernels.linear(x[0], weight, out)
    with pytest.raises(TypeError, match="x has element format 'd', expected float32"):
        _kernels.linear(x.astype(np.float64), weight, out)
    with pytest.raises(TypeError, match="bfloat16"):
        _kernels.linear(x, weight.astype(np.float64), out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _kernels.linear(x, weight, out)
    with pytest.raises(ValueError, match="slot has 10 bytes, expected at least 384"):
        _kernels.expert(x, np.zeros(1, np.int64), np.zeros(10, np.uint8), 0, 4, np.empty((2, 1, 8), np.float32))
    with pytest.raises(ValueError, match=r"assignments\[0\] is 2, expected 0 <= it < 2"):
        _kernels.expert(x, np.array([2]), np.zeros(384, np.uint8), 0, 4, np.empty((2, 1, 8), np.float32))
