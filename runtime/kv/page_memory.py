"""Pages of KV rows in this process's own memory, for programs that embed only the cache, and for its tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import check_instance, integer, integers
from hotset.shm.kv_page_format import Bytes, Floats, decode, encode
from hotset.shm.kv_page_format import KvFormat as KvFormat  # for who makes a layout
from hotset.shm.kv_page_format import KvPageLayout as KvPageLayout


class KvPageMemory:
    """The bytes of pages 0 ... `num_pages` (0 is never used), as `KvPageLayout` lays them out.

    Args:
        layout: what a page looks like, with values that are stored.
        num_pages: pages that the cache hands out.
    """

    def __init__(self, layout: KvPageLayout, num_pages: int) -> None:
        check_instance("layout", layout, KvPageLayout)
        num_pages = integer("num_pages", num_pages, 0)
        if layout.keys_are_values:
            raise ValueError("the layout stores no values, expected one of both keys and values")
        self.layout = layout
        self.bytes: Bytes = np.zeros((num_pages + 1, *layout.shape), np.uint8)

    @property
    def num_pages(self) -> int:
        """Without page 0."""
        return len(self.bytes) - 1

    @property
    def page_nbytes(self) -> int:
        return self.layout.page_nbytes

    def copy_page(self, source: int, destination: int) -> None:
        self._check_page(source)
        self._check_page(destination)
        self.bytes[destination] = self.bytes[source]

    def clear_pages(self, pages: Sequence[int]) -> None:
        numbers = integers("pages", pages)
        for page in numbers:
            self._check_page(page)
        self.bytes[numbers] = 0

    def _check_page(self, page: int) -> None:
        if type(page) is not int or not 0 <= page < len(self.bytes):
            integer("page", page, 0, self.num_pages)

    def encode_rows(self, keys: npt.ArrayLike, values: npt.ArrayLike) -> Bytes:
        """Keys and values of consecutive tokens, each `[tokens, num_kv_heads, head_dim]`, as they lie in pages.

        Returns:
            uint8 `[2, tokens, num_kv_heads, head_nbytes]`.

        Raises:
            ValueError: another shape. UnrepresentableValue: the position is (keys or values, token, head, dimension).
        """
        rows = _numbers("keys", keys), _numbers("values", values)
        expected = (self.layout.num_kv_heads, self.layout.head_dim)
        for name, given in zip(("keys", "values"), rows, strict=True):
            if given.ndim != 3 or given.shape[1:] != expected or len(given) != len(rows[0]):
                raise ValueError(f"{name} have the shape {given.shape}, expected (tokens, {expected}) as both have")
        return encode(np.stack(rows), self.layout.format)

    def check_layer(self, layer: int) -> None:
        """Raises `ValueError` if the pages have no such layer."""
        integer("layer", layer, 0, self.layout.num_layers - 1)

    def write_rows(self, page: int, offset: int, layer: int, rows: Bytes) -> None:
        """Stores rows of tokens as `encode_rows` gives them from `offset` on; they must fit the page."""
        self._check_page(page)
        self.check_layer(layer)
        integer("offset", offset, 0)
        shape = (2, "tokens", self.layout.num_kv_heads, self.layout.head_nbytes)
        given = _array(rows)
        if (
            given is None
            or given.dtype != np.uint8
            or given.ndim != 4
            or (given.shape[0], *given.shape[2:]) != (shape[0], *shape[2:])
        ):
            raise ValueError(f"rows is {_described(rows)}, expected uint8 ({', '.join(map(str, shape))})")
        if offset + rows.shape[1] > self.layout.block_size:
            raise ValueError(
                f"{rows.shape[1]} tokens from offset {offset} do not fit a page of {self.layout.block_size}"
            )
        self.bytes[page, layer, :, offset : offset + rows.shape[1]] = rows

    def read_rows(self, pages: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], layer: int) -> Floats:
        """Keys and values of the tokens at `offsets` of `pages`, float32 `[2, tokens, num_kv_heads, head_dim]`."""
        self.check_layer(layer)
        given = _indices("pages", pages, len(self.bytes)), _indices("offsets", offsets, self.layout.block_size)
        if len(given[0]) != len(given[1]):
            raise ValueError(f"pages are {len(given[0])} and offsets {len(given[1])}, expected one offset to each page")
        pages, offsets = given
        rows = self.bytes[pages, layer, :, offsets].swapaxes(0, 1)
        return decode(rows, self.layout.format, self.layout.head_dim)


def _array(given: Any) -> npt.NDArray[Any] | None:
    return cast("npt.NDArray[Any]", given) if isinstance(given, np.ndarray) else None


def _described(given: Any) -> str:
    array = _array(given)
    return repr(given) if array is None else f"{array.dtype} {array.shape}"


def _indices(name: str, given: Any, end: int) -> npt.NDArray[np.integer]:
    found = np.asarray(given)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {_described(given)}, expected integers [tokens]")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < end:
        raise ValueError(f"{name} are from {found.min()} to {found.max()}, expected 0 <= number < {end}")
    return found.astype(np.intp)


def _numbers(name: str, given: npt.ArrayLike) -> Floats:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given!r}, expected numbers") from None
