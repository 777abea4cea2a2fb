"""Read-only access to the KV pages of a running instance, for tools and for processes that do not serve them."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Layout, Section
from hotset.shm.segment import SHM_FOLDER, check_header, segment_name


class StalePage(Exception):
    """The page was handed out again: it has `current` as its generation, the reader kept `kept`."""

    def __init__(self, page: int, kept: int, current: int) -> None:
        super().__init__(f"page {page} was handed out again: its generation is {current}, expected {kept}")
        self.page = page
        self.kept = kept
        self.current = current


class PageReader:
    """Maps the arena of `instance` without the right to write it.

    A page's bytes are those of one owner for as long as its generation stays the same: take the generation, copy,
    and check it again.
    """

    def __init__(self, instance: str, geometry: Geometry) -> None:
        name = segment_name(instance)
        fd = os.open(SHM_FOLDER / name.lstrip("/"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._mmap = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        layout = Layout(geometry)
        check_header(self._mmap, layout, name)
        self._page_nbytes = geometry.page_nbytes
        self._pages = layout.view(self._mmap, Section.KV_PAGES)
        self._generations = layout.view(self._mmap, Section.PAGE_GENERATIONS)

    def generation(self, page: int) -> int:
        """How often the page was handed out; ordered after the bytes read before and before those read next."""
        return _core.page_generation(self._generations, page)

    def view(self, page: int) -> npt.NDArray[np.uint8]:
        """The page's bytes in the arena itself, [page_nbytes], not writable; they change with the page's owner."""
        return self._pages[page, : self._page_nbytes].view(np.uint8)

    def read(self, page: int, generation: int) -> bytes:
        """A copy of the page's bytes as its owner of `generation` has them; raises `StalePage` if it is gone."""
        copy = self.view(page).tobytes()
        # After the copy: the generation changes before the next owner can write, so if it still is the old one now,
        # every byte of the copy is the old owner's.
        current = self.generation(page)
        if current != generation:
            raise StalePage(page, generation, current)
        return copy
