"""How well each source of prefetch candidates foresees what a layer uses: the measurement behind the thresholds.

usage: scripts/bench prefetch [--model FOLDER [--tokens 8192] | --trace FILE] [--budgets 12.5,25,50] [--json]

Held-out text through the model, all experts in memory, exact routing, one token after the other; or a recorded trace,
for the sources that need no more than which experts were used. `recall` is of the true top-k among a source's best k
and 2k candidates. What counts for prefetching is what is absent: a layer's experts are kept by affinity in so many
slots, and `absent` is how many of the named experts that were absent the layer's next step used, `misses` how many of
its misses had been named, `asked` and `saved` the same for what serving would ask for (confidence.py). A later gate is
ranked by its probabilities here, for the recall; in serving its candidates are what the router would miss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.arguments import Parser, model_path, numbers, slots_per_layer, trace_path, whole
from laboratory.traces import load_trace
from perplexity import BLOCK_SIZE, CHUNK, Experts, heldout_windows
from rich.console import Console
from rich.table import Table

from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.shm.kv_page_format import KvFormat
from hotset.workers.compute.gates import Gates
from hotset.workers.compute.transformer import Batch, SequenceRows, Transformer, own_block_tables
from hotset.workers.prefetch.affinity import Affinity
from hotset.workers.prefetch.confidence import Confidence
from hotset.workers.prefetch.gate_ahead import GateAhead
from hotset.workers.prefetch.runners_up import RunnersUp
from hotset.workers.prefetch.source import Float32, Int32, LayerStep, RankedSource
from hotset.workers.prefetch.transitions import Transitions

DECAY = 31 / 32


class Row(msgspec.Struct, frozen=True):
    """One source at one budget; shares in percent."""

    source: str
    budget: float
    recall_k: float
    recall_2k: float
    precision_absent: float
    recall_misses: float
    precision_asked: float
    recall_asked: float
    asked_per_miss: float
    buckets: list[str]


class PreviousToken(RankedSource):
    """What the layer used a token ago, and a token before that ...: popularity of the shortest memory."""

    edges = (0.0, 0.1, 0.3, 0.6)

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._scores: dict[int, Float32] = {}

    def target(self, layer: int) -> int:
        return layer

    def scores(self, step: LayerStep) -> Float32:
        scores = self._scores.setdefault(step.layer, np.zeros(step.gate_logits.shape[1], np.float32))
        scores *= self._decay
        scores[step.experts.ravel()] += 1 - self._decay
        return scores


class RankedGate(RankedSource, GateAhead):
    """The score is the gate probability that `distance` layers on would give."""

    def scores(self, step: LayerStep) -> Float32:
        layer = self.target(step.layer)
        assert layer is not None, "name_candidates asks for no other"
        logits = self._gates(layer, step.residual)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (weights / weights.sum(axis=1, keepdims=True)).max(axis=0)


class Recorder(Experts):
    """Computes with all experts in memory, and keeps what every layer was given."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        super().__init__(config, checkpoint)
        self.layers: list[tuple[int, Float32, Float32]] = []

    def __call__(self, layer: int, hidden: Float32, gate_logits: Float32, residual: Float32) -> Float32:
        self.layers.append((layer, gate_logits.copy(), residual.copy()))
        return super().__call__(layer, hidden, gate_logits, residual)


def foresee_nothing(layer: int, logits: Float32) -> dict[int, float]:
    """There is no router."""
    return {}


def steps_of_model(config: ModelConfig, checkpoint: Checkpoint, model: Path, tokens: int) -> Iterator[LayerStep]:
    recorder = Recorder(config, checkpoint)
    length = min(1024, config.max_position_embeddings)
    page = config.kv_page_layout(BLOCK_SIZE, KvFormat.FLOAT32)
    (tables,) = own_block_tables(config, 1, -(-length // BLOCK_SIZE))
    transformer = Transformer(
        config, checkpoint, np.zeros((tables.size + 1, *page.shape), np.uint8), KvFormat.FLOAT32, recorder
    )
    top_k = config.experts_per_token
    for window in heldout_windows(Tokenizer(model), config.eos_token_ids[0], tokens, length):
        for start in range(0, length, CHUNK):
            rows = np.arange(start, min(start + CHUNK, length), dtype=np.int32)
            recorder.layers.clear()
            transformer.forward(Batch(window[rows], rows, [SequenceRows(0, len(rows), tables)]), all_rows=True)
            for row in range(len(rows)):
                for layer, logits, residual in recorder.layers:
                    chosen = np.argsort(-logits[row], kind="stable")[:top_k].astype(np.int32)
                    yield LayerStep(
                        layer, chosen[np.newaxis], logits[row : row + 1], residual[row : row + 1], foresee_nothing
                    )


def steps_of_trace(ids: npt.NDArray[np.uint16], num_experts: int, tokens: int) -> Iterator[LayerStep]:
    nothing = np.zeros((1, num_experts), np.float32)
    for token in ids[:tokens].astype(np.int32):
        for layer, experts in enumerate(token):
            yield LayerStep(layer, experts[np.newaxis], nothing, nothing, foresee_nothing)


class Slots:
    """Which experts of each layer are resident: those of the largest affinity, and those just used."""

    def __init__(self, num_layers: int, num_experts: int, slots: int) -> None:
        self.affinity = np.zeros((num_layers, num_experts), np.float32)
        self.resident = np.zeros((num_layers, num_experts), np.bool_)
        self._slots = slots

    def use(self, layer: int, experts: Int32) -> None:
        affinity, resident = self.affinity[layer], self.resident[layer]
        affinity *= DECAY
        affinity[experts] += 1 - DECAY
        resident[experts] = True
        for _ in range(int(resident.sum()) - self._slots):
            worth = np.where(resident, affinity, np.inf)
            worth[experts] = np.inf
            resident[int(worth.argmin())] = False


class Tally:
    """Outcomes of one source at one budget. `pending[layer]` is what was named for the layer's next step."""

    def __init__(self, source: RankedSource, name: str, top_k: int) -> None:
        self.name = name
        self.source = source
        self.top_k = top_k
        self.confidence = Confidence(source.edges)
        self.named = np.zeros(len(source.edges))
        self.used = np.zeros(len(source.edges))
        self.pending: dict[int, tuple[Int32, npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = {}
        self.counts = dict.fromkeys(
            ("true", "top_k", "top_2k", "absent", "absent_used", "misses", "asked", "asked_used"), 0
        )

    def settle(self, step: LayerStep, resident: npt.NDArray[np.bool_]) -> None:
        found = self.pending.pop(step.layer, None)
        if found is None:
            return
        candidates, absent, buckets, asked = found
        used = np.isin(candidates, step.experts)
        counts = self.counts
        counts["true"] += step.experts.size
        counts["top_k"] += int(used[: self.top_k].sum())
        counts["top_2k"] += int(used.sum())
        counts["absent"] += int(absent.sum())
        counts["absent_used"] += int((absent & used).sum())
        counts["misses"] += int((~resident[step.experts.ravel()]).sum())
        counts["asked"] += int(asked.sum())
        counts["asked_used"] += int((asked & used).sum())
        for bucket, was_used in zip(buckets[absent].tolist(), used[absent].tolist(), strict=True):
            self.confidence.learn(bucket, used=was_used)
        np.add.at(self.named, buckets[absent], 1)
        np.add.at(self.used, buckets[absent], used[absent])

    def name_candidates(self, step: LayerStep, slots: Slots) -> None:
        self.source.observe(step)
        layer = self.source.target(step.layer)
        if layer is None:
            return
        scores = self.source.scores(step)
        order = np.argsort(-scores, kind="stable")[: 2 * self.top_k].astype(np.int32)
        order = order[scores[order] >= self.source.edges[0]]
        absent = ~slots.resident[layer, order]
        buckets = np.array([self.confidence.bucket(score) for score in scores[order].tolist()], np.int64)
        trusted = np.array([self.confidence.trusts(bucket) for bucket in buckets], np.bool_)
        self.pending[layer] = order, absent, buckets, absent & trusted

    def row(self, budget: float) -> Row:
        counts = self.counts

        def percent(part: str, whole: str) -> float:
            return round(100 * counts[part] / max(1, counts[whole]), 1)

        return Row(
            self.name,
            budget,
            percent("top_k", "true"),
            percent("top_2k", "true"),
            percent("absent_used", "absent"),
            percent("absent_used", "misses"),
            percent("asked_used", "asked"),
            percent("asked_used", "misses"),
            round(counts["asked"] / max(1, counts["misses"]), 3),
            [f"{100 * u / n:.0f}% of {n:.0f}" if n else "-" for u, n in zip(self.used, self.named, strict=True)],
        )


def measure(steps: Sequence[LayerStep], budget: float, num_experts: int, gates: Gates | None) -> list[Row]:
    num_layers = 1 + max(step.layer for step in steps)
    top_k = steps[0].experts.shape[1]
    slots = Slots(num_layers, num_experts, slots_per_layer(budget, num_experts))
    layers = sorted({step.layer for step in steps})
    tallies = [
        Tally(Transitions(layers, num_experts), "transitions", top_k),
        Tally(Affinity(lambda: slots.affinity), "affinity", top_k),
        Tally(PreviousToken(0.0), "previous token", top_k),
        Tally(PreviousToken(0.999), "popularity", top_k),
    ]
    if gates is not None:
        tallies += [Tally(RankedGate(gates, d), f"gate-ahead, {d} on", top_k) for d in (1, 2)]
        tallies.append(Tally(RunnersUp(0.01), "runners-up", top_k))
    for step in steps:
        for tally in tallies:
            tally.settle(step, slots.resident[step.layer])
        slots.use(step.layer, step.experts.ravel())
        for tally in tallies:
            tally.name_candidates(step, slots)
    return [tally.row(budget) for tally in tallies]


def run(options: argparse.Namespace) -> list[Row]:
    budgets = numbers("--budgets", options.budgets, float, least=0)
    if options.trace is not None:
        trace = load_trace(options.trace)
        if trace.ids is None:
            raise ValueError(f"{options.trace} was recorded by whole steps, expected one with tokens")
        gates, num_experts = None, trace.num_experts
        steps = list(steps_of_trace(trace.ids, num_experts, options.tokens))
    else:
        config = ModelConfig.load(options.model)
        checkpoint = Checkpoint.open(options.model, config)
        gates, num_experts = Gates(config, checkpoint), config.num_experts
        steps = list(steps_of_model(config, checkpoint, options.model, options.tokens))
    return [row for budget in budgets for row in measure(steps, budget, num_experts, gates)]


def main(arguments: list[str]) -> int:
    parser = Parser(prog="scripts/bench prefetch", description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=model_path, default=TRAINED_MODEL)
    source.add_argument("--trace", type=trace_path, help="instead of a model: an .npz, as for scripts/hitrate")
    parser.add_argument("--tokens", type=whole(1), default=8192)
    parser.add_argument("--budgets", default="12.5,25,50")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = run(options)
    if options.json:
        print(json.dumps(msgspec.to_builtins(rows)))
        return 0
    table = Table(*Row.__struct_fields__[:-1], box=None)
    for row in rows:
        values: list[Any] = [getattr(row, name) for name in Row.__struct_fields__[:-1]]
        table.add_row(*map(str, values))
    console = Console(highlight=False, width=140)
    console.print(table)
    for row in rows:
        console.print(f"{row.source} at {row.budget:g} %, by bucket: {', '.join(row.buckets)}")
    return 0
