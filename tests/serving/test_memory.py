"""Experts live in the arena's slots and nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import serving_run
from memory_cgroup import MemoryCgroup
from model_factory import make_model
from serving_run import Report, Request

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


def test_all_processes_together_stay_within_memory_under_a_hard_limit(large_model: Path) -> None:
    limit = 320 * MEBIBYTE
    settings = {"memory": limit, "workers": 2, "max_num_seqs": 4}
    request = Request(model=str(large_model), settings=settings, prompts=4, prompt_tokens=200, max_tokens=32)
    try:
        group = MemoryCgroup(limit)
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    with group:
        command = group.command(sys.executable, "-P", serving_run.__file__, msgspec.json.encode(request).decode())
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert group.oom_kills == 0
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.restarts == 0
    assert report.evictions > 0  # the experts did not all fit: there was something to hold
    assert report.largest_pss <= limit
    assert 0.95 * limit < report.planned_nbytes <= limit  # what was given is used
    assert report.io_nbytes <= 1.01 * report.loaded_nbytes  # nothing is read that was not missed
    assert report.disk_nbytes <= report.io_nbytes
    assert [len(tokens) for tokens in report.token_ids] == [32] * 4


def test_what_experts_leave_over_goes_to_kv_pages() -> None:
    with Backend(workers=1, memory="1GiB") as backend:
        geometry = backend.plan.geometry
        assert geometry.num_slots == geometry.num_layers * geometry.num_experts
        assert geometry.num_pages == backend.config.max_num_seqs * geometry.max_blocks


def test_kv_pages_take_a_quarter_of_what_is_left_where_experts_do_not_all_fit(large_model: Path) -> None:
    with Backend(large_model, workers=1, memory="300MiB") as backend:
        split = backend.plan.memory
        assert 0.2 < split.kv_pages / (split.kv_pages + split.experts) <= 0.26
