"""Pages of KV rows in this process's own memory, for programs that embed only the cache, and for its tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import check_instance, integer
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
        self.bytes[destination] = self.bytes[source]

    def clear_pages(self, pages: Sequence[int]) -> None:
        self.bytes[list(pages)] = 0

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
        """Stores encoded rows of tokens from `offset` on; they must fit the page."""
        if offset + rows.shape[1] > self.layout.block_size:
            raise ValueError(
                f"{rows.shape[1]} tokens from offset {offset} do not fit a page of {self.layout.block_size}"
            )
        self.bytes[page, layer, :, offset : offset + rows.shape[1]] = rows

    def read_rows(self, pages: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], layer: int) -> Floats:
        """Keys and values of tokens, float32 `[2, tokens, num_kv_heads, head_dim]`."""
        rows = self.bytes[pages, layer, :, offsets].swapaxes(0, 1)
        return decode(rows, self.layout.format, self.layout.head_dim)


def _numbers(name: str, given: npt.ArrayLike) -> Floats:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given!r}, expected numbers") from None
