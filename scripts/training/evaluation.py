"""How well an exported model predicts the held-out files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from training.exported_model import load_exported
from training.model import next_token_loss
from training.tokenizer import encode_documents
from training_corpus import heldout_files, read_texts


@torch.no_grad()
def evaluate(folder: Path, window: int) -> dict[str, float]:
    """Loss of an exported folder over the whole held-out files, in windows that do not overlap: each
    predicts `window` tokens, the first of them from one token of context."""
    model = load_exported(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = list(read_texts(heldout_files()))
    stream = encode_documents(tokenizer, texts).long()
    total, predicted = 0.0, 0
    for start in range(0, len(stream) - 1, window):
        part = stream[start : start + window + 1].unsqueeze(0)
        count = part.shape[1] - 1
        total += float(next_token_loss(model, part)[0]) * count
        predicted += count
    loss = total / predicted
    return {
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": predicted,
        "window": window,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / sum(len(text.encode()) for text in texts),
    }
