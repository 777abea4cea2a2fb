"""What the gates measure: quality in the laboratory, the rest in instances that serve."""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from laboratory.arguments import slots_per_layer
from laboratory.paged_model import CannotMakeModel, made_model
from laboratory.quality import HeldOut, study
from serving import measure, step_p99
from serving_run import Report, Request

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.config import BackendConfig, format_nbytes, parse_nbytes
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.routing_preference import routing_preference
from hotset.workers.simulated_instance import Setting

ROUTE_ROWS = 4096  # distinct: a processor learns 256 by heart
ROUTE_SECONDS = 0.5
STRESS_STREAMS = 8
WAITING_OF_A_BOTTLENECK = 1 / 2  # of the time; were all of a share w saved, it would be 1 / (1 - w) times as fast


class Found(msgspec.Struct, frozen=True):
    """What was measured for a gate, and how."""

    measured: float | None
    how: str


# ---- quality


def measure_quality(options: argparse.Namespace, config: BackendConfig, held: HeldOut) -> dict[str, Found]:
    preference = routing_preference(config)
    budget = float(options.budget.rstrip("%"))
    slots = slots_per_layer(budget, ModelConfig.load(options.model).num_experts)
    off = Setting("off", 0.0, config.eviction, slots, shared=True)
    preferring = Setting(preference.policy, preference.strength, config.eviction, slots, shared=True)
    rows = {row.routing: row for row in study(options.model, held, {off: budget, preferring: budget}).rows}
    exact, chosen = rows["off"], rows[preference.policy]
    where = f"{held.text.counted_tokens} held-out tokens, {options.budget} resident, eviction {config.eviction}"
    change = chosen.perplexity_change
    return {
        "hit-rate": Found(
            chosen.hit_rate.value, f"{where}, routing {preference}; exact routing {exact.hit_rate.value:.1f} %"
        ),
        "perplexity": Found(change.value, f"same run, paired; 95 %: {change.low:+.2f} to {change.high:+.2f} %"),
    }


# ---- serving


def measure_serving(options: argparse.Namespace) -> dict[str, Found]:
    """The slowest steps with the default preference and without, and what is prefetched."""
    memory = {"expert_budget": options.budget}
    pairs = _serve_in_turn(options, options.model, memory, options.rounds)
    off, chosen = pairs[-1]
    # Without warming up: auto tries in the beginning, and may read nothing ahead once it has decided.
    ahead = _serve(options, options.model, memory | {"routing": "off", "prefetch": "auto"}, warm_up_tokens=0)
    read_ahead = sum(source.page_ins for source in ahead.prefetch)
    used = sum(source.hits + source.late_hits for source in ahead.prefetch)
    slowest_off, slowest = slowest_steps(pairs)
    return {
        "step-p99": Found(
            100 * (slowest / slowest_off - 1),
            f"{options.budget} resident, of all steps of {len(pairs)} pairs of {options.tokens} tokens of one stream: "
            f"{slowest:.2f} ms, routing off {slowest_off:.2f} ms; "
            f"the last {chosen.tokens_per_second:.0f} and {off.tokens_per_second:.0f} tokens/s",
        ),
        "prefetch": Found(
            100 * used / read_ahead, f"{used} of {read_ahead} prefetched experts were used, prefetch auto"
        )
        if read_ahead
        else Found(None, "prefetch auto read nothing ahead"),
    }


def measure_paging(options: argparse.Namespace) -> dict[str, Found]:
    """Throughput and page-ins of a model that is larger than the memory it is allowed, page cache included."""
    if options.paged_model is not None:
        return _measure_paging(options, options.paged_model)
    try:
        with made_model() as model:
            return _measure_paging(options, model)
    except CannotMakeModel as error:
        reason = Found(None, f"no model of 6 GB can be made here: {error}")
        return {"throughput": reason, "page-in-p99": reason}


def _measure_paging(options: argparse.Namespace, model: Path) -> dict[str, Found]:
    where = f"{options.paged_model.name if options.paged_model else 'a made model of 6 GB'}, {options.paged_memory}"
    try:
        pairs = _serve_in_turn(
            options, model, {"memory": options.paged_memory}, options.paged_rounds, parse_nbytes(options.paged_memory)
        )
    except OSError as error:
        reason = f"{where}: no control group can be made here ({error.strerror}), and the page cache would serve"
        return {"throughput": Found(None, reason), "page-in-p99": Found(None, reason)}
    off, chosen = pairs[-1]
    faster = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in pairs)
    waiting, paging = (statistics.median(getattr(a, name) for a, _ in pairs) for name in ("waiting", "paging"))
    rates = f"the last {chosen.tokens_per_second:.1f} tokens/s, routing off {off.tokens_per_second:.1f}"
    share = (
        f"off, the worker waits for experts {waiting:.0%} of the time, and page-ins are under way {paging:.0%} of it"
    )
    slowest_off, slowest = slowest_steps(pairs)
    rates += f"; p99 of all steps {slowest:.0f} ms, routing off {slowest_off:.0f} ms"
    if waiting < WAITING_OF_A_BOTTLENECK:
        throughput = Found(None, f"{where}: paging is not the bottleneck: {share} ({rates})")
    else:
        throughput = Found(faster, f"{where}, the middle of {len(pairs)} pairs: {rates}; {share}")
    if not off.page_ins:
        return {"throughput": throughput, "page-in-p99": Found(None, f"{where}: no expert was missing")}
    nbytes = f"{format_nbytes(off.loaded_nbytes)}, {format_nbytes(off.disk_nbytes)} from disk"
    page_ins = Found(off.paging_p99_us / 1000, f"{where}, routing off: {off.page_ins} page-ins, {nbytes}")
    return {"throughput": throughput, "page-in-p99": page_ins}


def slowest_steps(pairs: list[tuple[Report, Report]]) -> tuple[float, float]:
    """p99 of a step in ms, with routing off and with the default: of the steps of all pairs together, for in one run of
    256 tokens three steps decide it."""
    off, chosen = zip(*pairs, strict=True)
    return (
        step_p99([time for report in off for time in report.step_ms]),
        step_p99([time for report in chosen for time in report.step_ms]),
    )


def _serve_in_turn(
    options: argparse.Namespace, model: Path, memory: dict[str, str], rounds: int, limit: int | None = None
) -> list[tuple[Report, Report]]:
    """With routing off, and with the default: the machine is not always equally fast."""
    return [
        (_serve(options, model, memory | {"routing": "off"}, limit), _serve(options, model, memory, limit))
        for _ in range(rounds)
    ]


def _serve(
    options: argparse.Namespace,
    model: Path,
    settings: dict[str, str],
    limit: int | None = None,
    *,
    warm_up_tokens: int | None = None,
) -> Report:
    request = serving_request(options, model, settings, limited=limit is not None)
    if warm_up_tokens is not None:
        request = msgspec.structs.replace(request, warm_up_tokens=warm_up_tokens)
    return measure(request, limit)


def serving_request(options: argparse.Namespace, model: Path, settings: dict[str, str], *, limited: bool) -> Request:
    """One stream."""
    common = {"workers": 1, "max_num_seqs": 4, "warm_start": False}
    if limited:
        common["max_model_len"] = options.tokens + 64  # what remains is for experts
    return Request(
        model=str(model),
        settings=common | settings,
        max_tokens=options.tokens,
        warm_up_tokens=options.tokens // 4,
        temperature=1.0,
    )


def stress_request(options: argparse.Namespace) -> Request:
    """Many streams."""
    return Request(
        model=str(options.model),
        settings={"workers": 2, "expert_budget": options.budget, "max_num_seqs": STRESS_STREAMS, "warm_start": False},
        prompts=STRESS_STREAMS,
        max_tokens=options.tokens,
        temperature=1.0,
    )


def measure_stress(options: argparse.Namespace) -> dict[str, Found]:
    """Under the budget for everything that an instance of that expert budget plans for itself."""
    request = stress_request(options)
    planned = measure(msgspec.structs.replace(request, max_tokens=2)).planned_nbytes
    where = f"{STRESS_STREAMS} streams of {options.tokens} tokens, two workers"
    try:
        report = measure(request, planned)
        where += f", in a control group of {format_nbytes(planned)}, nobody killed"
    except OSError as error:
        report = measure(request)
        where += f"; no control group can be made here ({error.strerror}), so processes are weighed only"
    except SystemExit as error:
        return {"memory": Found(float("inf"), f"{where}, in a control group of {format_nbytes(planned)}: {error}")}
    if report.restarts:
        return {"memory": Found(float("inf"), f"{where}: {report.restarts} processes died")}
    return {"memory": Found(100 * report.largest_pss / planned, f"{where}: {format_nbytes(report.largest_pss)}")}


# ---- routing


def measure_routing(model: ModelConfig) -> dict[str, Found]:
    """One bound `route` after the other, timed by the router itself for p99, by the clock for the rest."""
    experts, top_k = model.num_experts, model.experts_per_token
    logits = np.random.default_rng(0).normal(size=(ROUTE_ROWS, experts)).astype(np.float32)
    ids, weights = np.empty(top_k, np.int32), np.empty(top_k, np.float32)
    seconds = {}
    for timing in (False, True):
        with closing(MemoryAwareRouter(RouterConfig(experts, top_k, timing=timing))) as router:
            router.update_cache_state(range(0, experts, 2))
            route, routes, began = router.bind(logits, ids, weights), 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < ROUTE_SECONDS:
                for row in range(ROUTE_ROWS):
                    route(row)
                routes += ROUTE_ROWS
            seconds[timing] = elapsed / routes
            p99 = router.metrics.summary().routing_latency.p99
    how = f"one bound route after another, {experts} experts, top {top_k}, {ROUTE_ROWS} distinct rows"
    return {
        "route-mean": Found(1e6 * seconds[False], how),
        "route-p99": Found(p99, how),
        "routes": Found(1 / seconds[False], how),
    }
