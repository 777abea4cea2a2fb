#!/usr/bin/env python3
"""Record what transformers computes for the small models of tests/family_models.py, for machines without torch.

    python scripts/record_family_logits.py     # after every change of these models; needs the extras test, reference

Writes tests/data/family_logits.npz. For every model: the digest of its weights, and for each prompt the logits of some
columns at every position, computed in float32. For those of BF16_MODELS, which are stored in bfloat16, also whole rows
of logits computed in bfloat16, where no choice of an expert is close (see in_process_model.py, clear_choices).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from family_models import (
    BF16_MODELS,
    CLEAR_SHARE,
    FAMILY_MODELS,
    RECORDING,
    make_family_model,
    prompts,
    recorded_columns,
    short_prompts,
    weights_digest,
)
from in_process_model import InProcessModel

MAX_POSITIONS = 64  # recorded of a model


def main() -> None:
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(FAMILY_MODELS):
            folder = make_family_model(Path(scratch) / str(number), name)
            recorded[f"{name}: weights"] = weights_digest(folder)
            logits = transformers_logits(folder, torch.float32, np.stack(prompts()))
            recorded[f"{name}: logits"] = logits[..., recorded_columns()].numpy()
        for name in BF16_MODELS:
            folder = make_family_model(Path(scratch) / f"{name} in bfloat16", name, dtype="bfloat16")
            positions = clear_positions(folder)
            logits = transformers_logits(folder, torch.bfloat16, short_prompts())
            rows = logits[positions[:, 0], positions[:, 1]]
            recorded[f"{name}: bfloat16 weights"] = weights_digest(folder)
            recorded[f"{name}: bfloat16 positions"] = positions
            recorded[f"{name}: bfloat16 logits"] = rows.view(torch.uint16).numpy()
            print(f"{name}: {len(positions)} positions in bfloat16, {(positions[:, 1] > 0).sum()} behind others")
    np.savez_compressed(RECORDING, **recorded)
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes, {len(FAMILY_MODELS)} models")


@torch.no_grad()
def transformers_logits(folder: Path, dtype: torch.dtype, token_ids: NDArray[np.int32]) -> torch.Tensor:
    """[prompts, tokens, vocab_size] for token ids [prompts, tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return model(torch.tensor(token_ids, dtype=torch.long)).logits


def clear_positions(folder: Path) -> NDArray[np.uint16]:
    """(prompt, position) of up to MAX_POSITIONS rows behind clear choices; the later ones of a prompt first, which have
    more before them.
    """
    model = InProcessModel(folder)
    clear = np.stack([model.clear_choices(ids, CLEAR_SHARE)[1] for ids in short_prompts()])
    found = np.argwhere(clear)
    latest_first = found[np.argsort(-found[:, 1], kind="stable")]
    return latest_first[:MAX_POSITIONS].astype(np.uint16)


if __name__ == "__main__":
    main()
