#!/usr/bin/env python3
"""Train the small OLMoE model that ships in runtime/model/trained.

    python scripts/train_model.py --tokens 40e6 --deadline 09:00      # starts, or resumes after a kill
    python scripts/train_model.py --export-only                       # last checkpoint -> --out
    python scripts/train_model.py --evaluate                          # loss of --out over the held-out files
    python scripts/train_model.py --start-from runtime/model/trained --tokens 8e6 --learning-rate 1e-3
    python scripts/train_model.py --list-heldout

Needs torch, which the package itself does not. The corpus and its held-out files are those of
training_corpus.py; the model, its optimiser and the run are in training/. Everything that is not exported
(tokens, tokenizer, checkpoint) lives in --work-dir. The checkpoint is replaced atomically and holds all
that the next step depends on, so a killed run continues where it was.

The exported folder has Hugging Face's OLMoE layout with one tensor per expert matrix, in bfloat16;
`transformers.AutoModelForCausalLM.from_pretrained` loads it as it is.

With glibc, about a tenth of the time goes into page faults unless freed memory is kept:
    export GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296
    GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

# Two threads each differentiate their own half of a batch; a thread's own operations must not fork further.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch
from training.evaluation import evaluate
from training.exported_model import export
from training.model import ModelShape
from training.run import Recipe, Training
from training_corpus import heldout_files

TRAINED_DIR = Path(__file__).resolve().parent.parent / "runtime" / "model" / "trained"


def parse_deadline(text: str) -> float:
    """Seconds since the epoch of the next HH:MM (UTC), or of an ISO date and time (UTC unless it says)."""
    if len(text) == 5 and text[2] == ":":
        now = datetime.now(UTC)
        moment = now.replace(hour=int(text[:2]), minute=int(text[3:]), second=0, microsecond=0)
        return (moment if moment > now else moment + timedelta(days=1)).timestamp()
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, resume, export or evaluate the small OLMoE model.")
    parser.add_argument("--work-dir", type=Path, default=Path.home() / ".cache" / "hotset" / "train")
    parser.add_argument("--out", type=Path, default=TRAINED_DIR, help="folder of the exported model")
    parser.add_argument("--tokens", type=float, default=40e6, help="token budget of the whole run")
    parser.add_argument("--deadline", default="9999-01-01", help="HH:MM (UTC) or ISO time of the end, if earlier")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the weights and of the order of windows")
    parser.add_argument("--start-from", type=Path, help="begin with the weights and tokenizer of an exported folder")
    parser.add_argument("--window", type=int, default=1024, help="context of --evaluate")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--export-only", action="store_true", help="write the last checkpoint to --out")
    only.add_argument("--evaluate", action="store_true", help="loss of --out over the held-out files")
    only.add_argument("--list-heldout", action="store_true", help="print the held-out files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.list_heldout:
        print(*heldout_files(), sep="\n")
        return 0
    if options.evaluate:
        torch.set_num_threads(options.threads)
        print(json.dumps(evaluate(options.out, options.window), indent=2))
        return 0
    if options.export_only:
        if not (options.work_dir / "checkpoint.pt").exists():
            print(f"no checkpoint.pt in {options.work_dir}: name the run's --work-dir", file=sys.stderr)
            return 1
        export(options.work_dir, options.out)
        return 0
    options.work_dir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(learning_rate=options.learning_rate, seed=options.seed)
    training = Training(recipe, ModelShape(), options.work_dir, options.threads, options.start_from)
    training.run(int(options.tokens), parse_deadline(options.deadline))
    export(options.work_dir, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
