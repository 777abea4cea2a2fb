#!/usr/bin/env python3
"""Record what transformers computes for the small models of tests/family_models.py, for machines without torch.

    python scripts/record_family_logits.py     # after every change of these models; needs torch, transformers

Writes tests/data/family_logits.npz: for every model the digest of its weights, and for each prompt the logits of some
columns at every position. Computed in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from family_models import FAMILY_MODELS, RECORDING, make_family_model, prompts, recorded_columns, weights_digest


@torch.no_grad()
def main() -> None:
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(FAMILY_MODELS):
            folder = make_family_model(Path(scratch) / str(number), name)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            logits = [model.eval()(torch.tensor([ids.tolist()])).logits[0].numpy() for ids in prompts()]
            recorded[f"{name}: weights"] = weights_digest(folder)
            recorded[f"{name}: logits"] = np.stack(logits)[..., recorded_columns()]
    np.savez_compressed(RECORDING, **recorded)
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes, {len(FAMILY_MODELS)} models")


if __name__ == "__main__":
    main()
