#!/usr/bin/env python3
"""Record what transformers computes for the shipped model, for tests on machines without torch.

    python scripts/record_reference.py     # after every change of runtime/model/trained; needs torch, transformers

Writes tests/data/reference_logits.npz: for three texts of 256 tokens the logits of 64 columns, and logsumexp and argmax
of all of them, at every position; for three prompts the 200 tokens that follow greedily. Computed in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import textwrap
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (textwrap, argparse, random)  # modules of the standard library; their token ids are recorded, not their names
NUM_TOKENS = 256
NUM_COLUMNS = 64
PROMPTS = (
    "def fibonacci(n):",
    "import os\n",
    "class Stack:\n    def __init__(self):\n",
    "for line in file:\n",
    "try:\n    value = int(text)\n",
    "def main():\n",
    "import sys\nimport ",
    "    if not isinstance(",
    "@property\ndef name(self):\n",
    "with open(path) as",
)
NUM_PROMPTS = 3
NUM_GREEDY = 200
MIN_MARGIN = 1e-3  # below, the two best tokens are too close for two correct implementations to agree


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], float]:
    """NUM_GREEDY token ids after `prompt`, whatever ends the text, and the least margin of the best over the second."""
    new, cache, chosen, margin = torch.tensor([prompt]), None, [], float("inf")
    for _ in range(NUM_GREEDY):
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        chosen.append(int(best.indices[0]))
        new = torch.tensor([chosen[-1:]])
    return chosen, margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runtime" / "model" / "trained")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "data" / "reference_logits.npz")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager").eval()
    texts = [tokenizer(Path(str(module.__file__)).read_text()[:2500])["input_ids"][:NUM_TOKENS] for module in TEXTS]
    with torch.no_grad():
        logits = np.stack([model(torch.tensor([ids])).logits[0].numpy() for ids in texts])
    columns = np.sort(np.random.default_rng(0).choice(logits.shape[2], NUM_COLUMNS, replace=False))
    highest = logits.max(axis=2)
    exponentials = np.exp((logits - highest[..., None]).astype(np.float64))

    prompts, continuations = [], []
    for prompt in PROMPTS:
        if len(prompts) == NUM_PROMPTS:
            break
        ids = tokenizer(prompt)["input_ids"]
        continuation, margin = greedy(model, ids)
        print(f"margin {margin:.1e} after {prompt!r}")
        if margin >= MIN_MARGIN:
            prompts.append(ids)
            continuations.append(continuation)
    if len(prompts) < NUM_PROMPTS:
        raise SystemExit(f"only {len(prompts)} prompts keep a margin of {MIN_MARGIN}; add prompts to PROMPTS")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.out,
        model_sha256=hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest(),
        token_ids=np.array(texts, np.int32),
        columns=columns.astype(np.int32),
        logits=logits[..., columns],
        logsumexp=(highest + np.log(exponentials.sum(axis=2))).astype(np.float32),
        argmax=logits.argmax(axis=2).astype(np.int32),
        prompts=np.concatenate(prompts).astype(np.int32),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        continuations=np.array(continuations, np.int32),
    )
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
