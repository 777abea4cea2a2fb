"""How a router selects (`RouterConfig`), and what of it cannot be."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
import numpy as np

from hotset.runtime.affinity import AffinityConfig
from hotset.runtime.argument_types import check_field_types
from hotset.runtime.config import RoutingPolicy
from hotset.runtime.settings import Settings

MAX_EXPERTS = 1024
MAX_TOP_K = 32

Policy = RoutingPolicy
Gating = Literal["softmax_top_k", "top_k_softmax", "sigmoid"]  # in the order of enum route_gating
GATINGS: tuple[Gating, ...] = get_args(Gating)
POLICIES: tuple[Policy, ...] = get_args(Policy)
RESIDUAL_POLICIES: tuple[Policy, ...] = ("resnorm", "substitute")
"""Their strengths are multiplied by how large the residual is beside the layer's expert outputs."""


class RouterConfig(Settings, frozen=True):
    """How a router selects.

    `cache_bonus` and `prefetch_threshold` are clamped to [0, 1]; anything else out of range is a `ValueError`.

    Attributes:
        num_experts: per layer, up to 1,024.
        top_k: experts per token, up to 32.
        cache_bonus: policy "bonus" adds it to the logits of resident experts.
        memory_aware: False routes as with policy "off".
        prefetch_threshold: gate probability from which a non-resident expert that was not selected is prefetched.
        policy: "off" is the true top-k. "bonus": see `cache_bonus`. "range" (Cache-Prior, Skliar et al., TMLR 2025):
            the bonus is `range_strength` times the running mean over tokens of max - min of the layer's logits, and
            the token's own top `keep_top` get it too. "mass" replaces experts that are not resident by resident ones
            while the gate probability given up stays <= `mass_budget` per token. "resnorm" adds `resnorm_strength` *
            p_1 * |x| / n to their probability: p_1 is the token's largest, |x| the norm of the residual that enters
            the layer and n the mean norm of the layer's expert outputs, times `weight_scale`, for where |x| is large
            beside n a wrong expert does little harm. `route_batch` takes |x| / n as `residual_ratio`; without it, it
            is 1.
            "substitute" replaces experts that are not resident, those of least weight first, by the resident ones of
            least weight, while each time the residual changes by less than a share `substitute_limit`: the outputs of
            two experts are nearly orthogonal and, times `weight_scale`, about n long, so that weight q in place of p
            changes it by sqrt(p^2 + q^2) * n / |x|, p and q before that scale. What is missing and matters little is
            so all but left out; who need not compute `top_k` experts may leave it out (workers/moe.py does).
            With gating "sigmoid", for which no preference has been measured: the bias decides what the gate chooses,
            and the groups among which a replacement may be, but is in no weight. "substitute" means the same there, p
            and q being the sigmoids, divided by their sum over the gate's choice if `renormalize`. "resnorm" has no
            probabilities: it adds `resnorm_strength` * the token's largest sigmoid * |x| / n to the scores that the
            gate selects by, bias included, so that how strong it is depends on how far the scores lie apart.
        gating: "softmax_top_k" (OLMoE, Qwen) takes probabilities over all experts, "top_k_softmax" (Mixtral,
            gpt-oss) over the selected ones, "sigmoid" (DeepSeek-V3) sigmoid scores; it selects by these, plus the bias
            that `MemoryAwareRouter` is given.
        renormalize: the weights of a row sum to `weight_scale`; "top_k_softmax" always does that.
        weight_scale: factor on every weight.
        num_groups, top_groups: only experts of the best `top_groups` groups are selected: of those with the highest
            logits (DeepSeek-V2), with gating "sigmoid" of those whose two best scores sum highest (DeepSeek-V3).
        prefer_loading: experts that are being read from disk are preferred too; they are never hits.
        affinity: decay and boost; None takes the defaults of `AffinityConfig`.
        timing: record latencies; counts are always on.
        adaptive: adjust the policy's strength, from its configured value up to `max_strength`, towards
            `target_hit_rate` while the mean mass lost per token stays <= `max_lost_mass`.
    """

    num_experts: int = 8
    top_k: int = 2
    cache_bonus: float = 0.15
    memory_aware: bool = True
    prefetch_threshold: float = 0.1
    policy: Policy = "bonus"
    range_strength: float = 0.2
    keep_top: int = 1
    mass_budget: float = 0.004
    resnorm_strength: float = 0.1
    substitute_limit: float = 0.05
    gating: Gating = "softmax_top_k"
    renormalize: bool = False
    weight_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    prefer_loading: bool = True
    affinity: AffinityConfig | None = None
    timing: bool = True
    adaptive: bool = False
    target_hit_rate: float = 0.8
    max_lost_mass: float = 0.02
    max_strength: float = 1.0

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("cache_bonus", "prefetch_threshold"):
            value = getattr(self, name)
            if value != value:
                raise ValueError(f"{name} is {value}, expected a number")
            msgspec.structs.force_setattr(self, name, min(max(float(value), 0.0), 1.0))
        _check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_range("top_k", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        _check_range("keep_top", self.keep_top, 0, self.top_k)
        _check_range("num_groups", self.num_groups, 1, 64)
        _check_range("top_groups", self.top_groups, 1, min(self.num_groups, MAX_TOP_K))
        if self.num_experts % self.num_groups or self.num_experts // self.num_groups * self.top_groups < self.top_k:
            raise ValueError(
                f"{self.top_groups} of {self.num_groups} groups of {self.num_experts} experts do not fit: expected "
                f"groups of equal size, and at least top_k = {self.top_k} experts in those that are selected"
            )
        for name in (
            "range_strength",
            "mass_budget",
            "resnorm_strength",
            "substitute_limit",
            "weight_scale",
            "max_lost_mass",
            "max_strength",
        ):
            _check_range(name, getattr(self, name), 0, float(np.finfo(np.float32).max))
        _check_range("target_hit_rate", self.target_hit_rate, 0, 1)
        if self.affinity is not None and self.affinity.num_experts != self.num_experts:
            raise ValueError(
                f"affinity.num_experts is {self.affinity.num_experts}, expected num_experts = {self.num_experts}"
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")
