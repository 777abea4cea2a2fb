"""The C kernels against float64 numpy, on every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from stored_weights import E2M1, FORMATS, SINGLE_VALUES, StoredWeights

from hotset.shm.kv_page_format import KvFormat, decode
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels

random = np.random.default_rng(0)


@pytest.fixture(params=_kernels.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _kernels.use_instruction_set(request.param)
    yield request.param
    _kernels.use_instruction_set(_kernels.instruction_sets()[-1])


def normal(*shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32)


def linear(x: NDArray[np.float32], weight: StoredWeights, format: WeightFormat) -> NDArray[np.float32]:
    out = np.full((len(x), len(weight.array)), np.nan, np.float32)
    _kernels.linear(x, weight.array, out, int(format))
    return out


def linear_transposed(x: NDArray[np.float32], weight: StoredWeights, format: WeightFormat) -> NDArray[np.float32]:
    out = np.full((len(x), weight.values.shape[1]), np.nan, np.float32)
    _kernels.linear_transposed(x, weight.array, out, int(format))
    return out


def guarded_memory(size: int) -> mmap.mmap:
    """Whole pages of memory, followed by one that cannot be read."""
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return memory


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def assert_close(result: NDArray[np.float32], expected: NDArray[np.float64], terms: int) -> None:
    """float32 sums of `terms` products of order 1 in 16 partial sums: errors grow like the root of the terms."""
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=4e-7 * np.sqrt(terms) * max(1, np.abs(expected).max()))


EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)


def width_in(format: WeightFormat, width: int) -> int:
    """Rows of quantised blocks are whole blocks."""
    return width if format in SINGLE_VALUES else -(-width // 32) * 32


@EACH_FORMAT
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 128, 128), (1, 16, 1), (2, 33, 5), (3, 1, 4), (7, 96, 67), (40, 300, 50), (9, 31, 9), (4, 47, 6)],
)
def test_linear(format: WeightFormat, rows: int, inputs: int, outputs: int) -> None:
    inputs = width_in(format, inputs)
    x, weight = normal(rows, inputs), StoredWeights.of(normal(outputs, inputs), format)
    expected = x.astype(np.float64) @ weight.values.astype(np.float64).T
    assert_close(linear(x, weight, format), expected, inputs)


@EACH_FORMAT
def test_a_format_gives_the_bits_of_float32_weights_with_its_values(format: WeightFormat) -> None:
    x, weight = normal(7, 160), StoredWeights.of(normal(37, 160) * 100, format)
    wide = StoredWeights.of(weight.values, WeightFormat.FLOAT32)
    np.testing.assert_array_equal(linear(x, weight, format), linear(x, wide, WeightFormat.FLOAT32))


@EACH_FORMAT
def test_vectors_of_8_and_of_16_lanes_give_the_same_bits(format: WeightFormat, instruction_set: str) -> None:
    if instruction_set == "portable" or "avx512" not in _kernels.instruction_sets():
        pytest.skip("it compares avx2 with avx512")
    x, weight = normal(5, 96), StoredWeights.of(normal(33, 96), format)
    results = []
    for name in ("avx2", "avx512"):
        _kernels.use_instruction_set(name)
        results.append(linear(x, weight, format))
    np.testing.assert_array_equal(*results)


@EACH_FORMAT
def test_linear_over_several_weight_blocks(format: WeightFormat) -> None:
    x, weight = normal(5, 4096), StoredWeights.of(normal(300, 4096), format)
    assert_close(linear(x, weight, format), x.astype(np.float64) @ weight.values.astype(np.float64).T, 4096)


@EACH_FORMAT
def test_nothing_beside_the_weights_is_read_and_nothing_beside_the_result_written(format: WeightFormat) -> None:
    """The weights end with a page of memory, behind which none may be touched."""
    x, weight = normal(3, 96), StoredWeights.of(normal(5, 96), format)
    size = -(-weight.bytes.size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(guarded_memory(size), np.uint8, size)
    memory[size - weight.bytes.size :] = weight.bytes
    at_the_end = memory[size - weight.bytes.size :].view(weight.array.dtype).reshape(weight.array.shape)
    outputs = np.full((5, 5), np.nan, np.float32)
    _kernels.linear(x, at_the_end, outputs[1:4], int(format))
    np.testing.assert_array_equal(outputs[1:4], linear(x, weight, format))
    assert np.isnan(outputs[[0, 4]]).all()


@EACH_FORMAT
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 128, 512), (1, 16, 1), (2, 33, 5), (3, 1, 4), (7, 96, 67), (40, 30, 100), (9, 31, 33), (4, 47, 6)],
)
def test_linear_with_a_row_for_each_input(format: WeightFormat, rows: int, inputs: int, outputs: int) -> None:
    x, weight = normal(rows, inputs), StoredWeights.of(normal(inputs, width_in(format, outputs)), format)
    result = linear_transposed(x, weight, format)
    assert_close(result, x.astype(np.float64) @ weight.values.astype(np.float64), inputs)
    wide = StoredWeights.of(weight.values, WeightFormat.FLOAT32)
    np.testing.assert_array_equal(result, linear_transposed(x, wide, WeightFormat.FLOAT32))
    for row in range(rows):
        np.testing.assert_array_equal(linear_transposed(x[row : row + 1], weight, format)[0], result[row])


@EACH_FORMAT
def test_with_a_row_for_each_input_nothing_behind_the_weights_is_read(format: WeightFormat) -> None:
    x, weight = normal(3, 5), StoredWeights.of(normal(5, width_in(format, 41)), format)
    size = -(-weight.bytes.size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(guarded_memory(size), np.uint8, size)
    memory[size - weight.bytes.size :] = weight.bytes
    at_the_end = memory[size - weight.bytes.size :].view(weight.array.dtype).reshape(weight.array.shape)
    outputs = np.full((5, weight.values.shape[1]), np.nan, np.float32)
    _kernels.linear_transposed(x, at_the_end, outputs[1:4], int(format))
    np.testing.assert_array_equal(outputs[1:4], linear_transposed(x, weight, format))
    assert np.isnan(outputs[[0, 4]]).all()


def test_a_row_for_each_input_of_the_wrong_shape_is_refused() -> None:
    out = np.empty((2, 64), np.float32)
    with pytest.raises(ValueError, match="the number of rows of weight is 4, expected 5"):
        _kernels.linear_transposed(normal(2, 5), normal(4, 64), out)
    with pytest.raises(ValueError, match="the width of weight is 32, expected 64"):
        _kernels.linear_transposed(normal(2, 5), normal(5, 32), out)
    with pytest.raises(ValueError, match="the number of bytes in a row of weight is 64, expected 68"):
        _kernels.linear_transposed(normal(2, 5), np.zeros((5, 64), np.uint8), out, int(WeightFormat.Q8_0))
    with pytest.raises(ValueError, match="the width of out is 40, expected a multiple of 32 for Q8_0"):
        _kernels.linear_transposed(
            normal(2, 5), np.zeros((5, 68), np.uint8), np.empty((2, 40), np.float32), int(WeightFormat.Q8_0)
        )


def test_linear_of_no_rows() -> None:
    out = np.empty((0, 3), np.float32)
    _kernels.linear(np.empty((0, 8), np.float32), normal(3, 8), out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_stored_value_is_taken_as_it_is(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1)
    weight = bits.view(np.float16) if dtype == "float16" else bits
    values = bits.view(np.float16) if dtype == "float16" else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    out = np.empty((1, 1 << 16), np.float32)
    _kernels.linear(np.ones((1, 1), np.float32), weight, out)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out[0], values[:, 0].astype(np.float32))


@pytest.mark.parametrize("format", [WeightFormat.MXFP4, WeightFormat.MXFP4_GGML], ids=lambda format: format.name)
def test_every_number_and_scale_of_mxfp4_is_taken_as_it_is(format: WeightFormat) -> None:
    scales = np.array([0, 1, 2, 100, 127, 200, 250], np.uint8)
    numbers = np.arange(256, dtype=np.uint8)[:, None].repeat(16, axis=1)
    all_numbers, all_scales = np.tile(numbers, (len(scales), 1)), scales.repeat(256)
    weight = np.concatenate([all_numbers.reshape(-1), all_scales]).reshape(-1, 17)
    if format == WeightFormat.MXFP4_GGML:
        weight = np.concatenate([all_scales[:, None], all_numbers], axis=1)
    units = np.exp2(scales.astype(np.float64) - 127).repeat(256).astype(np.float32)
    for place in range(32):
        x = np.zeros((1, 32), np.float32)
        x[0, place] = 1
        out = np.empty((1, len(weight)), np.float32)
        _kernels.linear(x, weight, out, int(format))
        high = place % 2 if format == WeightFormat.MXFP4 else place // 16
        codes = all_numbers[:, 0] >> 4 * high & 15
        np.testing.assert_array_equal(out[0], E2M1[codes] * units)


@pytest.mark.parametrize("format", [WeightFormat.Q8_0, WeightFormat.Q4_0], ids=lambda format: format.name)
def test_every_number_of_a_block_is_taken_as_it_is(format: WeightFormat) -> None:
    """Every byte at every place, and scales that are negative, subnormal and the largest of float16."""
    scales = np.array([1, -0.5, 6e-8, 65504], np.float16)
    numbers = np.arange(256, dtype=np.uint8)[:, None].repeat(16 if format == WeightFormat.Q4_0 else 32, axis=1)
    blocks = [np.concatenate([np.full((256, 1), scale).view(np.uint8), numbers], axis=1) for scale in scales]
    weight = np.concatenate(blocks)
    kv_format = KvFormat[format.name]
    for place in range(32):
        x = np.zeros((1, 32), np.float32)
        x[0, place] = 1
        out = np.empty((1, len(weight)), np.float32)
        _kernels.linear(x, weight, out, int(format))
        np.testing.assert_array_equal(out[0], decode(weight, kv_format, 32)[:, place])


@EACH_FORMAT
@pytest.mark.parametrize(("width", "inner"), [(128, 64), (20, 33)])
def test_expert_fills_the_assigned_places_and_no_others(format: WeightFormat, width: int, inner: int) -> None:
    rows, ranks = 5, 2
    width, inner = width_in(format, width), width_in(format, inner)
    hidden = normal(rows, width)
    matrices = [
        StoredWeights.of(normal(*shape) / 4, format) for shape in [(inner, width), (inner, width), (width, inner)]
    ]
    slot = np.concatenate([matrix.bytes for matrix in matrices])
    gate, up, down = (matrix.values.astype(np.float64) for matrix in matrices)
    assignments = np.array([1, 4, 9], np.int64)
    outputs = np.full((rows, ranks, width), np.nan, np.float32)
    _kernels.experts(hidden, [assignments], [slot], [int(format)], inner, outputs)
    for row in range(rows):
        for rank in range(ranks):
            if row * ranks + rank in assignments:
                x = hidden[row].astype(np.float64)
                assert_close(outputs[row, rank], down @ (silu(gate @ x) * (up @ x)), width * inner)
            else:
                assert np.isnan(outputs[row, rank]).all()


@EACH_FORMAT
@pytest.mark.parametrize(("width", "inner"), [(128, 64), (20, 33)])
@pytest.mark.parametrize("limit", [7.0, 0.5, 0.0])
@pytest.mark.parametrize("layout", ["INTERLEAVED_WITH_BIASES", "GATE_UP_DOWN_WITH_BIASES"])
def test_expert_of_gpt_oss(layout: str, format: WeightFormat, width: int, inner: int, limit: float) -> None:
    """Rows of gate and up in turn, or matrices of their own as in GGUF files; biases, and its own activation."""
    width, inner = width_in(format, width), width_in(format, inner)
    hidden = normal(3, width) * 2
    if layout == "INTERLEAVED_WITH_BIASES":
        matrices, bias_format = 1, format if format in SINGLE_VALUES else WeightFormat.BFLOAT16
    else:
        matrices, bias_format = 2, WeightFormat.FLOAT32
    shapes = [(2 * inner // matrices, width)] * matrices + [(width, inner)]
    parts = [
        part
        for outputs, inputs in shapes
        for part in (
            StoredWeights.of(normal(outputs, inputs) / 4, format),
            StoredWeights.of(normal(1, outputs), bias_format),
        )
    ]
    slot = np.concatenate([part.bytes for part in parts])
    values = [part.values.astype(np.float64) for part in parts]
    outputs = np.full((3, 1, width), np.nan, np.float32)
    number = getattr(_kernels, layout)
    _kernels.experts(hidden, [np.arange(3)], [slot], [int(format)], inner, outputs, number, limit)
    *before, down, down_bias = values
    products = [
        hidden.astype(np.float64) @ weight.T + bias for weight, bias in zip(before[::2], before[1::2], strict=True)
    ]
    gate, up = products if matrices == 2 else (products[0][:, 0::2], products[0][:, 1::2])
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        middle = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    else:
        middle = silu(gate) * up
    assert_close(outputs[:, 0], middle @ down.T + down_bias, width * inner)


def test_silu_of_extreme_gates() -> None:
    gates = np.array([-1e30, -200, -88, -20, -1e-3, 0, 1e-3, 20, 88, 200, 1e30], np.float32)
    # One input of 1: gate and up are columns [11, 1]; down would be [1, 11], so read the values back one by one.
    for index, gate in enumerate(gates):
        down = np.zeros(11, np.float32)
        down[index] = 1
        slot = np.concatenate([gates, np.ones_like(gates), down]).view(np.uint8)
        out = np.empty((1, 1, 1), np.float32)
        _kernels.experts(
            np.ones((1, 1), np.float32), [np.zeros(1, np.int64)], [slot], [int(WeightFormat.FLOAT32)], 11, out
        )
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
def test_row_norms(width: int) -> None:
    x, norms = normal(5, width), np.full(5, np.nan, np.float32)
    _kernels.row_norms(x, norms)
    np.testing.assert_allclose(norms, np.linalg.norm(x.astype(np.float64), axis=1), rtol=2e-6)
    with pytest.raises(ValueError, match="the number of values of out is 4, expected 5"):
        _kernels.row_norms(x, norms[:4])


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
    with pytest.raises(TypeError, match="weight has element format 'd', expected float32, float16, uint16"):
        _kernels.linear(x, weight.astype(np.float64), out)
    with pytest.raises(TypeError, match="expected 3 to 4 arguments, got 2"):
        _kernels.linear(x, weight)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _kernels.linear(x, weight, out)
    with pytest.raises(ValueError, match="slot has 10 bytes, expected at least 384"):
        _kernels.experts(x, [np.zeros(1, np.int64)], [np.zeros(10, np.uint8)], [0], 4, np.empty((2, 1, 8), np.float32))
    with pytest.raises(ValueError, match=r"assignments\[0\] is 2, expected 0 <= it < 2"):
        _kernels.experts(x, [np.array([2])], [np.zeros(384, np.uint8)], [0], 4, np.empty((2, 1, 8), np.float32))


def test_wrong_quantised_weights_are_refused() -> None:
    x, out = normal(2, 64), np.empty((2, 3), np.float32)
    rows = np.zeros((3, 2 * 34), np.uint8)
    with pytest.raises(TypeError, match=r"has element format 'B', expected float32, .* or uint8 with the number"):
        _kernels.linear(x, rows, out)
    with pytest.raises(TypeError, match="weight has element format 'B', which is not how bfloat16 is stored"):
        _kernels.linear(x, rows, out, int(WeightFormat.BFLOAT16))
    with pytest.raises(TypeError, match="weight has element format 'f', which is not how Q8_0 is stored"):
        _kernels.linear(x, normal(3, 64), out, int(WeightFormat.Q8_0))
    with pytest.raises(ValueError, match="the number of bytes in a row of weight is 67, expected 68"):
        _kernels.linear(x, np.zeros((3, 67), np.uint8), out, int(WeightFormat.Q8_0))
    with pytest.raises(ValueError, match="the number of bytes in a row of weight is 68, expected 36"):
        _kernels.linear(x, rows, out, int(WeightFormat.Q4_0))
    with pytest.raises(ValueError, match="the width of x is 48, expected a multiple of 32 for Q8_0"):
        _kernels.linear(normal(2, 48), rows, out, int(WeightFormat.Q8_0))
    with pytest.raises(ValueError, match="weight is not contiguous"):
        _kernels.linear(x, np.zeros((3, 100), np.uint8)[:, :68], out, int(WeightFormat.Q8_0))
    with pytest.raises(ValueError, match=f"unknown weight format 99, expected 0 to {len(WeightFormat) - 1}"):
        _kernels.linear(x, rows, out, 99)
    outputs = np.empty((2, 1, 64), np.float32)
    with pytest.raises(ValueError, match="intermediate_size is 40, expected a multiple of 32 for Q4_0"):
        _kernels.experts(x, [np.zeros(1, np.int64)], [rows.reshape(-1)], [int(WeightFormat.Q4_0)], 40, outputs)
    with pytest.raises(ValueError, match="slot has 204 bytes, expected at least 3456"):
        _kernels.experts(x, [np.zeros(1, np.int64)], [rows.reshape(-1)], [int(WeightFormat.Q4_0)], 32, outputs)


def test_lists_of_experts_that_do_not_match_are_refused() -> None:
    x, slot, outputs = normal(1, 32), np.zeros(10000, np.uint8), np.full((1, 1, 32), np.nan, np.float32)
    row = np.zeros(1, np.int64)
    with pytest.raises(TypeError, match="expected lists of equal length: assignments, slots, formats"):
        _kernels.experts(x, [row], [slot, slot], [0], 4, outputs)
    with pytest.raises(TypeError, match="expected lists of equal length: assignments, slots, formats"):
        _kernels.experts(x, (row,), [slot], [0], 4, outputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slot has 10 bytes, expected at least 1536"):
        _kernels.experts(x, [row, row], [slot, slot[:10]], [0, 0], 4, outputs)
    assert np.isnan(outputs).all()
    _kernels.experts(x, [], [], [], 4, outputs)
    assert np.isnan(outputs).all()


def test_wrong_expert_options_are_refused() -> None:
    x, slot, outputs = normal(1, 32), np.zeros(10000, np.uint8), np.empty((1, 1, 32), np.float32)
    row = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="unknown expert layout 3"):
        _kernels.experts(x, [row], [slot], [0], 4, outputs, 3)
    with pytest.raises(ValueError, match=r"swiglu_limit is -1.0, expected a number of at least 0"):
        _kernels.experts(x, [row], [slot], [0], 4, outputs, 0, -1.0)
    with pytest.raises(ValueError, match=r"swiglu_limit is nan, expected a number of at least 0"):
        _kernels.experts(x, [row], [slot], [0], 4, outputs, 0, float("nan"))
    nbytes = 3 * 4 * 32 * 4 + (8 + 32) * 4
    with pytest.raises(ValueError, match=f"slot has {nbytes - 1} bytes, expected at least {nbytes}"):
        _kernels.experts(x, [row], [slot[: nbytes - 1]], [0], 4, outputs, _kernels.INTERLEAVED_WITH_BIASES)
    nbytes = 3 * 32 * 17 + (64 + 32) * 2
    with pytest.raises(ValueError, match=f"slot has {nbytes - 1} bytes, expected at least {nbytes}"):
        _kernels.experts(x, [row], [slot[: nbytes - 1]], [int(WeightFormat.MXFP4)], 32, outputs, 1)
    nbytes = 3 * 32 * 17 + (64 + 32) * 4
    with pytest.raises(ValueError, match=f"slot has {nbytes - 1} bytes, expected at least {nbytes}"):
        _kernels.experts(x, [row], [slot[: nbytes - 1]], [int(WeightFormat.MXFP4_GGML)], 32, outputs, 2)


def test_formats_are_numbered_as_in_the_arena() -> None:
    assert {format.name: getattr(_kernels, format.name) for format in WeightFormat} == dict(WeightFormat.__members__)
