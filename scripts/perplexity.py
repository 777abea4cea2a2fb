#!/usr/bin/env python3
"""Perplexity of a model on held-out text with KV pages of each format, or with experts of several, beside the memory
that they take.

    .venv/bin/python scripts/perplexity.py [--model FOLDER] [--packs FOLDER ...] [--tokens 24576] [--json]

Our own forward pass in this process, experts straight from the checkpoint. Windows of the model's context length,
spread over the held-out files (training_corpus.py), the same ones for all formats. A chunk's rows go through the pages:
attention reads every row, the chunk's own included, as the format stored it. So the figures are, to the bit, those of
decoding token by token, which tests/workers/compute/test_batch_invariance.py holds the kernels to. Differences are
paired, window by window, with the first row: KV pages in float32, or with --packs the model itself.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.arguments import Parser, model_path, whole
from training_corpus import heldout_stream

from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.errors import HotsetError
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels
from hotset.workers.compute.experts import combine_in_rank_order, experts_forward, group_by_expert
from hotset.workers.compute.gates import selection_bias
from hotset.workers.compute.transformer import Batch, SequenceRows, Transformer, own_block_tables
from hotset.workers.expert_store import read_expert
from hotset.workers.moe import router_config

Floats = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

BLOCK_SIZE = 16
CHUNK = 256  # rows of one forward pass


class Experts:
    """All experts in memory, each as one slot holds it; the gate's own choice."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._router = MemoryAwareRouter(
            router_config(config, policy="off"), num_layers=config.num_layers, selection_bias=selection_bias(checkpoint)
        )
        self._slots = {ids: read_expert(checkpoint, *ids) for ids in checkpoint.expert_ids}
        self._formats = {ids: WeightFormat[checkpoint.expert_dtype(*ids).upper()] for ids in checkpoint.expert_ids}

    def __call__(self, layer: int, hidden: Floats, gate_logits: Floats, residual: Floats) -> Floats:
        ids, weights, _ = self._router.route_batch(gate_logits, layer)
        outputs = np.empty((*ids.shape, self._config.hidden_size), np.float32)
        selections = group_by_expert(ids)
        slots = [self._slots[layer, expert] for expert in selections]
        formats = [self._formats[layer, expert] for expert in selections]
        experts_forward(hidden, list(selections.values()), slots, formats, self._config, outputs)
        return combine_in_rank_order(outputs, weights)


def heldout_windows(tokenizer: Tokenizer, end_of_text: int, tokens: int, length: int) -> list[TokenIds]:
    """Windows of `length` + 1 tokens, at least `tokens` predictions in all, spread evenly over the held-out files."""
    stream = heldout_stream(tokenizer.encode, end_of_text)
    count = -(-tokens // length)
    if count < 2:
        raise ValueError(f"{tokens} tokens are asked for, expected more than the {length} of one window")
    if count * length >= len(stream):
        raise ValueError(f"{tokens} tokens are asked for, the held-out files have {len(stream)}")
    starts = np.linspace(0, len(stream) - length - 1, count).astype(np.int64)
    return [stream[start : start + length + 1] for start in starts.tolist()]


def window_losses(
    config: ModelConfig, checkpoint: Checkpoint, experts: Experts, windows: Sequence[TokenIds], kv_format: KvFormat
) -> npt.NDArray[np.float64]:
    """Mean negative log-likelihood per token of each window."""
    length = len(windows[0]) - 1
    page = config.kv_page_layout(BLOCK_SIZE, kv_format)
    (tables,) = own_block_tables(config, 1, -(-length // BLOCK_SIZE))
    pages = np.zeros((tables.size + 1, *page.shape), np.uint8)
    transformer = Transformer(config, checkpoint, pages, kv_format, experts)
    losses = np.zeros((len(windows), length))
    for index, window in enumerate(windows):
        for start in range(0, length, CHUNK):
            rows = np.arange(start, min(start + CHUNK, length), dtype=np.int32)
            batch = Batch(window[rows], rows, [SequenceRows(0, len(rows), tables)])
            logits = transformer.forward(batch, all_rows=True).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            normalizer = np.log(np.exp(logits).sum(axis=1))
            losses[index, rows] = normalizer - logits[np.arange(len(rows)), window[rows + 1]]
    return losses.mean(axis=1)


class Row(msgspec.Struct):
    """`name` is what was tried, and `nbytes` what it takes: of KV pages a token, of a pack's experts all."""

    name: str
    nbytes: int
    perplexity: float
    difference_percent: float
    standard_error_percent: float
    seconds: float


class Measurement:
    """Cases on the same windows of held-out text, compared with the first of them."""

    def __init__(self, model: Path, tokens: int) -> None:
        config = ModelConfig.load(model)
        tokenizer = Tokenizer(model)
        self.windows = heldout_windows(tokenizer, config.eos_token_ids[0], tokens, config.max_position_embeddings)
        self.rows: list[Row] = []
        self._reference: npt.NDArray[np.float64] | None = None

    @property
    def tokens(self) -> int:
        return len(self.windows) * (len(self.windows[0]) - 1)

    def add(self, name: str, nbytes: int, checkpoint: Checkpoint, experts: Experts, kv_format: KvFormat) -> None:
        began = time.monotonic()
        losses = window_losses(checkpoint.config, checkpoint, experts, self.windows, kv_format)
        if self._reference is None:
            self._reference = losses
        paired = losses - self._reference
        self.rows.append(
            Row(
                name=name,
                nbytes=nbytes,
                perplexity=math.exp(losses.mean()),
                difference_percent=100 * math.expm1(paired.mean()),
                standard_error_percent=100 * float(paired.std(ddof=1)) / math.sqrt(len(paired)),
                seconds=round(time.monotonic() - began, 1),
            )
        )


def measure_kv_formats(model: Path, tokens: int) -> Measurement:
    measurement, checkpoint = Measurement(model, tokens), Checkpoint.open(model)
    experts = Experts(checkpoint.config, checkpoint)
    for kv_format in KvFormat:
        nbytes = checkpoint.config.kv_nbytes_per_token(kv_format)
        measurement.add(kv_format.value, nbytes, checkpoint, experts, kv_format)
    return measurement


def measure_packs(model: Path, packs: Sequence[Path], tokens: int) -> Measurement:
    measurement = Measurement(model, tokens)
    for folder in (model, *packs):
        checkpoint = Checkpoint.open(folder)
        nbytes = sum(checkpoint.expert(*ids).nbytes for ids in checkpoint.expert_ids)
        experts = Experts(checkpoint.config, checkpoint)
        measurement.add(folder.name, nbytes, checkpoint, experts, KvFormat.FLOAT32)
    return measurement


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="perplexity.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=model_path, default=TRAINED_MODEL, help="folder of the checkpoint")
    parser.add_argument("--packs", type=model_path, nargs="+", default=[], help="packs of it, in several formats")
    parser.add_argument("--tokens", type=whole(1), default=24_576, help="predicted tokens, rounded up to whole windows")
    parser.add_argument("--threads", type=whole(1, 256), default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    _kernels.set_num_threads(options.threads)
    if options.packs:
        headings, measurement = ("experts", "bytes"), measure_packs(options.model, options.packs, options.tokens)
    else:
        headings, measurement = ("kv_cache_dtype", "bytes per token"), measure_kv_formats(options.model, options.tokens)
    window = len(measurement.windows[0]) - 1
    if options.json:
        result = {"model": options.model.name, "tokens": measurement.tokens, "window": window, "rows": measurement.rows}
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        return 0
    print(f"{measurement.tokens:,} held-out tokens in windows of {window}\n")
    print(f"| {headings[0]} | {headings[1]} | perplexity | difference to {measurement.rows[0].name} |")
    print("|---|---:|---:|---:|")
    for row in measurement.rows:
        difference = f"{row.difference_percent:+.4f} % (± {row.standard_error_percent:.4f})"
        print(f"| {row.name} | {row.nbytes:,} | {row.perplexity:.4f} | {difference} |")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (HotsetError, ValueError, OSError) as error:
        raise SystemExit(f"perplexity.py: {error}") from None
