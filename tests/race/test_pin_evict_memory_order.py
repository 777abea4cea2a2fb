"""Pin and check against evict and read pins, on real processors: with seq_cst nobody computes with mixed weights."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from race.native import compile_program, write_arena_image

from hotset.shm.geometry import Geometry, SlotClass

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="the two processes never meet on one processor"
)
SOURCE = Path(__file__).parent / "pin_evict.c"
GEOMETRY = Geometry(num_layers=1, num_experts=2, num_processes=2, pins_per_process=1, slot_classes=(SlotClass(1, 512),))


def run(folder: Path, seconds: float, *flags: str) -> dict[str, int]:
    program = compile_program(SOURCE, folder / "pin_evict", "-O2", *flags)
    image = write_arena_image(folder / "arena", GEOMETRY)
    done = subprocess.run(
        [program, image, str(seconds)], capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return {key: int(value) for key, value in (field.split("=") for field in done.stdout.split())}


def test_a_reader_never_sees_mixed_weights(tmp_path: Path) -> None:
    counts = run(tmp_path, 3)
    assert counts["mixed"] == 0
    assert min(counts["uses"], counts["misses"], counts["loads"], counts["refused"]) > 1000, counts


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere release and acquire may be strong enough")
def test_release_and_acquire_in_place_of_seq_cst_are_caught(tmp_path: Path) -> None:
    """The negative control: the same code, only weaker. It shows that the test above could fail."""
    assert run(tmp_path, 30, "-DRELEASE_ACQUIRE")["mixed"] > 0
