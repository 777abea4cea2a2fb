"""scripts/hitrate: traces that it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
        (["--budgets", "101"], "a budget of 101 % of 16 experts is 16.16 slots, expected 1 to 16"),
        (["--budgets", "many"], "--budgets is 'many', expected numbers"),
        (["--budgets", "nan"], "--budgets is 'nan', expected numbers of at least 0"),
        (["--budgets", "25,inf"], "--budgets is '25,inf', expected numbers of at least 0"),
        (["--batch", "0"], "--batch is '0', expected numbers of at least 1"),
        (["--batch", "500"], "has 141 tokens, expected at least 500"),
        (["--experts", "4"], "expected ids below --experts 4"),
        (["--experts", "0"], "--experts is 0, expected an integer from 1 to 1024"),
        (["--pool", "shared", "--budgets", "6.25", "--policies", "lru"], "expected at least 4"),
    ],
)
def test_bad_arguments_end_in_one_sentence(trace: Path, arguments: list[str], sentence: str) -> None:
    done = hitrate("--trace", trace, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") == 1


IDS = np.zeros((4, 2, 2), np.int64)
"""Of 4 tokens, 2 layers, top-2."""


def with_expert(expert: int) -> npt.NDArray[np.int64]:
    ids = IDS.copy()
    ids[3, 1, 0] = expert
    return ids


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"expert_ids": IDS}, "has no seq_len, expected expert_ids and seq_len"),
        ({"seq_len": [4]}, "has no expert_ids, expected expert_ids and seq_len"),
        (
            {"expert_ids": IDS[:0], "seq_len": IDS[:0, 0, 0]},
            "int64 (0, 2, 2), expected integers [tokens, layers, top_k]",
        ),
        ({"expert_ids": IDS[0], "seq_len": [2]}, "int64 (2, 2), expected integers [tokens, layers, top_k], not empty"),
        ({"expert_ids": IDS / 2, "seq_len": [4]}, "float64 (4, 2, 2), expected integers [tokens, layers, top_k]"),
        ({"expert_ids": with_expert(-1), "seq_len": [4]}, "has expert -1, expected ids from 0 to 1023"),
        ({"expert_ids": with_expert(70_000), "seq_len": [4]}, "has expert 70000, expected ids from 0 to 1023"),
        ({"expert_ids": IDS, "seq_len": [5]}, "sums to 5, expected the 4 tokens"),
        ({"expert_ids": IDS, "seq_len": [6, -2]}, "has -2, expected how many tokens a text has, at least 0"),
        ({"expert_ids": IDS, "seq_len": [3.5, 0.5]}, "seq_len of {} is float64 (2,), expected integers [texts]"),
        ({"expert_ids": IDS, "seq_len": 4}, "seq_len of {} is int64 (), expected integers [texts]"),
        ({"expert_ids": IDS, "seq_len": np.array([4, None])}, "is not a whole .npz file of numbers"),
    ],
)
def test_arrays_that_are_no_trace_are_refused(tmp_path: Path, arrays: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, **arrays)
    done = hitrate("--trace", path)
    assert sentence.format(path) in done.stderr
    assert str(path) in done.stderr and done.stderr.count("\n") == 1
    assert done.returncode == 1 and done.stdout == ""


def test_a_batch_that_no_record_can_hold_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "long.npz", expert_ids=np.zeros((30_000, 1, 2), np.uint8), seq_len=[30_000])
    done = hitrate("--trace", tmp_path / "long.npz", "--batch", 22_000, "--policies", "lru", "--budgets", 100)
    assert done.stderr == "hitrate: --batch is 22000, expected at most 21842 tokens a step with top-2\n"


def damaged(content: bytes, how: str) -> bytes:
    match how:
        case "text":
            return b"expert_ids"
        case "empty":
            return b""
        case "cut":
            return content[: len(content) // 2]
        case "a byte changed":
            return content[:300] + bytes([content[300] ^ 1]) + content[301:]
        case _:
            raise ValueError(how)


@pytest.mark.parametrize("how", ["text", "empty", "cut", "a byte changed"])
def test_files_that_are_no_whole_archives_are_refused(trace: Path, how: str) -> None:
    trace.write_bytes(damaged(trace.read_bytes(), how))
    done = hitrate("--trace", trace)
    assert str(trace) in done.stderr and " .npz file" in done.stderr and done.stderr.count("\n") == 1
    assert done.returncode == 1


def test_one_array_is_no_trace(tmp_path: Path) -> None:
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, IDS)
    assert "is neither an .npz file nor a folder with events.csv" in hitrate("--trace", file.name).stderr


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ("layer,requested_experts\n", "is empty, expected a line per layer and step"),
        (
            "layer,requested_experts\n0,0 1\n3,0 1\n",
            "layer 3 with the experts [0, 1], expected the 3 layers of 4 experts",
        ),
        ("layer,requested_experts\n0,0 -1\n", "layer 0 with the experts [0, -1], expected the 3 layers of 4"),
        ("layer,requested_experts\n0\n", "is not an event list"),
        ("layer,requested_experts\n0,many\n", "is not an event list"),
    ],
)
def test_event_lists_that_are_none_are_refused(tmp_path: Path, events: str, sentence: str) -> None:
    toy(tmp_path)
    (tmp_path / "events.csv").write_text(events)
    done = hitrate("--trace", tmp_path)
    assert sentence in done.stderr and done.stderr.count("\n") == 1 and done.returncode == 1


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "is not an event list" in hitrate("--trace", tmp_path).stderr
    for path in (tmp_path / "nothing.npz", "/dev/zero"):
        assert f"there is no trace at {path}" in hitrate("--trace", path).stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trace", ""], "--trace is '', expected the path"),
        (["--trace", "x", "--plot", "x.jpg"], "--plot is 'x.jpg', expected a file that ends in .png"),
        (["--trace", "x", "--plot", "/nonexistent/x.png"], "expected a file in a folder that is there"),
        (["--model", "x", "--results", "/nonexistent/x"], "expected a file in a folder that is there"),
        (["--trace", "x", "--threads", "1"], "--threads is for --model"),
    ],
)
def test_options_are_refused_before_hours_of_measuring(arguments: list[str], sentence: str) -> None:
    done = hitrate(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_the_help_says_what_a_trace_is() -> None:
    text = hitrate("--help").stdout
    assert "expert_ids  [tokens, layers, top_k]" in text and "seq_len     [texts]" in text and "integers" in text
