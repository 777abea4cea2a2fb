"""The report on the gates: what fails, what could not be measured, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRAINED = str(SCRIPTS.parent / "runtime" / "model" / "trained")
COMMAND = (
    f"--paged-model {TRAINED} --paged-memory 1GiB --rounds 1 --tokens 12 --quality-tokens 128 --texts 2 --window 32"
)
SMALL = [*COMMAND.split(), "--json"]
# A loaded machine, or a tiny sample, must not decide: every gate is opened wide, but for the one that is planted.
OPEN = "hit-rate=0 perplexity=1e9 step-p99=1e9 memory=1e9 throughput=0 prefetch=0 page-in-p99=1e9 route-mean=1e9 "
OPEN += "route-p99=1e9 routes=0"


def gates(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS / "benchmarks")])
    return subprocess.run(
        [sys.executable, "-P", "-m", "laboratory.gates", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))


def test_one_threshold_that_cannot_be_met_fails_the_report() -> None:
    wanted = [f"--wanted={change}" for change in [*OPEN.split(), "hit-rate=101"]]
    done = gates(*SMALL, *wanted)
    assert done.returncode == 1, done.stderr
    found = {gate["name"]: gate for gate in json.loads(done.stdout)["gates"]}
    assert len(found) == 10
    assert [name for name, gate in found.items() if gate["passed"] is False] == ["hit-rate"]
    assert 0 < found["hit-rate"]["measured"] < 101 and found["hit-rate"]["wanted"] == 101
    for gate in found.values():
        assert gate["how"] and (gate["measured"] is None) == (gate["passed"] is None)


@pytest.mark.usefixtures("scripts_importable")
def test_what_could_not_be_measured_does_not_pass() -> None:
    from laboratory.gates import TARGETS, Found, exit_status, judge

    met = [judge(target, Found(target.wanted, "")) for target in TARGETS]
    assert exit_status(met) == 0
    unmeasured = judge(TARGETS[0], Found(None, "no disk"))
    assert unmeasured.passed is None
    assert exit_status([*met, unmeasured]) == 2
    failed = [
        judge(target, Found(target.wanted + (1 if target.sense == "<=" else -1), ""))
        for target in TARGETS
    ]  # fmt: skip
    assert not any(gate.passed for gate in failed)
    assert exit_status([unmeasured, failed[0]]) == 1


@pytest.mark.usefixtures("scripts_importable")
@pytest.mark.parametrize(("waiting", "measured"), [(0.6, 2.0), (0.4, None)])
def test_throughput_is_judged_only_where_paging_is_the_bottleneck(
    monkeypatch: pytest.MonkeyPatch, waiting: float, measured: float | None
) -> None:
    from laboratory import gate_measurements

    off = SimpleNamespace(
        tokens_per_second=10.0,
        waiting=waiting,
        paging=0.9,
        page_ins=3,
        paging_p99_us=4000.0,
        step_ms=[10.0, 300.0],
        loaded_nbytes=5,
        disk_nbytes=5,
    )
    chosen = SimpleNamespace(tokens_per_second=20.0, step_ms=[10.0, 150.0])
    monkeypatch.setattr(
        gate_measurements, "_serve", lambda _, model, settings, limit: off if "routing" in settings else chosen
    )
    options = SimpleNamespace(paged_model=Path("some-model"), paged_memory="2GiB", paged_rounds=3)
    found = gate_measurements.measure_paging(options)  # type: ignore[arg-type]
    assert found["throughput"].measured == measured
    assert f"{waiting:.0%} of the time" in found["throughput"].how
    assert "p99 of all steps 150 ms, routing off 300 ms" in found["throughput"].how
    assert found["page-in-p99"].measured == 4.0


@pytest.mark.usefixtures("scripts_importable")
def test_the_made_model_can_be_served_and_is_removed() -> None:
    from laboratory.paged_model import made_model

    with made_model("--layers", "1") as folder:
        assert len(Checkpoint.open(folder, ModelConfig.load(folder)).expert_ids) == 128
    assert not folder.exists()


@pytest.mark.usefixtures("scripts_importable")
def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not() -> None:
    from laboratory.paged_model import BUILD, made_model

    left = BUILD / "paged-left"
    left.mkdir(parents=True, exist_ok=True)
    (left / "model-00001-of-00003.safetensors").touch()
    with made_model("--layers", "1") as used:
        assert not left.exists()
        with made_model("--layers", "1") as other:
            assert used != other and Checkpoint.open(used)


@pytest.mark.usefixtures("scripts_importable")
def test_without_the_paged_model_what_needs_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from laboratory import gate_measurements
    from laboratory.paged_model import made_model

    too_large = partial(made_model, "--expert-size", "100000000000")
    monkeypatch.setattr(gate_measurements, "made_model", too_large)
    found = gate_measurements.measure_paging(SimpleNamespace(paged_model=None))  # type: ignore[arg-type]
    for name in ("throughput", "page-in-p99"):
        assert found[name].measured is None and "more bytes, its disk has" in found[name].how


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--paged-memory", "much"], "--paged-memory is 'much', expected bytes"),
        (["--budget", "7"], "the budget is '7', expected a percentage"),
        (["--rounds", "0"], "--rounds is '0', expected an integer of at least 1"),
        (["--tokens", "many"], "--tokens is 'many', expected an integer of at least 1"),
        (["--model", ""], "--model is '', expected the path"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    done = gates(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "nan%"], "--budget is 'nan', expected numbers"),
        (["--budget", "5%"], "the expert budget 5% holds 6 experts, but at least"),
        (["--quality-tokens", "99999999"], "tokens, expected at least 1000"),
        (["--paged-model", "/nonexistent"], "There is no model folder at /nonexistent"),
        (["--paged-model", TRAINED, "--paged-memory", "1MiB"], "memory is 1MiB, expected at least"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(arguments: list[str], message: str) -> None:
    done = gates(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("hit-rate=nan", "--wanted is 'hit-rate=nan', expected NAME=NUMBER"),
        ("speed=1", "there is no gate 'speed', expected one of hit-rate"),
        ("hit-rate", "NAME=NUMBER"),
    ],
)
def test_thresholds_of_no_gate_are_refused(wanted: str, message: str) -> None:
    done = gates("--wanted", wanted)
    assert done.returncode == 1 and message in done.stderr
