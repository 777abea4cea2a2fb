"""scripts/make_model.py: checkpoints of any size with random weights, for what does not depend on the text."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from instances import wait_until

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.workers.compute.transformer import as_float32

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_model.py"
SMALL = ("--layers", "2", "--experts", "32", "--top-k", "4", "--hidden-size", "256", "--expert-size", "32")


def make_model(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), str(folder), *SMALL, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v2"])
def test_the_same_arguments_write_the_same_model(tmp_path: Path, family: str) -> None:
    for name in ("one", "two"):
        done = make_model(tmp_path / name, "--family", family)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    Checkpoint.open(tmp_path / "one")


def test_the_gate_prefers_some_experts_and_depends_on_the_token(tmp_path: Path) -> None:
    make_model(tmp_path, "--skew", "1")
    checkpoint = Checkpoint.open(tmp_path)
    hidden = as_float32(checkpoint.dense("model.embed_tokens.weight"))
    hidden /= np.sqrt((hidden**2).mean(axis=1, keepdims=True))
    logits = hidden @ as_float32(checkpoint.dense("model.layers.0.mlp.gate.weight")).T
    selected = np.argsort(-logits, axis=1)[:, :4]
    shares = np.sort(np.bincount(selected.ravel(), minlength=32))[::-1] / selected.size
    assert 0.45 < shares[:8].sum() < 0.9  # a quarter of the experts; 0.25 if all were alike
    assert len(np.unique(np.sort(selected, axis=1), axis=0)) > 500  # of 2,048 tokens


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (("--top-k", "33"), 2, "--top-k is 33, more than the 32 experts"),
        (("--seed", "-1"), 2, "--seed is -1, expected at least 0"),
        (("--skew", "nan"), 2, "--skew is nan, expected a number of at least 0"),
        (("--experts", "1025"), 1, "num_experts is 1025; hotset routes up to 1024"),
        (("--family", "deepseek_v2", "--layers", "1"), 1, "leave no layer with experts"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: tuple[str, ...], status: int, sentence: str) -> None:
    done = make_model(tmp_path, *options)
    assert done.returncode == status and sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def stopped_while_it_writes(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit status and what was said."""
    command = [sys.executable, "-P", str(SCRIPT), str(folder), "--layers", "16"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: any(path.stat().st_size > 1_000_000 for path in folder.glob("*.safetensors")))
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    return running.returncode, errors


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int, said: str) -> None:
    code, errors = stopped_while_it_writes(tmp_path / "new" / "model", number)
    assert code == status and f"make_model: {said}" in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())  # the folders neither, for there were none
    (tmp_path / "empty").mkdir()
    stopped_while_it_writes(tmp_path / "empty", number)
    assert not list((tmp_path / "empty").iterdir())


def test_what_a_killed_run_left_is_no_model_and_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    code, _ = stopped_while_it_writes(killed, signal.SIGKILL)
    assert code == -signal.SIGKILL and list(killed.glob("*.safetensors"))
    (killed / "model-00002-of-00002.safetensors").touch()  # of a larger one
    with pytest.raises(HotsetError):
        Checkpoint.open(killed)
    for folder in (killed, tmp_path / "new"):
        assert make_model(folder).returncode == 0
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in (tmp_path / "new").iterdir())


def test_a_model_and_half_a_download_are_not_written_over(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        folder = tmp_path / name.removesuffix(".safetensors")
        folder.mkdir()
        for path in (folder / "config.json", folder / name):
            path.write_text("mine")
        done = make_model(folder)
        assert done.returncode == 2 and "expected none, an empty one, or what a run left that was killed" in done.stderr
        assert {path.read_text() for path in folder.iterdir()} == {"mine"}


def test_a_disk_that_is_too_small_and_a_folder_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    done = make_model(tmp_path / "model", "--expert-size", "100000000000")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "more bytes, its disk has" in done.stderr
    (tmp_path / "file").touch()
    done = make_model(tmp_path / "file" / "model")
    assert done.returncode == 1 and "make_model:" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
