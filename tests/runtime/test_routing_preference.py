"""Where the strength of a preference comes from: the user, the model's calibration, or a cautious default."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hotset.runtime.config import BackendConfig
from hotset.runtime.model.calibration import Calibration, UnusableCalibration
from hotset.runtime.routing_preference import DEFAULT_STRENGTHS, RoutingPreference, routing_preference

FOUND = Calibration("resnorm", 0.0625, "perplexity +0.25 %", "a text", 1000, "affinity", [])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def preference(model: Path, **options: object) -> RoutingPreference:
    return routing_preference(BackendConfig(model=str(model), **options))  # type: ignore[arg-type]


def test_what_the_user_gives_goes_first(model: Path) -> None:
    FOUND.save(model)
    assert preference(model, routing="resnorm", resnorm_strength=0.3) == RoutingPreference("resnorm", 0.3, "given")
    assert preference(model, routing="resnorm", resnorm_strength=0.0).strength == 0
    assert preference(model, routing="off") == RoutingPreference("off", 0.0, "given")


def test_then_what_the_calibration_found_for_that_policy(model: Path) -> None:
    FOUND.save(model)
    found = preference(model, routing="resnorm")
    assert found == RoutingPreference("resnorm", 0.0625, "calibrated")
    assert found.router_options() == {"resnorm_strength": 0.0625}
    assert "calibration" in str(found)
    assert preference(model, routing="range").source == "default"


def test_then_a_default_that_says_so(model: Path) -> None:
    for policy in ("bonus", "range", "mass", "resnorm", "substitute"):
        found = preference(model, routing=policy)
        assert (found.strength, found.source) == (DEFAULT_STRENGTHS[policy], "default")
        assert "not calibrated" in str(found)


def test_other_weights_have_another_calibration(model: Path) -> None:
    FOUND.save(model)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert preference(model, routing="resnorm").source == "default"


def test_a_model_may_bring_its_calibration_and_the_users_own_goes_first(model: Path) -> None:
    brought = msgspec.structs.replace(FOUND, strength=0.125)
    (model / "calibration-resnorm.json").write_bytes(msgspec.json.encode(brought))
    assert preference(model, routing="resnorm") == RoutingPreference("resnorm", 0.125, "calibrated")
    assert preference(model, routing="range").source == "default"
    FOUND.save(model)
    assert preference(model, routing="resnorm").strength == 0.0625


def test_a_brought_calibration_that_cannot_be_read_is_an_error(model: Path) -> None:
    (model / "calibration-resnorm.json").write_bytes(b"{")
    with pytest.raises(UnusableCalibration, match=f"{model}/calibration-resnorm.json cannot be used"):
        preference(model, routing="resnorm")


def test_a_calibration_is_read_as_it_was_saved(model: Path) -> None:
    FOUND.save(model)
    assert Calibration.load(model, "resnorm") == FOUND
    assert Calibration.load(model, "range") is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be used"),
        (msgspec.json.encode({**msgspec.to_builtins(FOUND), "strength": -1.0}), "it is for resnorm with strength -1"),
        (msgspec.json.encode({**msgspec.to_builtins(FOUND), "strength": 1.5}), "it is for resnorm with strength 1.5"),
        (msgspec.json.encode({**msgspec.to_builtins(FOUND), "routing": "range"}), "it is for range"),
    ],
)
def test_a_calibration_that_cannot_be_read_is_an_error(model: Path, content: bytes, problem: str) -> None:
    path = FOUND.save(model)
    path.write_bytes(content)
    with pytest.raises(UnusableCalibration, match=problem):
        preference(model, routing="resnorm")
    assert preference(model, routing="resnorm", resnorm_strength=0.1).source == "given"


def test_the_strength_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_bonus is 0\.2 and routing is 'off', expected .* routing 'bonus'"):
        BackendConfig(routing="off", cache_bonus=0.2)
    with pytest.raises(ValueError, match=r"mass_budget is 1\.5, expected a number from 0 to 1"):
        BackendConfig(routing="mass", mass_budget=1.5)
