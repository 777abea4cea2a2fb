"""What memory gives to a program that does nothing but read it: the floor of everything that is bound by memory."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt


class PlainRead:
    """Sums an array, in `threads` threads; one thread is the caller's own. Compiled into `folder` for this machine."""

    def __init__(self, folder: str, threads: int) -> None:
        source, library = Path(__file__).with_name("memory_read.c"), Path(folder) / "memory_read.so"
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
        self._sum = ctypes.CDLL(str(library)).sum_words
        self._sum.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._sum.restype = ctypes.c_uint64
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads)

    def __call__(self, memory: npt.NDArray[np.uint8]) -> None:
        words = memory.nbytes // 8 // self._threads
        starts = [memory.ctypes.data + 8 * words * thread for thread in range(self._threads)]
        if self._threads == 1:
            self._sum(starts[0], words)
        else:
            list(self._executor.map(lambda start: self._sum(start, words), starts))
