"""`hotset inspect`: what a model is and what of it fits, without loading it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from model_factory import make_model

from hotset.runtime import Backend
from hotset.runtime.config import RoutingPolicy
from hotset.runtime.inspection import inspect_model
from hotset.runtime.model.calibration import Calibration


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "hotset.runtime.cli", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 experts of 4.5 MiB, 450 MiB in all."""
    sizes = {"hidden_size": 1024, "intermediate_size": 768, "num_experts": 50, "num_heads": 8}
    folder = make_model(tmp_path / "model", family="qwen3_moe", head_dim=64, **sizes)
    return folder


def test_one_screen_of_facts_and_what_fits(folder: Path) -> None:
    done = run(str(folder), "--memory", "100MiB", "--memory", "512MiB")
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) <= 24
    for text in (
        "Qwen3-MoE (Qwen3MoeForCausalLM)",
        "2 of 50 per token and layer",
        "4.5 MiB, bfloat16",
        "100MiB",
        "needs",
    ):
        assert text in done.stdout


def test_a_damaged_calibration_is_no_business_of_it(folder: Path) -> None:
    (expected,) = inspect_model(folder, ["512MiB"]).fits
    for routing in get_args(RoutingPolicy):
        path = Calibration.path(folder, routing)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    (fit,) = inspect_model(folder, ["512MiB"]).fits
    assert fit == expected


def test_what_fits_is_what_a_backend_plans(folder: Path) -> None:
    (fit,) = inspect_model(folder, ["512MiB"]).fits
    assert 0.3 < fit.share < 1
    assert fit.resident == round(fit.share * 100)


def test_a_token_takes_a_page_in_each_group_of_layers(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 64, "sliding_window": 20}
    folder = make_model(tmp_path / "model", family="gpt_oss", **sizes)  # every other layer has the window
    (fit,) = inspect_model(folder, ["4GiB"]).fits
    assert fit.kv_tokens == 16 * 64, "sixteen sequences as long as the context"


def test_the_shipped_model_as_json(trained_folder: Path) -> None:
    report = json.loads(run("--json", "--memory", "256MiB").stdout)
    assert report["family"] == "OLMoE"
    assert (report["num_layers"], report["num_experts"], report["num_experts_in_all"]) == (4, 32, 128)
    with Backend(memory="256MiB") as backend:
        assert report["fits"][0]["resident"] == backend.plan.geometry.num_slots
    assert report["fits"][0]["share"] == 1.0


def test_the_features_of_deepseek(tmp_path: Path) -> None:
    inspection = inspect_model(make_model(tmp_path / "model", family="deepseek_v3"), [])
    assert inspection.features == (
        "1 layers without experts",
        "latent attention of rank 32",
        "experts of 2 of 4 groups per token",
        "a shared expert",
    )
    assert inspection.kv_nbytes_per_token == 2 * (32 + 4) * 4


def test_a_refusal_is_one_sentence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["DeepseekV32ForCausalLM"]}))
    done = run(str(folder))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "cannot run the architecture DeepseekV32ForCausalLM" in done.stderr


def test_nothing_is_imported_that_only_serving_needs(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hotset.runtime.inspection import inspect_model\n"
        f"inspect_model(Path({str(folder)!r}), ['4GiB'])\n"
        "print([name for name in ('tokenizers', 'gguf', 'jinja2', 'hotset.runtime.backend') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    [["inspect", ""], ["calibrate", "", "--max-ppl", "1%"], ["pack", "", "x"], ["generate", "--model=", "--prompt=x"]],
)
def test_a_model_without_a_name_is_not_the_one_that_ships(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hotset.runtime.cli", *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "model is '', expected the path" in done.stderr and done.stderr.count("\n") == 1
