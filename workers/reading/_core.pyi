"""The C extension's interface; core/lanes.h, core/read.h and core/xxh3.h hold the descriptions."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

END_OF_FILE: int  # in the place of an errno

class Lanes:
    """`count` threads; with none, whoever calls `take` and `read` is the lane. `direct_alignment`: if by O_DIRECT.
    `memory`: the arena of the slots, in which the lanes publish what they have read, on behalf of `process`."""

    def __init__(
        self,
        slots: Sequence[npt.NDArray[np.uint8]],
        count: int,
        direct_alignment: int = 0,
        memory: Buffer | None = None,
        process: int = 0,
    ) -> None: ...
    @property
    def fd(self) -> int: ...
    def know(self, id: int, pieces: Buffer, transposed: Buffer, format: int, /) -> None:
        """Where an expert lies, for all loads of it from now on. Rows of int64. `pieces`: (number of its chunk, file
        descriptor, offset there, start in the slot, bytes); those of a chunk follow one another in the file.
        `transposed`: (start in the slot, rows, columns, bytes of a value), as the file has the matrix."""

    def begin(
        self, id: int, slot: int, urgent: bool, began: int, expected: int | None, source: int, warm_start: bool, /
    ) -> None:
        """Of an expert that is known. `expected`: its checksum, if there is one. The rest is for who publishes it:
        core/load.h."""

    def promote(self, id: int, /) -> bool: ...
    def cancel(self, id: int, /) -> None: ...
    def tell_of_all(self, all: bool, /) -> None:
        """Whether `fd` tells of every finished load; else it leaves out those that were published while there are more
        urgent ones to come."""

    def take_finished(self) -> list[tuple[int, bool, int, bool, int, int, int]]:
        """(id, published, checksum, cancelled, error, its file descriptor, its offset)."""

    def close(self) -> None: ...
    def take(self) -> tuple[int, int] | None: ...
    def read(self, id: int, chunk: int, /) -> None: ...

def xxh3_64(data: npt.NDArray[np.uint8], instruction_set: str, /) -> int: ...
def instruction_sets() -> list[str]: ...
