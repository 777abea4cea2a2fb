"""`ExpertCache`: experts of a model in shared memory, for an engine that computes itself."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from os import PathLike
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.config import model_path
from hotset.runtime.errors import TooManyPins
from hotset.runtime.expert_ids import distinct, distinct_experts, expert_rows
from hotset.runtime.experts.arguments import demand_of
from hotset.runtime.experts.config import ExpertCacheConfig, plan_cache
from hotset.runtime.experts.membership import Membership
from hotset.runtime.experts.owner import ExpertCacheOwner
from hotset.runtime.experts.pinned import PinnedExperts
from hotset.runtime.experts.reader import Demand, ExpertReader
from hotset.runtime.experts.stats import ExpertCacheStats
from hotset.runtime.experts.weights import ExpertWeights
from hotset.runtime.memory_tiers import PageCache
from hotset.runtime.messages.client import GetStats, PageOutExperts, PinExperts, ResetStats, UnpinExperts
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.gguf_folder import model_folder
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig
from hotset.runtime.settings import check_settings, takes
from hotset.shm.segment import Segment, check_instance_name, new_instance_name


class ExpertCache:
    """As many experts as a budget holds, in shared memory; a pager process reads the others from disk when they are
    pinned, into the slots of those that are needed last. Use it as a context manager, or call `close`.

    Any process of the same user may `attach` to it by its name, up to the setting `processes`, and may be killed at any
    instruction: what it had pinned is let go. A killed pager is replaced. A killed maker takes the pager with it; the
    others keep what they have pinned, and are told when they miss something.

    Args:
        model: folder of a checkpoint in Hugging Face's layout, or a GGUF file; None is the small model that ships
            with hotset.
        settings: the fields of `ExpertCacheConfig`, by name.

    Raises:
        ModelNotFound, UnsupportedModel, CorruptCheckpoint: the model cannot be used.
        BudgetTooSmall, ValueError: the settings cannot be met.
        ExpertCacheError: the pager could not start.

    All methods may be called from any thread. A process that is forked from one that has a cache attaches itself.

    Attributes:
        config: the settings.
        name: for `attach`.
        num_layers, num_experts, experts_per_token: of the model.
        pins_per_process: experts that this process may pin at once, in all of its blocks.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **settings: Any) -> None:
        path = model_path(model)
        check_settings(settings, "ExpertCache", ExpertCacheConfig)
        folder = model_folder(path)
        config = ExpertCacheConfig(model=str(folder), **settings)
        name = check_instance_name(new_instance_name() if config.name is None else config.name)
        checkpoint = Checkpoint.open(folder)
        owner = ExpertCacheOwner(name, config, plan_cache(config, checkpoint))
        try:
            self._use(Membership(name, owner.connection), owner.segment, checkpoint)
        except BaseException:
            owner.close()
            raise
        del owner.segment  # ours to unmap
        self._owner = owner
        # For a program that ends, or forgets the cache, without closing it.
        self._end = weakref.finalize(self._reader, owner.close)

    @classmethod
    def attach(cls, name: str) -> Self:
        """The cache of this name, in another process than the one that made it, or once more in the same.

        Raises `ExpertCacheError` if there is none, or as many processes use it as it was made for.
        """
        cache = cls.__new__(cls)
        membership = Membership.join(check_instance_name(name))
        try:
            checkpoint = Checkpoint.open(membership.joined.config.model)
            cache._use(membership, Segment.attach(name, membership.joined.plan.geometry), checkpoint)
        except BaseException:
            membership.leave()
            raise
        cache._end = weakref.finalize(cache._reader, membership.leave)
        cache._end.atexit = False  # a process that ends is noticed, when none of its threads reads slots any more
        return cache

    def _use(self, membership: Membership, segment: Segment, checkpoint: Checkpoint) -> None:
        self.name = membership.name
        self.config = membership.joined.config
        self.num_layers = checkpoint.config.num_layers
        self.num_experts = checkpoint.config.num_experts
        self.experts_per_token = checkpoint.config.experts_per_token
        self.pins_per_process = membership.joined.plan.geometry.pins_per_process
        self._process = os.getpid()
        self._owner: ExpertCacheOwner | None = None
        self._first_close = threading.Lock()  # never released
        self._membership = membership
        self._model: ModelConfig = checkpoint.config
        self._page_cache = PageCache(checkpoint)
        self._reader = ExpertReader(segment, membership, checkpoint, self._page_cache.close)

    # ---- experts

    def pinned(
        self,
        layer: int,
        experts: Any,
        *,
        wanted: Any = None,
        streams: Iterable[int] | None = None,
        prefill: bool = False,
    ) -> PinnedExperts:
        """Experts of a layer for a block of code, `with cache.pinned(layer, experts) as weights:`.

        They are pinned from the beginning of the block to its end, those that are missing requested all at once.
        `weights[expert]` waits for one, and `weights.items()` gives those first that are in memory.

        Args:
            experts: integers, those of one token; or [tokens, n], as a router gives them.
            wanted: what the gate chose, likewise, where `experts` are others because those are in memory: eviction is
                to learn what is useful, and not what was there.
            streams: whose token each row is, below the setting `streams`; None is 0, 1, 2 ... in order.
            prefill: they are wanted by many tokens of known text, from which eviction learns only how popular they are.

        Raises, when the block begins: `NotEnoughPins`, `ExpertCacheClosed`; see `PinnedExperts` for what comes later.
        """
        layer = self._layer(layer)
        ids, demand = self._step(experts, wanted, streams, prefill=prefill)
        return PinnedExperts(self._reader, layer, ids, demand, prefill=prefill)

    def in_turn(
        self,
        layer: int,
        experts: Any,
        *,
        wanted: Any = None,
        streams: Iterable[int] | None = None,
        prefill: bool = False,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """The same one after the other, `for expert, weights in cache.in_turn(layer, experts):`. Those that are in
        memory come first. There may be more of them than pins; each is pinned until the next is asked for."""
        layer = self._layer(layer)
        ids, demand = self._step(experts, wanted, streams, prefill=prefill)
        return self._reader.in_turn(layer, ids, demand, prefill=prefill)

    def _step(
        self, experts: Any, wanted: Any, streams: Iterable[int] | None, *, prefill: bool
    ) -> tuple[tuple[int, ...], Demand]:
        rows = expert_rows("experts", experts, self.num_experts)
        learned = rows if wanted is None else expert_rows("wanted", wanted, self.num_experts)
        first = self._membership.joined.process * self.config.streams
        return distinct(rows), demand_of(learned, streams, first, self.config.streams, prefill=prefill)

    def prefetch(self, layer: int, experts: Any) -> None:
        """Has these read while nobody waits for the disk, for the layer's next step; a hint, that may be dropped."""
        self._reader.prefetch(*self._named(layer, experts))

    def resident(self, layer: int) -> npt.NDArray[np.bool_]:
        """Which experts of the layer are in memory just now, [num_experts]; a hint, as they are not pinned."""
        return self._reader.resident(self._layer(layer))

    @takes("config", RouterConfig)
    def router(
        self, config: RouterConfig, *, selection_bias: npt.NDArray[np.float32] | None = None
    ) -> MemoryAwareRouter:
        """A router on this cache: it prefers what is in memory as the pager says, and shares the affinity with the
        routers of all processes. For one thread, and not beyond `close`."""
        return self._reader.router(config, selection_bias)

    # ---- experts that stay

    def pin_experts(self, layer: int, experts: Any) -> None:
        """Keeps these experts in memory until `unpin_experts`, whoever ends or is killed. Those that are absent begin
        to be loaded at once; `stats().pinned_experts_absent` says how many are still to come.

        Args:
            experts: integers, or [tokens, n], as a router gives them; an expert counts once.

        Raises `TooManyPins`, and pins none of them, if more than the setting `user_pins` would be pinned.
        """
        layer, ids = self._named(layer, experts)
        pinned = self._membership.ask(lambda query: PinExperts(query, layer, ids)).pinned
        if pinned > self.config.user_pins:
            raise TooManyPins(pinned, self.config.user_pins)

    def unpin_experts(self, layer: int, experts: Any) -> None:
        """They may be evicted again, as any other; those that were not pinned are left as they are. `experts` as for
        `pin_experts`."""
        layer, ids = self._named(layer, experts)
        self._membership.ask(lambda query: UnpinExperts(query, layer, ids))

    def page_out(self, layer: int, experts: Any) -> list[int]:
        """Frees the slots of these experts, given as for `pin_experts`; one that is being used stays.

        Returns those for which this was refused: they are pinned by `pin_experts`, or the pager has no time to listen.
        """
        layer, ids = self._named(layer, experts)
        return self._membership.ask(lambda query: PageOutExperts(query, layer, ids)).refused

    # ---- numbers

    def stats(self) -> ExpertCacheStats:
        """Counters of all processes added up, and what is in memory now."""
        reply = self._membership.ask(GetStats)
        tiers = self._page_cache.complete(reply.stats.tiers, reply.resident)
        return msgspec.structs.replace(reply.stats, tiers=tiers)

    def reset_stats(self) -> None:
        """Counts from here on."""
        self._membership.tell(ResetStats())
        self._membership.ask(GetStats)  # answered when that is done

    def _layer(self, layer: int) -> int:
        return self._model.layer_with_experts(layer)

    def _named(self, layer: int, experts: Any) -> tuple[int, list[int]]:
        return self._layer(layer), distinct_experts(experts, self.num_experts)

    # ---- life

    def close(self) -> None:
        """Lets go of the cache; its maker ends it. Blocks that are open can use what has arrived until they end. May be
        called again; in a forked process it does nothing."""
        if os.getpid() != self._process or not self._first_close.acquire(blocking=False):
            return
        self._membership.end()
        if self._owner is not None:
            self._owner.close()
        self._end.detach()
        self._reader.close()

    def __enter__(self) -> Self:
        self._membership.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
