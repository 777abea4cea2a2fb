"""Experts live in the arena's slots and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from model_factory import make_model

from hotset.runtime import Backend, SamplingParams

MEBIBYTE = 2**20


def private_bytes(pid: int) -> int:
    """Memory that only this process has: Private_Clean and Private_Dirty of all its mappings."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", rollup, re.M))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 MiB of experts: 2 layers x 32 experts x 3 MiB."""
    return make_model(
        tmp_path_factory.mktemp("large"),
        hidden_size=256,
        intermediate_size=2048,
        num_layers=2,
        num_experts=32,
        experts_per_token=4,
        dtype="bfloat16",
        tokenizer=True,
    )


def test_no_process_holds_a_second_copy_of_the_experts(large_model: Path) -> None:
    with Backend(large_model, workers=2, expert_budget="100%") as backend:
        idle = {pid: private_bytes(pid) for pid in [*backend.worker_pids, backend.pager_pid]}
        backend.generate([list(range(1, 200)), list(range(50, 250))], SamplingParams(max_tokens=8, ignore_eos=True))
        stats = backend.stats()
        assert stats.resident_expert_bytes > 150 * MEBIBYTE  # nearly all were used
        for pid, before in idle.items():
            grown = private_bytes(pid) - before
            assert grown < 30 * MEBIBYTE, f"process {pid} has {grown} bytes more than before the experts came"


def test_experts_in_memory_never_exceed_the_budget(large_model: Path) -> None:
    budget = 60 * MEBIBYTE
    with Backend(large_model, workers=2, expert_budget=budget) as backend:
        backend.generate([list(range(1, 100)), list(range(50, 150))], SamplingParams(max_tokens=8, ignore_eos=True))
        stats = backend.stats()
        assert stats.evictions > 0
        assert stats.resident_expert_bytes <= stats.expert_budget_bytes <= budget
