"""The worker's side of prefetching: asks the sources what the next layers use, and the pager for what can be trusted.

Outcomes are learned from what is named, whether it was fetched or not: so a source that has become good is found
out, and one that has become bad asks for nothing any more.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import msgspec

from hotset.shm.layout import PrefetchSource
from hotset.workers.expert_access import ExpertAccess
from hotset.workers.prefetch.confidence import Confidence
from hotset.workers.prefetch.source import LayerStep, Source
from hotset.workers.prefetch.trial import Trial

FEW_MISSES = 0.25  # of a layer's step: below, foreseeing them costs more than they do
MISS_RATE = 1 / 16  # of the moving average
SAMPLED = 16  # of the steps of a layer with few misses, every how manieth is foreseen nevertheless


class Named(msgspec.Struct, frozen=True):
    """What a source has named for a layer's next step, of what was absent then."""

    confidence: Confidence
    experts: list[int]
    buckets: list[int]


class Layer:
    """What is known of a layer's next step."""

    def __init__(self) -> None:
        self.named: list[Named] = []
        self.asked: set[int] = set()
        self.misses = 0.0  # of a step, had nothing been prefetched; a moving average
        self.steps = 0

    def forget(self) -> None:
        """What was named and asked for."""
        self.named.clear()
        self.asked.clear()

    def is_worth_it(self) -> bool:
        return self.misses >= FEW_MISSES or self.steps % SAMPLED == 0


class Prefetcher:
    """Called once for every layer of every decode step, in order.

    Args:
        sources: the first that names an expert gets it counted.
        access: to the experts.
        top_k: experts per token. At most twice as many candidates of a source are looked at.
        trial: finds out whether it pays; None is to prefetch in any case.
    """

    def __init__(
        self,
        sources: Mapping[PrefetchSource, Source],
        access: ExpertAccess,
        top_k: int,
        trial: Trial | None = None,
    ) -> None:
        self._trial = trial
        self._is_on = True
        self._began = 0
        self._sources = [(number, source, Confidence(source.edges)) for number, source in sources.items()]
        self._access = access
        self._candidates = 2 * top_k
        self._layers: defaultdict[int, Layer] = defaultdict(Layer)

    def begin_step(self) -> None:
        """Before a decode step."""
        if self._trial is not None:
            self._is_on, was_on = self._trial.is_on, self._is_on
            if self._is_on and not was_on:
                for layer in self._layers.values():
                    layer.forget()
            self._began = time.monotonic_ns()

    def end_step(self, rows: int) -> None:
        if self._trial is not None:
            pair = self._trial.note(time.monotonic_ns() - self._began, rows)
            if pair is not None:
                self._access.count_trial(*pair)

    def after_routing(self, step: LayerStep) -> None:
        """When the layer's own missing experts have been requested, and before any is computed."""
        if not self._is_on:
            return
        self._settle(step)
        for number, source, confidence in self._sources:
            source.observe(step)
            target = source.target(step.layer)
            if target is not None and self._layers[target].is_worth_it():
                self._name(number, source, confidence, target, step)

    def _settle(self, step: LayerStep) -> None:
        """Compares what was named for the layer with what it uses."""
        layer, used = self._layers[step.layer], set(step.experts.ravel().tolist())
        missed = layer.asked & used
        missed.update(expert for expert in used - missed if not self._access.is_resident(step.layer, expert))
        layer.misses += MISS_RATE * (len(missed) - layer.misses)
        layer.steps += 1
        for named in layer.named:
            for expert, bucket in zip(named.experts, named.buckets, strict=True):
                named.confidence.learn(bucket, used=expert in used)
        layer.forget()

    def _name(
        self, number: PrefetchSource, source: Source, confidence: Confidence, target: int, step: LayerStep
    ) -> None:
        layer, experts, buckets = self._layers[target], list[int](), list[int]()
        asked: list[tuple[float, int]] = []
        for expert, score in source.candidates(step, self._candidates).items():
            if self._access.is_resident(target, expert):
                continue
            bucket = confidence.bucket(score)
            experts.append(expert)
            buckets.append(bucket)
            if confidence.trusts(bucket) and expert not in layer.asked:
                asked.append((score, expert))
        layer.named.append(Named(confidence, experts, buckets))
        if asked:
            # The likeliest last: the pager begins with the latest.
            in_order = [expert for _, expert in sorted(asked)]
            layer.asked.update(in_order)
            self._access.prefetch(target, in_order, number)
