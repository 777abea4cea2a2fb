"""What an expert's weights are called, and what their bytes say, in every format that they may be stored in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_factory import MXFP4, make_model
from stored_weights import FORMATS, SINGLE_VALUES, StoredWeights

from hotset.runtime.experts.weights import ExpertWeights, PartLayout
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.shm.layout import WeightFormat

SHAPE = (6, 64)


def stored(format: WeightFormat) -> tuple[ExpertWeights, StoredWeights]:
    """An expert with one matrix, behind a part that makes its bytes begin anywhere."""
    matrix = StoredWeights.of(np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32), format)
    slot = np.concatenate([np.zeros(6, np.uint8), matrix.bytes, np.full(99, 7, np.uint8)])
    parts = [PartLayout("before", 0, 6, "uint8", (6,))]
    if format is WeightFormat.MXFP4:
        numbers = SHAPE[0] * SHAPE[1] // 2
        parts.append(PartLayout("gate", 6, numbers, "uint8", (SHAPE[0], SHAPE[1] // 32, 16)))
        parts.append(PartLayout("gate_scales", 6 + numbers, SHAPE[0] * 2, "uint8", (SHAPE[0], SHAPE[1] // 32)))
    else:
        parts.append(PartLayout("gate", 6, len(matrix.bytes), format.name.lower(), SHAPE))
    return ExpertWeights(format.name.lower(), tuple(parts), slot), matrix


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_values_are_those_that_the_stored_bytes_stand_for(format: WeightFormat) -> None:
    weights, matrix = stored(format)
    assert np.array_equal(weights.float32("gate"), matrix.values)
    assert weights["gate"].nbytes + sum(weights[name].nbytes for name in weights if name == "gate_scales") == len(
        matrix.bytes
    )
    assert np.array_equal(weights.bytes, np.concatenate([np.zeros(6, np.uint8), matrix.bytes]))
    assert weights.format == format.name.lower() and len(weights) == len([*weights]) and "gate" in weights


@pytest.mark.parametrize("format", SINGLE_VALUES, ids=lambda format: format.name)
def test_single_values_are_arrays_of_them_and_bfloat16_its_bits(format: WeightFormat) -> None:
    weights, matrix = stored(format)
    assert weights["gate"].dtype == matrix.array.dtype and np.array_equal(weights["gate"], matrix.array)


def names(folder: Path, **options: object) -> dict[str, tuple[int, ...]]:
    parts = Checkpoint.open(make_model(folder, **options)).expert_parts(1, 2)  # type: ignore[arg-type]
    return {part.name: part.shape for part in parts}


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2"])
def test_families_have_gate_up_and_down_whatever_they_call_them(tmp_path: Path, family: str) -> None:
    assert names(tmp_path / "model", family=family) == {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}


def test_gpt_oss_has_rows_of_gate_and_up_in_one_matrix_and_biases(tmp_path: Path) -> None:
    biases = {"gate_up_bias": (48,), "down_bias": (32,)}
    assert names(tmp_path / "model", family="gpt_oss") == {"gate_up": (48, 32), "down": (32, 24)} | biases


def test_of_mxfp4_the_scales_are_a_part_of_their_own(tmp_path: Path) -> None:
    found = names(tmp_path / "model", family="gpt_oss", intermediate_size=32, quantization_config=MXFP4)
    assert found == {
        "gate_up": (64, 1, 16),
        "gate_up_scales": (64, 1),
        "gate_up_bias": (64,),
        "down": (32, 1, 16),
        "down_scales": (32, 1),
        "down_bias": (32,),
    }
