"""scripts/make_model.py: checkpoints of any size with random weights, for what does not depend on the text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    done = make_model(tmp_path, "--top-k", "33")
    assert done.returncode == 2 and "--top-k is 33, more than the 32 experts" in done.stderr
    assert not list(tmp_path.iterdir())
