"""INV-6: same logits, mask snapshot, running range and parameters give the same selection.

A call on the shared arena does not say which snapshot it saw, so the masks are read before and after it, and the call
is judged where they agree. It must then equal a call on private memory with the same masks and range (every policy, to
the bit), and for "off" and "bonus" the selection that plain numpy makes (weights within 1e-6 of a float64 softmax).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import Policy, RouterConfig
from hotset.shm._core import Arena
from hotset.shm.geometry import Geometry
from hotset.shm.layout import LAYER_STATE, Section
from hotset.shm.segment import Segment

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_RANGE_COLUMN = 2  # of layer_state as u32
assert LAYER_STATE.fields is not None and LAYER_STATE.fields["logit_range"][1] == 4 * _RANGE_COLUMN
WEIGHT_TOLERANCE = 1e-6


class MaskSnapshot(msgspec.Struct, frozen=True):
    """What a routing call reads of a layer: u64 words of the masks, and the bits of the running range."""

    resident: tuple[int, ...]
    loading: tuple[int, ...]
    arrivals: int
    range_bits: int

    @classmethod
    def take(cls, arena: Arena, layer: int, words: int) -> MaskSnapshot:
        return cls(
            tuple(arena.load_u64(Section.RESIDENT_MASK, layer, word) for word in range(words)),
            tuple(arena.load_u64(Section.LOADING_MASK, layer, word) for word in range(words)),
            arena.generation(layer),
            arena.load_u32(Section.LAYERS, layer, _RANGE_COLUMN),
        )

    def same_masks(self, other: MaskSnapshot) -> bool:
        return (self.resident, self.loading, self.arrivals) == (other.resident, other.loading, other.arrivals)

    def with_one_missing(self) -> Iterator[MaskSnapshot]:
        """The pager takes the bit of an expert away while it looks whether the expert is pinned, and puts it back if
        so. A call in between saw a mask that neither reading around it shows."""
        for word, bits in enumerate(self.resident):
            while bits:
                bit = bits & -bits
                bits ^= bit
                words = list(self.resident)
                words[word] ^= bit
                yield msgspec.structs.replace(self, resident=tuple(words))


class SelectionCheck:
    """Judges calls of routers with `config`."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._segment = Segment.private(Geometry(num_layers=1, num_experts=config.num_experts))
        self._router = MemoryAwareRouter(config, segment=self._segment)
        self.words = self._segment.layout.geometry.mask_words

    def problem(
        self,
        before: MaskSnapshot,
        after: MaskSnapshot,
        logits: Float32,
        experts: Int32,
        weights: Float32,
        policy: Policy,
    ) -> str | None:
        """What is wrong with a call on logits [tokens, num_experts]; raises `NotJudged` if nobody can say."""
        if policy != "off" and not before.same_masks(after):
            raise NotJudged
        if policy == "range" and not self._moved_alone(before, after, logits):
            raise NotJudged
        found = self._differs(before, logits, experts, weights, policy)
        if found is None or policy == "off":
            return found
        for snapshot in before.with_one_missing():
            if self._differs(snapshot, logits, experts, weights, policy) is None:
                return None
        return found

    def _reference(self, snapshot: MaskSnapshot, logits: Float32, policy: Policy) -> tuple[Int32, Float32]:
        arena = self._segment.arena
        for word in range(self.words):
            arena.store_u64(Section.RESIDENT_MASK, 0, word, snapshot.resident[word])
            arena.store_u64(Section.LOADING_MASK, 0, word, snapshot.loading[word])
        arena.store_u32(Section.LAYERS, 0, _RANGE_COLUMN, snapshot.range_bits)
        result = self._router.route_batch(logits, policy=policy)
        return result.experts, result.weights

    def _moved_alone(self, before: MaskSnapshot, after: MaskSnapshot, logits: Float32) -> bool:
        """Whether the running range after the call is what this call alone makes of it."""
        self._reference(before, logits, "range")
        return self._segment.arena.load_u32(Section.LAYERS, 0, _RANGE_COLUMN) == after.range_bits

    def _differs(
        self, snapshot: MaskSnapshot, logits: Float32, experts: Int32, weights: Float32, policy: Policy
    ) -> str | None:
        ids, mixing = self._reference(snapshot, logits, policy)
        if not np.array_equal(ids, experts):
            row = int(np.flatnonzero((ids != experts).any(axis=1))[0])
            return f"policy {policy} selected {experts[row].tolist()}, on private memory {ids[row].tolist()}"
        if not np.array_equal(mixing.view(np.uint32), weights.view(np.uint32)):
            return f"policy {policy} gave other weights than on private memory"
        if policy in ("off", "bonus"):
            return self._differs_from_numpy(snapshot, logits, experts, weights, policy)
        return None

    def _differs_from_numpy(
        self, snapshot: MaskSnapshot, logits: Float32, experts: Int32, weights: Float32, policy: Policy
    ) -> str | None:
        scores = logits
        if policy == "bonus":
            preferred = np.array(snapshot.resident, "<u8") | np.array(snapshot.loading, "<u8")
            mask = np.unpackbits(preferred.view(np.uint8), bitorder="little", count=self._config.num_experts)
            scores = np.where(mask, logits + np.float32(self._config.cache_bonus), logits)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._config.top_k]  # NaN sorts last
        weighable = np.isfinite(logits).any(axis=1)  # the others have a rule of their own
        if not np.array_equal(order[weighable], experts[weighable]):
            row = int(np.flatnonzero(weighable & (order != experts).any(axis=1))[0])
            return f"policy {policy} selected {experts[row].tolist()}, numpy {order[row].tolist()}"
        finite = np.isfinite(logits).all(axis=1)
        exact = logits[finite].astype(np.float64)
        exact = np.exp(exact - exact.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
        error = np.abs(np.take_along_axis(exact, experts[finite].astype(np.int64), 1) - weights[finite])
        if error.size and error.max() > WEIGHT_TOLERANCE:
            return f"policy {policy}: a weight is {error.max():.2e} from the float64 softmax"
        return None


class NotJudged(Exception):
    """The masks, or the range, moved during the call."""
