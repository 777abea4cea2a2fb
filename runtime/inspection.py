"""What a model is, and how much of it fits in which memory, from its headers alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from hotset.runtime.config import BackendConfig, format_nbytes
from hotset.runtime.errors import MemoryTooSmall
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.gguf_folder import model_folder
from hotset.runtime.model.pack_manifest import PackManifest
from hotset.runtime.plan import plan_instance
from hotset.shm.kv_page_format import KvFormat


class Fit(msgspec.Struct, frozen=True):
    """What an instance of `memory` has room for; or `needed` bytes that it has not, and zeros.

    `resident` experts are in memory at once, `share` of all; `kv_tokens` is the room for tokens of all sequences, as
    long as none is behind the window of a layer.
    """

    memory: str
    resident: int
    share: float
    kv_tokens: int
    needed: int | None = None


class StoredExperts(msgspec.Struct, frozen=True):
    """`count` experts of `nbytes` bytes each, and their share of the use that a mixed pack's formats were chosen by."""

    dtype: str
    count: int
    nbytes: int
    share_of_use: float | None = None

    def __str__(self) -> str:
        use = "" if self.share_of_use is None else f", {self.share_of_use:.0%} of all use"
        return f"{self.count} of {format_nbytes(self.nbytes)}, {self.dtype}{use}"


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """`features`: what this model has of what its family may have."""

    model: str
    family: str
    architecture: str
    features: tuple[str, ...]
    num_layers: int
    hidden_size: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dense_nbytes: int
    expert_formats: tuple[StoredExperts, ...]
    num_experts_in_all: int
    kv_nbytes_per_token: int
    fits: tuple[Fit, ...]

    def lines(self) -> Iterator[tuple[str, str]]:
        """For people: what, and how much."""
        yield "model", f"{self.family} ({self.architecture})"
        if self.features:
            yield "", ", ".join(self.features)
        yield "layers", f"{self.num_layers} of width {self.hidden_size}"
        yield "experts", f"{self.experts_per_token} of {self.num_experts} per token and layer"
        if len(self.expert_formats) == 1:
            (only,) = self.expert_formats
            yield "one expert", f"{format_nbytes(only.nbytes)}, {only.dtype}"
        every = f"{format_nbytes(sum(experts.count * experts.nbytes for experts in self.expert_formats))}"
        yield "all experts", f"{every} ({self.num_experts_in_all})"
        if len(self.expert_formats) > 1:
            for experts in self.expert_formats:
                yield "", str(experts)
        yield "dense weights", format_nbytes(self.dense_nbytes)
        yield "KV cache", f"{format_nbytes(self.kv_nbytes_per_token)} per token in float32"
        yield "context", f"{self.max_position_embeddings:,} tokens, vocabulary {self.vocab_size:,}"


def inspect_model(model: Path, memories: Sequence[str]) -> Inspection:
    """Raises `UnsupportedModel` and the other errors of a model folder, or `ValueError` for a size."""
    folder = model_folder(model)
    config = ModelConfig.load(folder)
    checkpoint = Checkpoint.open(folder, config)
    return Inspection(
        model=str(model),
        family=config.family.name,
        architecture=config.family.architecture,
        features=tuple(_features(config)),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        dense_nbytes=checkpoint.dense_nbytes,
        expert_formats=tuple(_expert_formats(checkpoint)),
        num_experts_in_all=config.num_experts_in_all,
        kv_nbytes_per_token=config.kv_nbytes_per_token(KvFormat.FLOAT32),
        fits=tuple(_fit(memory, config, checkpoint) for memory in memories),
    )


def _expert_formats(checkpoint: Checkpoint) -> Iterator[StoredExperts]:
    """The finest first."""
    manifest = PackManifest.of(checkpoint.folder)
    counts: Counter[tuple[int, str]] = Counter()
    activations: Counter[tuple[int, str]] = Counter()
    for layer, expert in checkpoint.expert_ids:
        kind = (checkpoint.expert(layer, expert).nbytes, checkpoint.expert_dtype(layer, expert))
        counts[kind] += 1
        activations[kind] += manifest.experts[layer][expert].activations if manifest is not None else 0
    for nbytes, dtype in sorted(counts, reverse=True):
        share = activations[nbytes, dtype] / activations.total() if activations.total() else None
        yield StoredExperts(dtype, counts[nbytes, dtype], nbytes, share)


def _fit(memory: str, config: ModelConfig, checkpoint: Checkpoint) -> Fit:
    try:
        # What fits does not depend on routing: with "off" no calibration is read, which may be damaged.
        wanted = BackendConfig(model=str(checkpoint.folder), memory=memory, routing="off")
        plan = plan_instance(wanted, config, checkpoint)
    except MemoryTooSmall as error:
        return Fit(memory, 0, 0.0, 0, error.needed)
    geometry = plan.geometry
    share = geometry.num_slots / config.num_experts_in_all
    kv_tokens = geometry.num_pages // geometry.kv_groups * geometry.block_size
    return Fit(memory, geometry.num_slots, round(share, 4), kv_tokens)


def _features(config: ModelConfig) -> Iterator[str]:
    if config.dense_layers:
        yield f"{len(config.dense_layers)} layers without experts"
    if config.latent is not None:
        yield f"latent attention of rank {config.latent.rank}"
    if config.expert_groups > 1:
        yield f"experts of {config.top_expert_groups} of {config.expert_groups} groups per token"
    if config.shared_intermediate_size:
        yield "a shared expert"
    if any(config.windows):
        windowed = sum(window > 0 for window in config.windows)
        yield f"window of {max(config.windows)} tokens in {windowed} layers"
    if config.family.sinks:
        yield "attention sinks"
    if config.rope.type != "default":
        yield f"{config.rope.type} rotary embeddings, factor {config.rope.factor:g}"
    if config.clip_qkv is not None:
        yield f"queries, keys and values clipped to {config.clip_qkv:g}"
