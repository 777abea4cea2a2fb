"""scripts/hitrate: traces that it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What scripts/hitrate runs once everything is set up.
COMMAND = [sys.executable, "-P", "-m", "laboratory.hitrate"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPTS)}


def hitrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three sequences, 2 layers of 16 experts, top-2; popular experts differ between sequences."""
    random = np.random.default_rng(0)
    lengths = np.array([40, 70, 31], np.int32)
    ids = np.concatenate([
        random.choice(16, 6, replace=False)[random.permuted(np.tile(np.arange(6), (n, 2, 1)), axis=2)[..., :2]]
        for n in lengths
    ])  # fmt: skip
    path = tmp_path / "trace.npz"
    np.savez(path, expert_ids=ids.astype(np.uint8), seq_len=lengths)
    return path


def toy(folder: Path) -> Path:
    lines = ["event_index,scheduler_step,layer,requested_experts,misses,hits"]
    for step, experts in enumerate(["0 1", "0 2", "0 1", "0 3", "0 1"]):
        lines += [f"{3 * step + layer},{step},{layer},{experts},0,0" for layer in range(3)]
    (folder / "events.csv").write_text("\n".join(lines))
    (folder / "manifest.json").write_text('{"model": {"num_layers": 3, "num_experts_per_layer": 4}}')
    return folder


def test_an_event_list_is_replayed_as_it_was_recorded(tmp_path: Path) -> None:
    done = hitrate("--trace", toy(tmp_path), "--policies", "lru", "--budgets", 50, "--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["slots"], row["hits"], row["misses"]) == (2, 12, 18)


def test_every_policy_budget_and_batch_is_in_the_report(trace: Path) -> None:
    done = hitrate("--trace", trace, "--budgets", "25,50", "--policies", "lru,td,min", "--batch", "1,3", "--json")
    report = json.loads(done.stdout)
    rows = {(row["batch"], row["policy"], row["budget"]): row for row in report["rows"]}
    assert len(rows) == 2 * 3 * 2
    for (batch, policy, budget), row in rows.items():
        assert row["hits"] + row["misses"] <= 141 // batch * batch * 2 * 2
        assert row["hit_rate"] == round(100 * row["hits"] / (row["hits"] + row["misses"]), 2)
        assert row["hits"] <= rows[batch, "min", budget]["hits"]
        assert row["hits"] <= rows[batch, policy, 50]["hits"]


def test_the_table_has_a_row_per_policy(trace: Path) -> None:
    done = hitrate("--trace", trace, "--budgets", "25,50")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("lru", "lfu", "affinity@bypass", "td", "min", "25 %", "batch 1"):
        assert word in done.stdout


def test_a_plot_is_a_png(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (scripts/setup plots)")
    picture = tmp_path / "hits.png"
    done = hitrate("--trace", trace, "--budgets", "25,50", "--policies", "lru,min", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policies", "clock"], "eviction is 'clock', expected one of lru, lfu"),
        (["--budgets", "0"], "a budget of 0 % of 16 experts is 0 slots, expected 1 to 16"),
        (["--budgets", "many"], "--budgets is 'many', expected numbers"),
        (["--batch", "0"], "--batch is 0, expected numbers of at least 1"),
        (["--batch", "500"], "has 141 tokens, expected at least 500"),
        (["--experts", "4"], "expected ids below --experts 4"),
        (["--pool", "shared", "--budgets", "6.25", "--policies", "lru"], "expected at least 4"),
    ],
)
def test_bad_arguments_end_in_one_sentence(trace: Path, arguments: list[str], sentence: str) -> None:
    done = hitrate("--trace", trace, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", expert_ids=np.zeros((2, 2, 2), np.uint8))
    assert "has no seq_len, expected expert_ids and seq_len" in hitrate("--trace", tmp_path / "other.npz").stderr
    np.savez(tmp_path / "short.npz", expert_ids=np.zeros((2, 2, 2), np.uint8), seq_len=[3])
    assert "sums to 3, expected the 2 tokens" in hitrate("--trace", tmp_path / "short.npz").stderr
    assert "is not an event list" in hitrate("--trace", tmp_path).stderr
    assert "No such file" in hitrate("--trace", tmp_path / "nothing.npz").stderr
