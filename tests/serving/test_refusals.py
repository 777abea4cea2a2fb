"""Bad settings and bad models: one clear sentence, a non-zero exit, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from instances import PROMPTS

from hotset.runtime import (
    Backend,
    BackendError,
    BudgetTooSmall,
    CorruptCheckpoint,
    MemoryTooSmall,
    ModelNotFound,
    RequestFailed,
    SamplingParams,
    UnsupportedModel,
)
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.checkpoint import Checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRAINED_MODEL, tmp_path / "model"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "hotset.runtime.cli", "generate", "--prompt", "x", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_unknown_model_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        Backend(tmp_path / "nowhere")
    done = run("--model", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hotset: ") and "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_name_of_the_hub_is_told_to_be_fetched_first(tmp_path: Path) -> None:
    """A path like any other, for nothing is downloaded; who comes from other servers does not know that."""
    with pytest.raises(ModelNotFound, match=r"no model folder at .*/Qwen/Qwen3-30B-A3B; .*`hf download"):
        Backend("Qwen/Qwen3-30B-A3B")


def test_a_budget_too_small_says_what_is_needed() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        Backend(workers=2, expert_budget="5%")
    assert (caught.value.slots, caught.value.needed) == (6, 9)
    done = run("--workers", "2", "--expert-budget", "100KB")
    assert done.returncode == 1 and "at least 9 are needed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_read_lanes_than_the_budget_has_slots_for_are_refused() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        Backend(workers=2, expert_budget="7.1%", read_lanes=2)
    assert (caught.value.slots, caught.value.needed) == (9, 10)
    with Backend(workers=2, expert_budget="7.1%") as backend:
        assert backend.plan.read_lanes == 1
    with Backend(workers=2, expert_budget="50%") as backend:
        assert backend.plan.read_lanes == 4


def test_memory_that_cannot_hold_the_rest_says_what_is_needed() -> None:
    with pytest.raises(MemoryTooSmall) as caught:
        Backend(workers=2, memory="100MiB")
    needed = caught.value.needed
    assert str(needed) in str(caught.value)
    with pytest.raises(MemoryTooSmall):
        Backend(workers=2, memory=needed - 1)
    with Backend(workers=2, memory=needed) as backend:
        assert backend.plan.memory.total <= needed


def test_memory_and_expert_budget_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="memory is '1GiB' and expert_budget is '50%', expected one of the two"):
        Backend(memory="1GiB", expert_budget="50%")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("expert_budget", "half"),
        ("expert_budget", "0%"),
        ("expert_budget", "101%"),
        ("expert_budget", 0.5),
        ("memory", 1.5),
        ("workers", 0),
        ("read_lanes", 0),
        ("read_lanes", "four"),
        ("routing", "psychic"),
        ("eviction", "random"),
        ("eviction", "td+affinity"),
        ("kv_cache_dtype", "int3"),
        ("max_model_len", 10**9),
        ("kv_cache_memory", "1"),
        ("name", "a/b"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"is .*expected"):
        Backend(**{setting: value})


def test_an_unknown_setting_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="expert_buget"):
        Backend(expert_buget="50%")


def test_more_shared_memory_than_there_is_names_both_numbers() -> None:
    space = os.statvfs("/dev/shm")
    free = space.f_bavail * space.f_frsize
    with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory but /dev/shm has \d+ bytes free"):
        Backend(kv_cache_memory=free + 2**30)


def test_a_truncated_checkpoint_is_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        Backend(model)


def test_a_checkpoint_of_noise_is_refused(model: Path) -> None:
    (model / "model.safetensors").write_bytes(os.urandom(1 << 16))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        Backend(model)


def test_an_unknown_architecture_is_refused_by_name(model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("OlmoeForCausalLM", "UnheardOfForCausalLM"))
    with pytest.raises(UnsupportedModel, match="UnheardOfForCausalLM"):
        Backend(model)


def test_weights_that_change_under_a_running_instance_fail_the_request_and_not_the_instance(model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, routing="off", ignore_eos=True)
    with Backend(model, workers=1, expert_budget="10%") as backend:
        for prompt in PROMPTS:
            backend.generate(prompt, params)  # by now nearly every expert was read once, and most were evicted
        checkpoint = Checkpoint.open(model)
        for expert in range(32):
            location = checkpoint.expert(3, expert).parts[2]
            with location.file.open("r+b") as file:
                file.seek(location.offset)
                file.write(b"\x11" * location.nbytes)
        with pytest.raises(RequestFailed, match=r"expert \d+ of layer 3 cannot be loaded"):
            backend.generate(PROMPTS, params)
        assert backend.stats().worker_restarts == 0
