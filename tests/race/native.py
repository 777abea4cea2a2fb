"""Builds the C programs of the tests and the arena they work on.

An arena image is the memory of a fresh private arena: the layout is declared in Python alone, so the C programs are
given one instead of laying it out themselves.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g")


def compile_program(source: Path, program: Path, *flags: str) -> Path:
    """Compiles one C file against the core's headers; the compiler's words are in the error if it fails."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]
    command += [f"-I{ROOT / 'shm' / 'core'}", f"-I{Path(__file__).parent}", str(source), "-o", str(program)]
    command += ["-lm", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return program


def write_arena_image(path: Path, geometry: Geometry) -> Path:
    segment = Segment.private(geometry)
    with memoryview(segment._mmap) as memory:
        path.write_bytes(memory)
    segment.close()
    return path


if __name__ == "__main__":  # for scripts: native.py IMAGE '{"num_layers": 1, "num_experts": 8}'
    write_arena_image(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Geometry))
