"""The files of training_corpus.py as token ids, and the order in which training goes through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from training.replaced_file import replace_file
from training.tokenizer import encode_documents, train_tokenizer
from training_corpus import heldout_files, read_texts, training_files


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Tensor
    heldout: Tensor
    heldout_bytes: int


def prepare_corpus(work_dir: Path, vocab_size: int) -> Corpus:
    """Tokenizer and token streams, made once per work folder."""
    tokenizer_path, stream_path = work_dir / "tokenizer.json", work_dir / "corpus.pt"
    if not (tokenizer_path.exists() and stream_path.exists()):
        train_texts = list(read_texts(training_files()))
        heldout_texts = list(read_texts(heldout_files()))
        known = tokenizer_path.exists()
        tokenizer = Tokenizer.from_file(str(tokenizer_path)) if known else train_tokenizer(train_texts, vocab_size)
        streams = {
            "train": encode_documents(tokenizer, train_texts),
            "heldout": encode_documents(tokenizer, heldout_texts),
            "heldout_bytes": sum(len(text.encode()) for text in heldout_texts),
        }
        replace_file(tokenizer_path, lambda temporary: tokenizer.save(str(temporary)))
        replace_file(stream_path, lambda temporary: torch.save(streams, temporary))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    return Corpus(tokenizer, **torch.load(stream_path))


class WindowSampler:
    """Windows of a token stream, every window once per epoch in an order that depends only on (seed, epoch).

    The windows of each epoch begin at another offset, so that no token is always at the same position.
    """

    def __init__(self, stream: Tensor, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = (len(stream) - length - 1) // length
        self._epoch = -1

    def window(self, index: int) -> Tensor:
        """length + 1 token ids: inputs and, shifted by one, targets."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.length * 1009 + epoch)
            self._offset = int(torch.randint(self.length, (1,), generator=generator))
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._epoch = epoch
        start = self._offset + int(self._order[place]) * self.length
        return self.stream[start : start + self.length + 1].long()

    def batch(self, first: int, count: int) -> Tensor:
        return torch.stack([self.window(index) for index in range(first, first + count)])
