"""Attention over KV pages against plain numpy, in every page format, on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hotset.shm.kv_page_format import KvFormat, KvPageLayout, decode, encode
from hotset.workers.compute import _kernels

Floats = NDArray[np.float32]
LAYER = 1
UNTOUCHED = 0xFF  # reads as NaN in all formats
random = np.random.default_rng(0)


@pytest.fixture(params=_kernels.instruction_sets(), autouse=True, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _kernels.use_instruction_set(request.param)
    yield request.param
    _kernels.use_instruction_set(_kernels.instruction_sets()[-1])


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    _kernels.set_num_threads(1)


def normal(*shape: int) -> Floats:
    return random.standard_normal(shape, dtype=np.float32)


class Pages:
    """Keys and values of sequences, in pages in a shuffled order; `gap` bytes lie between pages, as in the arena."""

    def __init__(
        self,
        lengths: list[int],
        block_size: int = 16,
        kv_heads: int = 2,
        head_dim: int = 32,
        format: KvFormat = KvFormat.FLOAT32,
        gap: int = 0,
        *,
        keys_are_values: bool = False,
    ) -> None:
        blocks = [-(-length // block_size) for length in lengths]
        self.layout = KvPageLayout(
            num_layers=2,
            block_size=block_size,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            format=format,
            keys_are_values=keys_are_values,
        )
        memory = np.full((1 + sum(blocks), self.layout.page_nbytes + gap), UNTOUCHED, np.uint8)
        self.array = memory[:, : self.layout.page_nbytes].reshape(-1, *self.layout.shape)
        assert np.shares_memory(memory, self.array)
        self.lengths = lengths
        self.tables = 1 + random.permutation(sum(blocks)).astype(np.uint32)
        self.table_starts = np.repeat(np.cumsum([0, *blocks[:-1]]), lengths).astype(np.int64)
        self.positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        self.keys = normal(sum(lengths), kv_heads, head_dim)
        self.values = self.keys if keys_are_values else normal(sum(lengths), kv_heads, head_dim)

    @property
    def format_and_places(self) -> tuple[int, int, NDArray[np.uint32], NDArray[np.int64], NDArray[np.int32]]:
        format = getattr(_kernels, f"KV_{self.layout.format.name}")
        return format, LAYER, self.tables, self.table_starts, self.positions

    def write(self) -> int:
        values = None if self.layout.keys_are_values else self.values
        return _kernels.write_kv(self.keys, values, self.array, *self.format_and_places)

    def attention(
        self, queries: Floats, rows: slice = slice(None), window: int = 0, sinks: Floats | None = None
    ) -> Floats:
        format, layer, tables, starts, positions = self.format_and_places
        some = np.ascontiguousarray(queries[rows])
        out = np.full_like(some, np.nan)
        _kernels.attention(some, self.array, format, layer, tables, starts[rows], positions[rows], window, out, sinks)
        return out

    def stored(self) -> tuple[Floats, Floats]:
        """Keys and values as the format has them."""
        format, head_dim = self.layout.format, self.layout.head_dim
        keys, values = (decode(encode(rows, format), format, head_dim) for rows in (self.keys, self.values))
        return keys, values


def plain_attention(
    pages: Pages, keys: Floats, values: Floats, queries: Floats, window: int = 0, sinks: Floats | None = None
) -> NDArray[np.float64]:
    """float64, sequence by sequence, without pages, tiles or running sums."""
    group = queries.shape[1] // keys.shape[1]
    results, start = [], 0
    for length in pages.lengths:
        rows = slice(start, start + length)
        k = np.repeat(keys[rows].astype(np.float64), group, axis=1)
        v = np.repeat(values[rows].astype(np.float64), group, axis=1)
        scores = np.einsum("qhd,khd->hqk", queries[rows], k) / np.sqrt(keys.shape[2])
        seen = np.tri(length, dtype=bool)
        if window:
            seen &= ~np.tri(length, k=-window, dtype=bool)
        scores[:, ~seen] = -np.inf
        if sinks is not None:  # as transformers has it: one more key, whose weight is dropped
            column = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (len(sinks), length, 1))
            scores = np.concatenate([scores, column], axis=-1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :length]
        results.append(np.einsum("hqk,khd->qhd", weights, v))
        start += length
    return np.concatenate(results)


FORMATS = pytest.mark.parametrize("format", KvFormat, ids=lambda format: format.value)
SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "gap"),
    [(4, 4, 32, 16, 0), (4, 2, 8, 4, 64), (6, 1, 20, 5, 0), (2, 2, 128, 32, 64), (12, 4, 64, 16, 0), (7, 1, 48, 3, 0),
     (40, 2, 256, 16, 0)],
)  # fmt: skip


@FORMATS
@SHAPES
def test_E_attention_is_that_over_the_stored_values(
    heads: int, kv_heads: int, head_dim: int, block_size: int, gap: int, format: KvFormat
) -> None:
    pages = Pages([1, 3, 77], block_size, kv_heads, head_dim, format, gap)
    assert pages.write() == -1
    queries = normal(81, heads, head_dim) * 3
    expected = plain_attention(pages, *pages.stored(), queries)
    np.testing.assert_allclose(pages.attention(queries), expected, rtol=1e-5, atol=1e-5)
    assert (pages.array[:, 0] == UNTOUCHED).all(), "another layer's rows were written"


@FORMATS
def test_E_a_page_gives_the_bits_of_a_float32_page_with_its_values(format: KvFormat) -> None:
    pages = Pages([70, 5], head_dim=64, format=format)
    assert pages.write() == -1
    queries = normal(75, 6, 64)
    wide = Pages([70, 5], head_dim=64)
    wide.keys, wide.values = pages.stored()
    assert wide.write() == -1
    np.testing.assert_array_equal(pages.attention(queries), wide.attention(queries))


@FORMATS
@pytest.mark.parametrize("window", [1, 5, 32, 33, 200])
def test_a_window_hides_what_came_before_it(format: KvFormat, window: int) -> None:
    pages = Pages([90, 40], block_size=8, format=format)
    assert pages.write() == -1
    queries = normal(130, 4, 32)
    expected = plain_attention(pages, *pages.stored(), queries, window)
    np.testing.assert_allclose(pages.attention(queries, window=window), expected, rtol=1e-5, atol=1e-5)


def test_pages_before_the_window_are_not_read() -> None:
    pages = Pages([96], block_size=16)
    pages.write()
    queries = normal(96, 4, 32)
    expected = pages.attention(queries, slice(95, 96), window=32)
    pages.array[pages.tables[:4]] = UNTOUCHED
    pages.tables[:4] = 0  # as a table looks whose pages have been released
    np.testing.assert_array_equal(pages.attention(queries, slice(95, 96), window=32), expected)


@FORMATS
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("size", [0.0, 3.0, 60.0])
def test_a_sink_takes_its_share_of_every_row(format: KvFormat, window: int, size: float) -> None:
    """From none to nearly all of it."""
    pages = Pages([1, 90, 40], block_size=8, format=format)
    assert pages.write() == -1
    queries, sinks = normal(131, 4, 32), normal(4) * np.float32(size)
    expected = plain_attention(pages, *pages.stored(), queries, window, sinks)
    np.testing.assert_allclose(pages.attention(queries, window=window, sinks=sinks), expected, rtol=1e-5, atol=1e-5)


def test_a_sink_of_minus_infinity_is_none() -> None:
    pages = Pages([50])
    pages.write()
    queries = normal(50, 4, 32)
    sinks = np.full(4, -np.inf, np.float32)
    np.testing.assert_allclose(pages.attention(queries, sinks=sinks), pages.attention(queries), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    format=st.sampled_from(KvFormat),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    head_dim=st.sampled_from([8, 20, 32, 64]),
    block_size=st.sampled_from([1, 5, 16]),
    window=st.sampled_from([0, 0, 7, 40]),
    has_sinks=st.booleans(),
)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(
    format: KvFormat,
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int,
    has_sinks: bool,
) -> None:
    pages = Pages(lengths, block_size, kv_heads, head_dim, format)
    assert pages.write() == -1
    queries = normal(sum(lengths), kv_heads * group, head_dim)
    sinks = normal(kv_heads * group) if has_sinks else None
    together = pages.attention(queries, window=window, sinks=sinks)
    for row in range(0, len(queries), 3):
        alone = pages.attention(queries, slice(row, row + 1), window, sinks)
        np.testing.assert_array_equal(alone, together[row : row + 1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (40, 256)])
def test_the_number_of_threads_does_not_show(heads: int, head_dim: int) -> None:
    pages = Pages([600], kv_heads=8, head_dim=head_dim, format=KvFormat.Q8_0)
    pages.write()
    queries = normal(600, heads, head_dim)
    alone = pages.attention(queries, slice(590, 600))
    for count in (2, 3, 8):
        _kernels.set_num_threads(count)
        np.testing.assert_array_equal(pages.attention(queries, slice(590, 600)), alone)


def mixed_keys(pages: Pages, queries: Floats, value_dim: int, scale: float) -> Floats:
    format, layer, tables, starts, positions = pages.format_and_places
    out = np.full((*queries.shape[:2], value_dim), np.nan, np.float32)
    _kernels.attention(queries, pages.array, format, layer, tables, starts, positions, 0, out, None, scale)
    return out


@pytest.mark.usefixtures("threads")
@FORMATS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"), [(16, 1, 576, 512), (6, 1, 28, 20), (4, 2, 64, 64), (3, 3, 40, 1)]
)
def test_keys_may_be_values_too(heads: int, kv_heads: int, head_dim: int, value_dim: int, format: KvFormat) -> None:
    pages = Pages([1, 3, 77], 16, kv_heads, head_dim, format, 64, keys_are_values=True)
    assert pages.write() == -1
    queries, scale = normal(81, heads, head_dim), 0.3 * head_dim**-0.5
    result = mixed_keys(pages, queries, value_dim, scale)
    keys, _ = pages.stored()
    expected = plain_attention(pages, keys, keys[:, :, :value_dim], queries * np.float32(scale * head_dim**0.5))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert (pages.array[:, 0] == UNTOUCHED).all(), "another layer's rows were written"
    for count in (2, 3):
        _kernels.set_num_threads(count)
        np.testing.assert_array_equal(mixed_keys(pages, queries, value_dim, scale), result)


def test_pages_and_values_have_to_agree() -> None:
    pages, separate = Pages([20], head_dim=8, keys_are_values=True), Pages([20], head_dim=8)
    with pytest.raises(ValueError, match=r"third dimension of kv_pages \(keys, values if there are\) is 1, expected 2"):
        _kernels.write_kv(pages.keys, pages.keys, pages.array, *pages.format_and_places)
    with pytest.raises(ValueError, match="is 2, expected 1"):
        _kernels.write_kv(separate.keys, None, separate.array, *separate.format_and_places)
    with pytest.raises(ValueError, match="the head size of out is 9, expected 1 to 8"):
        mixed_keys(pages, normal(20, 2, 8), 9, 1.0)
    with pytest.raises(ValueError, match="the head size of out is 7, expected 8"):
        mixed_keys(separate, normal(20, 2, 8), 7, 1.0)


def test_huge_scores_take_the_largest() -> None:
    pages = Pages([40], kv_heads=1, head_dim=16)
    pages.write()
    queries = pages.keys * np.float32(1e4)
    scores = np.einsum("qhd,khd->qk", queries.astype(np.float64), pages.keys)
    scores[~np.tri(40, dtype=bool)] = -np.inf
    np.testing.assert_allclose(pages.attention(queries), pages.values[scores.argmax(axis=1)], rtol=1e-5)


@FORMATS
@pytest.mark.parametrize("head_dim", [16, 64, 40])
def test_E6_E7_rows_are_written_as_the_reference_encodes_them_and_no_others(format: KvFormat, head_dim: int) -> None:
    pages = Pages([19], head_dim=head_dim, format=format)
    pages.keys[0], pages.keys[1] = 1000, 1
    pages.write()
    where = pages.array[pages.tables, LAYER]  # [pages, 2, block_size, heads, bytes]
    for part, rows in enumerate((pages.keys, pages.values)):
        in_order = where[:, part].reshape(-1, *where.shape[3:])
        np.testing.assert_array_equal(in_order[:19], encode(rows, format))
        assert (in_order[19:] == UNTOUCHED).all()
    np.testing.assert_allclose(decode(where[0, 0, 1], format, head_dim), 1.0, atol=0.005)


@FORMATS
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e7])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_E8_values_that_a_format_cannot_hold_name_their_row_and_nothing_is_written(
    format: KvFormat, value: float, part: str
) -> None:
    pages = Pages([19], format=format)
    getattr(pages, part)[7, 1, 31] = value
    if np.isfinite(value) and format in (KvFormat.FLOAT32, KvFormat.BFLOAT16):
        assert pages.write() == -1
    else:
        assert pages.write() == 7
        assert (pages.array == UNTOUCHED).all()


def test_arguments_outside_are_refused() -> None:
    pages = Pages([20], head_dim=8)
    pages.write()
    queries = normal(20, 2, 8)
    format, layer, tables, starts, positions = pages.format_and_places
    out = np.empty_like(queries)
    with pytest.raises(ValueError, match="page 99, expected less than 3"):
        _kernels.attention(queries, pages.array, format, layer, np.array([1, 99], np.uint32), starts, positions, 0, out)
    with pytest.raises(ValueError, match="row 16 at position 16 lies outside its block table"):
        _kernels.attention(queries, pages.array, format, layer, tables[:1], starts, positions, 0, out)
    with pytest.raises(ValueError, match="layer is 2, expected 0 <= layer < 2"):
        _kernels.attention(queries, pages.array, format, 2, tables, starts, positions, 0, out)
    with pytest.raises(ValueError, match="position -1"):
        _kernels.attention(queries, pages.array, format, layer, tables, starts, positions - 1, 0, out)
    with pytest.raises(ValueError, match="the window is -1, expected at least 0"):
        _kernels.attention(queries, pages.array, format, layer, tables, starts, positions, -1, out)
    with pytest.raises(ValueError, match=r"the length of sinks \(query heads\) is 3, expected 2"):
        _kernels.attention(queries, pages.array, format, layer, tables, starts, positions, 0, out, normal(3))
    with pytest.raises(ValueError, match=r"the last dimension of kv_pages \(bytes of a head\) is 32, expected 34"):
        _kernels.attention(queries, pages.array, _kernels.KV_Q8_0, layer, tables, starts, positions, 0, out)
    with pytest.raises(ValueError, match="unknown KV page format 5"):
        _kernels.attention(queries, pages.array, 5, layer, tables, starts, positions, 0, out)
    with pytest.raises(ValueError, match="the head size is 1025, expected 1 to 1024"):
        wide = normal(20, 2, 1025)
        _kernels.attention(wide, pages.array, format, layer, tables, starts, positions, 0, wide)
