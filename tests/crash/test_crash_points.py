"""A process is killed in the middle of an operation on the arena: recovery leaves nothing broken and nobody waiting.

A pager's recovery is killed in turn, and begun again. Here a process is killed after each instruction that changed
the arena; scripts/sanitize kills after every instruction.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from race.native import ROOT, compile_program, write_arena_image

from hotset.shm.geometry import Geometry, SlotClass

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere an atomic operation is a loop that stepping never lets finish"
)
GEOMETRY = Geometry(num_layers=1, num_experts=6, num_processes=3, pins_per_process=2, slot_classes=(SlotClass(3, 64),))
NOT_PERMITTED = 77


@pytest.fixture(scope="module")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program and the arena image for it."""
    folder = tmp_path_factory.mktemp("crash")
    lanes = f"-I{ROOT / 'workers' / 'reading' / 'core'}"
    checksum = str(ROOT / "workers" / "reading" / "core" / "xxh3.c")
    program = compile_program(
        Path(__file__).parent / "crash_stepper.c", folder / "crash_stepper", "-O2", lanes, checksum
    )
    return program, write_arena_image(folder / "arena", GEOMETRY)


def run(stepper: tuple[Path, Path], operation: str) -> tuple[str, dict[str, int]]:
    """The first violation in words (or nothing), and the counts."""
    done = subprocess.run([*stepper, operation], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == NOT_PERMITTED:
        pytest.skip("this system does not allow ptrace")
    assert done.returncode in (0, 1), done.stderr
    *words, counts = done.stdout.splitlines()
    return "".join(words), {key: int(value) for key, value in (field.split("=") for field in counts.split())}


@pytest.mark.parametrize(
    ("operation", "stores"),
    [
        ("worker-waits", 2),
        ("worker-joins-a-wait", 1),
        ("worker-computes", 3),
        ("worker-asks-for-a-prefetch", 1),
        ("worker-counts-an-activation", 3),
        ("pager-replaces", 20),
        ("pager-prefetches", 15),
        ("pager-loads-two-at-once", 30),
        ("pager-gives-way", 25),
        ("pager-is-overtaken", 20),
        ("pager-lane-publishes", 25),  # 29 to 31: a histogram's extremes may move or not
        ("pager-lane-publishes-what-was-overtaken", 20),
        ("pager-lane-ends-what-was-given-up", 25),
        ("pager-lane-read-something-else", 20),
        ("pager-pages-out", 5),
        ("pager-gives-up", 10),
        ("pager-withdraws", 3),
        ("pager-recovers", 8),
        ("pager-recovers-two-loads", 8),
    ],
)
def test_a_kill_at_any_point_is_recovered_from(stepper: tuple[Path, Path], operation: str, stores: int) -> None:
    violation, counts = run(stepper, operation)
    assert counts["violations"] == 0, violation
    assert counts["points"] > stores, "the operation did not do what it is meant to"
    assert counts["recovery_points"] > 0 or operation.startswith("worker")


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("planted-clears-bit-before-loading", "R3: a request is lost"),
        ("planted-publishes-before-the-last-word", "R1: a slot's bytes are not those of its expert"),
        ("planted-reads-into-an-evicting-slot", "R1: a slot's bytes are not those of its expert"),
        ("planted-recovery-frees-before-it-requests", "R3: a request is lost"),
        ("planted-drops-an-overtaken-prefetch", "R3: a request is lost"),
        ("planted-lane-publishes-what-was-given-up", "R1: a slot's bytes are not those of its expert"),
        ("planted-gives-up-silently", "R3: a request is lost"),
        ("planted-activation-in-two-stores", "A1: a score is neither with nor without the activation"),
    ],
)
def test_a_planted_mistake_is_found(stepper: tuple[Path, Path], operation: str, expected: str) -> None:
    violation, counts = run(stepper, operation)
    assert counts["violations"] > 0
    assert expected in violation
