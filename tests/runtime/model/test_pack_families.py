"""Packs of every family, experts as they are: the same bits in other places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_models import FAMILY_MODELS, make_family_model, prompts
from in_process_model import InProcessModel

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.expert_formats import CannotPack
from hotset.runtime.model.pack import Packer
from hotset.runtime.model.pack_manifest import PackManifest


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_pack_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", name, dtype="bfloat16")
    Packer(model, tmp_path / "packed").run(lambda finished: None)
    ids = prompts()[0]
    packed = InProcessModel(tmp_path / "packed")
    np.testing.assert_array_equal(packed.logits(ids), InProcessModel(model).logits(ids))
    manifest = PackManifest.of(tmp_path / "packed")
    assert manifest is not None
    for layer, experts in manifest.experts.items():
        for expert, block in enumerate(experts):
            parts = packed.checkpoint.expert(layer, expert).parts
            assert (parts[0].offset, sum(part.nbytes for part in parts)) == (block.offset, block.nbytes)


def test_the_experts_of_gpt_oss_stay_as_they_are(tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", "gpt_oss in mxfp4", dtype="bfloat16")
    with pytest.raises(CannotPack, match="pack them without a format"):
        Packer(model, tmp_path / "packed", "q8_0")
    Packer(model, tmp_path / "packed").run(lambda finished: None)
    assert Checkpoint.open(tmp_path / "packed").expert_dtype(0, 0) == "mxfp4"


def test_a_calibration_stays_with_the_weights_that_it_is_of(tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", next(iter(FAMILY_MODELS)), dtype="bfloat16")
    (model / "calibration-substitute.json").write_text("{}")
    Packer(model, tmp_path / "packed").run(lambda finished: None)
    assert not list((tmp_path / "packed").glob("calibration*"))
