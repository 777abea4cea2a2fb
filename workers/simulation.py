"""Decoding a text step by step as many instances would at once, each with its own routing, eviction and budget.

What is measured is what a preference for resident experts saves, in hits, and what it costs, in the likelihood of the
text and in the distance of the output distribution (KL) from that of exact routing. All experts are in this process's
memory: a simulated instance only keeps account of what it would hold. Router, eviction policies and compute kernels are
the real ones; kernels are batch-invariant, so that a row of the common step is, to the bit, what its instance alone
would have computed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RESIDUAL_POLICIES
from hotset.shm.kv_page_format import Bytes, KvFormat
from hotset.shm.layout import WeightFormat
from hotset.workers.compute.experts import combine_in_rank_order, experts_forward, group_by_expert, row_norms
from hotset.workers.compute.gates import selection_bias
from hotset.workers.compute.transformer import Batch, SequenceRows, Transformer, own_block_tables
from hotset.workers.expert_store import read_expert
from hotset.workers.moe import router_config
from hotset.workers.simulated_instance import Setting, SimulatedCache, SimulatedInstance

Floats = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

BLOCK_SIZE = 16


class Outcome(msgspec.Struct, frozen=True):
    """What one setting did, per text and window (axes in this order).

    Attributes:
        loss: negative log-likelihood of the window's tokens, float64, summed.
        divergence: KL(exact routing || this), float64, summed over the tokens.
        hits, misses: distinct experts per step of a layer; of an instance, in the place of its first text.
    """

    loss: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64]
    hits: npt.NDArray[np.int64]
    misses: npt.NDArray[np.int64]


class ExpertBytes:
    """Experts as slots hold them, read at need; the ones used longest ago go when there are too many."""

    def __init__(self, checkpoint: Checkpoint, max_nbytes: int) -> None:
        self._checkpoint = checkpoint
        self._held: OrderedDict[tuple[int, int], Bytes] = OrderedDict()
        self._max_held = max(1, max_nbytes // checkpoint.expert_nbytes)

    def __call__(self, layer: int, expert: int) -> Bytes:
        slot = self._held.get((layer, expert))
        if slot is None:
            while len(self._held) >= self._max_held:
                self._held.popitem(last=False)
            slot = self._held[layer, expert] = read_expert(self._checkpoint, layer, expert)
        self._held.move_to_end((layer, expert))
        return slot


class Simulation:
    """Decodes texts under exact routing and, in the same steps, under each of `settings`.

    Args:
        model: folder of the checkpoint.
        texts: int32 [texts, windows, tokens + 1]. A window is a context of its own; caches and what their policies have
            learned go on from one to the next. `batch` texts that follow one another share an instance.
        settings: their batches divide the number of texts.
        max_expert_nbytes: memory for experts; None is half of what is free.
    """

    def __init__(
        self, model: Path, texts: TokenIds, settings: Sequence[Setting], *, max_expert_nbytes: int | None = None
    ) -> None:
        self.config = config = ModelConfig.load(model)
        self._texts = texts
        self._settings = settings
        count = len(texts)
        for setting in settings:
            if count % setting.batch:
                raise ValueError(f"{count} texts cannot be decoded {setting.batch} at a time, expected a multiple")
        checkpoint = Checkpoint.open(model, config)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._bytes = ExpertBytes(checkpoint, free // 2 if max_expert_nbytes is None else max_expert_nbytes)
        self._checkpoint = checkpoint
        bias = selection_bias(checkpoint)
        self._exact = MemoryAwareRouter(
            router_config(config, policy="off", timing=False), num_layers=config.num_layers, selection_bias=bias
        )
        self._instances = [
            [(first, SimulatedInstance(config, setting, bias)) for first in range(at, at + count, setting.batch)]
            for at, setting in zip(range(count, count * (len(settings) + 1), count), settings, strict=True)
        ]
        length = texts.shape[2] - 1
        rows = count * (len(settings) + 1)
        page = config.kv_page_layout(BLOCK_SIZE, KvFormat.FLOAT32)
        tables = own_block_tables(config, rows, -(-length // BLOCK_SIZE))
        pages = np.zeros((tables.size + 1, *page.shape), np.uint8)
        self._sequences = [SequenceRows(row, 1, table) for row, table in enumerate(tables)]
        self._transformer = Transformer(config, checkpoint, pages, KvFormat.FLOAT32, self._experts)
        self.exact_ids = np.zeros(
            (texts.shape[1], length, count, config.num_layers, config.experts_per_token), np.int16
        )
        """What exact routing selected, [windows, tokens, texts, layers, top_k]."""
        self._place = (0, 0)

    def _experts(self, layer: int, hidden: Floats, gate_logits: Floats, residual: Floats) -> Floats:
        count, top_k = len(self._texts), self.config.experts_per_token
        ids = np.empty((len(hidden), top_k), np.int32)
        weights = np.empty((len(hidden), top_k), np.float32)
        ids[:count], weights[:count], _ = self._exact.route_batch(gate_logits[:count], layer)
        self.exact_ids[self._place][:, layer] = ids[:count]
        norms = row_norms(residual)
        for setting, instances in zip(self._settings, self._instances, strict=True):
            for first, instance in instances:
                rows = slice(first, first + setting.batch)
                ids[rows], weights[rows] = instance.route(layer, gate_logits[rows], norms[rows])
        outputs = np.empty((*ids.shape, hidden.shape[1]), np.float32)
        selections = group_by_expert(ids)
        slots = [self._bytes(layer, expert) for expert in selections]
        formats = [WeightFormat[self._checkpoint.expert_dtype(layer, expert).upper()] for expert in selections]
        experts_forward(hidden, list(selections.values()), slots, formats, self.config, outputs)
        output_norms = row_norms(outputs).mean(axis=1)
        for setting, instances in zip(self._settings, self._instances, strict=True):
            for first, instance in instances if setting.routing in RESIDUAL_POLICIES else ():
                instance.note_norms(layer, output_norms[first : first + setting.batch])
        return combine_in_rank_order(outputs, weights)

    def run(self, progress: Callable[[int, int], None] | None = None) -> list[Outcome]:
        """Outcomes of exact routing (without hits: see `exact_hits`) and of the settings, in their order.

        `progress` is told after each step how many of how many are done.
        """
        count, windows, length = self._texts.shape[0], self._texts.shape[1], self._texts.shape[2] - 1
        kinds = len(self._settings) + 1
        loss, divergence = np.zeros((kinds, count, windows)), np.zeros((kinds, count, windows))
        hits, misses = np.zeros(loss.shape, np.int64), np.zeros(loss.shape, np.int64)
        for window in range(windows):
            for position in range(length):
                self._place = (window, position)
                tokens = np.tile(self._texts[:, window, position], kinds)
                batch = Batch(tokens, np.full(len(tokens), position, np.int32), self._sequences)
                logits = self._transformer.forward(batch).reshape(kinds, count, -1)
                losses, divergences = losses_and_divergences(logits, self._texts[:, window, position + 1])
                loss[:, :, window] += losses
                divergence[:, :, window] += divergences
                if progress is not None:
                    progress(window * length + position + 1, windows * length)
            for kind, instances in enumerate(self._instances, start=1):
                for first, instance in instances:
                    place = kind, first - kind * count, window
                    hits[place], misses[place] = instance.cache.hits, instance.cache.misses
                    instance.cache.hits = instance.cache.misses = 0
        return [Outcome(loss[kind], divergence[kind], hits[kind], misses[kind]) for kind in range(kinds)]

    def exact_hits(self, setting: Setting) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Hits and misses of exact routing, of which `run` has recorded the selections, with the cache of `setting`."""
        windows, count = self.exact_ids.shape[0], len(self._texts)
        hits, misses = np.zeros((count, windows), np.int64), np.zeros((count, windows), np.int64)
        for first in range(0, count, setting.batch):
            cache = SimulatedCache(self.config, setting)
            for window in range(windows):
                for step in self.exact_ids[window, :, first : first + setting.batch].astype(np.int32):
                    for layer in self.config.expert_layers:
                        experts = np.ascontiguousarray(step[:, layer])
                        cache.use(layer, experts, experts)
                hits[first, window], misses[first, window] = cache.hits, cache.misses
                cache.hits = cache.misses = 0
        return hits, misses


def losses_and_divergences(
    logits: Floats, targets: TokenIds
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Logits [kinds, texts, vocabulary], the first kind being the reference, and the texts' next tokens ->
    negative log-likelihoods and KL(reference || kind), each [kinds, texts]."""
    logits = logits - logits.max(axis=2, keepdims=True)
    exponentials = np.exp(logits)
    normalizers = exponentials.sum(axis=2, dtype=np.float64)
    log_normalizers = np.log(normalizers)
    losses = log_normalizers - logits[:, np.arange(len(targets)), targets]
    reference = exponentials[0] / normalizers[0][:, np.newaxis]
    expected = np.einsum("tv,ktv->kt", reference, logits.astype(np.float64))
    divergences = (expected[0] - log_normalizers[0]) - (expected - log_normalizers)
    return losses, divergences


def windows_of(stream: TokenIds, *, texts: int, windows: int, length: int) -> TokenIds:
    """[texts, windows, length + 1] of a stream of tokens: `windows` in a row for each text, the texts spread evenly.

    Raises `ValueError` if the stream is too short.
    """
    span = windows * length
    if len(stream) < texts * span + 1:
        raise ValueError(f"the text has {len(stream)} tokens, expected at least {texts * span + 1}")
    starts = np.linspace(0, len(stream) - span - 1, texts).astype(np.int64)
    offsets = np.arange(windows)[:, np.newaxis] * length + np.arange(length + 1)
    return np.ascontiguousarray(stream[starts[:, np.newaxis, np.newaxis] + offsets], np.int32)
