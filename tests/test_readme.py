"""The programs in README.md run as they are printed, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readme_shows_a_backend_a_router_a_kv_cache_and_an_expert_cache() -> None:
    shown = {name for program in PROGRAMS for name in re.findall(r"\w+", program)}
    assert {"Backend", "ExpertCache", "MemoryAwareRouter", "PagedKvCache"} <= shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_as_it_is_printed(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    printed = re.findall(r"print\(.*\)  # (.*)", program)
    assert done.stdout.splitlines()[: len(printed)] == printed
