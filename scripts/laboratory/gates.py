"""Whether hotset does what it must, measured on a real model: one row per gate, with what was measured and how.

    scripts/gates [--model PATH] [--budget 25%] [--tokens 256] [--rounds 5] [--quality-tokens 24576]
                  [--wanted NAME=NUMBER] [--json]

Exit status 1 when a gate fails, 2 when none fails but some could not be measured: those never count as passed.

Hits and perplexity come from decoding held-out text step by step (`scripts/hitrate --model`), with the instance's own
routing preference and exact routing beside it. Latency, throughput, memory, page-ins and prefetch come from instances
that serve one stream with that budget of experts, each started with the model's files dropped from the page cache;
what is compared with routing off runs in turn with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from serving import measure
from serving_run import Report, Request

from hotset.runtime import HotsetError, MemoryAwareRouter, RouterConfig
from hotset.runtime.config import TRAINED_MODEL, BackendConfig, format_nbytes
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.routing_preference import routing_preference

ROUTE_ROWS = 4096  # distinct: a processor learns 256 by heart
ROUTE_SECONDS = 0.5
STRESS_STREAMS = 8
WAITING_FOR_HALF_AS_FAST_AGAIN = 1 / 3  # with less of the time spent on waiting for experts, none of it makes 1.5x


class Target(msgspec.Struct, frozen=True):
    """What a gate wants: `measured` at least, or at most, `wanted`."""

    name: str
    title: str
    sense: Literal[">=", "<="]
    wanted: float
    unit: str


TARGETS = (
    Target("hit-rate", "G1 hit rate", ">=", 70, "%"),
    Target("perplexity", "G2 perplexity, against exact routing", "<=", 1, "%"),
    Target("step-p99", "G3 p99 of a step, against routing off", "<=", 10, "%"),
    Target("memory", "G4 memory in a stress, of what was planned", "<=", 100, "%"),
    Target("throughput", "throughput, against routing off, where paging is the bottleneck", ">=", 1.5, "x"),
    Target("prefetch", "prefetch accuracy", ">=", 60, "%"),
    Target("page-in-p99", "p99 of a page-in", "<=", 50, "ms"),
    Target("route-mean", "routing, mean", "<=", 10, "us"),
    Target("route-p99", "routing, p99", "<=", 10, "us"),
    Target("routes", "routes per second of one process", ">=", 140_000, "/s"),
)


class Gate(msgspec.Struct, frozen=True):
    """One row. `measured` and `passed` are None where it could not be measured; `how` says why."""

    name: str
    title: str
    measured: float | None
    sense: str
    wanted: float
    unit: str
    passed: bool | None
    how: str


class Found(msgspec.Struct, frozen=True):
    """What was measured for a gate, and how."""

    measured: float | None
    how: str


def judge(target: Target, found: Found) -> Gate:
    passed = None
    if found.measured is not None:
        passed = found.measured >= target.wanted if target.sense == ">=" else found.measured <= target.wanted
    return Gate(target.name, target.title, found.measured, target.sense, target.wanted, target.unit, passed, found.how)


def exit_status(gates: Sequence[Gate]) -> int:
    if any(gate.passed is False for gate in gates):
        return 1
    return 2 if any(gate.passed is None for gate in gates) else 0


# ---- quality


def measure_quality(options: argparse.Namespace, config: BackendConfig) -> dict[str, Found]:
    preference = routing_preference(config)
    command = [
        *(sys.executable, "-P", "-m", "laboratory.hitrate", "--json", "--pool", "shared"),
        *("--model", str(options.model), "--budgets", options.budget.rstrip("%"), "--policies", config.eviction),
        *("--routing", f"off,{preference.policy}", "--strengths", f"{preference.policy}={preference.strength}"),
        *("--tokens", str(options.quality_tokens), "--texts", str(options.texts), "--window", str(options.window)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = Found(None, f"scripts/hitrate ended with status {done.returncode}")
        return {"hit-rate": reason, "perplexity": reason}
    exact, chosen = sorted(json.loads(done.stdout)["rows"], key=lambda row: row["strength"])
    where = f"{options.quality_tokens} held-out tokens, {options.budget} resident, eviction {config.eviction}"
    change = chosen["perplexity_change"]
    return {
        "hit-rate": Found(
            chosen["hit_rate"]["value"],
            f"{where}, routing {preference}; exact routing {exact['hit_rate']['value']:.1f} %",
        ),
        "perplexity": Found(
            change["value"], f"same run, paired; 95 %: {change['low']:+.2f} to {change['high']:+.2f} %"
        ),
    }


# ---- serving


def measure_serving(options: argparse.Namespace, config: BackendConfig) -> dict[str, Found]:
    settings = {"workers": 1, "expert_budget": options.budget, "max_num_seqs": 4, "warm_start": False}

    def serve(warm_up_tokens: int = options.tokens // 4, **changes: Any) -> Report:
        request = Request(
            model=str(options.model),
            settings=settings | changes,
            max_tokens=options.tokens,
            warm_up_tokens=warm_up_tokens,
            temperature=1.0,
        )
        return measure(request)

    # In turn: one run's slowest steps say little, and the machine is not always equally fast.
    pairs = [(serve(routing="off"), serve()) for _ in range(options.rounds)]
    off, chosen = pairs[-1]
    # Without warming up: auto tries in the beginning, and may read nothing ahead once it has decided.
    ahead = serve(0, routing="off", prefetch="auto")
    read_ahead = sum(source.page_ins for source in ahead.prefetch)
    used = sum(source.hits + source.late_hits for source in ahead.prefetch)
    faster = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in pairs)
    slowest = statistics.median(b.step_p99_ms / a.step_p99_ms for a, b in pairs)
    where = f"{options.tokens} tokens of one stream, {options.budget} resident, the middle of {len(pairs)} pairs"
    rates = f"the last {chosen.tokens_per_second:.1f} tokens/s, routing off {off.tokens_per_second:.1f}"
    throughput = Found(faster, f"{where}: {rates}; {off.waiting:.0%} of the time off waits for experts")
    if off.waiting < WAITING_FOR_HALF_AS_FAST_AGAIN:
        throughput = Found(
            None,
            f"paging is not the bottleneck of this model here: {off.waiting:.0%} of the time waits for experts, "
            f"{WAITING_FOR_HALF_AS_FAST_AGAIN:.0%} is the least from which 1.5x can come ({rates})",
        )
    return {
        "step-p99": Found(
            100 * (slowest - 1),
            f"{where}: the last {chosen.step_p99_ms:.2f} ms, routing off {off.step_p99_ms:.2f} ms",
        ),
        "throughput": throughput,
        "page-in-p99": Found(
            off.paging_p99_us / 1000,
            f"{off.page_ins} urgent page-ins, {format_nbytes(off.loaded_nbytes)} in all, routing off",
        )
        if off.page_ins
        else Found(None, "no expert was missing"),
        "prefetch": Found(
            100 * used / read_ahead, f"{used} of {read_ahead} prefetched experts were used, prefetch auto"
        )
        if read_ahead
        else Found(None, "prefetch auto read nothing ahead"),
    }


def measure_stress(options: argparse.Namespace) -> dict[str, Found]:
    """Many streams under the budget for everything that an instance of that expert budget plans for itself."""
    request = Request(
        model=str(options.model),
        settings={"workers": 2, "expert_budget": options.budget, "max_num_seqs": STRESS_STREAMS, "warm_start": False},
        prompts=STRESS_STREAMS,
        max_tokens=options.tokens,
        temperature=1.0,
    )
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


# ---- the report


def run(options: argparse.Namespace) -> list[Gate]:
    config = BackendConfig(model=str(options.model))
    found: dict[str, Found] = {}
    found |= measure_routing(ModelConfig.load(options.model))
    found |= measure_serving(options, config)
    found |= measure_stress(options)
    found |= measure_quality(options, config)
    return [judge(target, found[target.name]) for target in targets(options.wanted)]


def targets(changes: Sequence[str]) -> list[Target]:
    """`changes`: NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for change in changes:
        name, _, number = change.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise ValueError(f"--wanted is {change!r}, expected NAME=NUMBER") from None
        if name not in {target.name for target in TARGETS}:
            raise ValueError(f"there is no gate {name!r}, expected one of {', '.join(t.name for t in TARGETS)}")
    return [msgspec.structs.replace(t, wanted=numbers.get(t.name, t.wanted)) for t in TARGETS]


def print_report(gates: Sequence[Gate]) -> None:
    table = Table(box=None, show_header=False)
    console = Console(highlight=False)
    for gate in gates:
        verdict = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[yellow]not measured[/]"}[gate.passed]
        measured = "-" if gate.measured is None else f"{gate.measured:,.4g}"
        table.add_row(verdict, gate.title, f"{measured} {gate.unit}", f"{gate.sense} {gate.wanted:,.6g} {gate.unit}")
    console.print(table)
    for gate in gates:
        console.print(f"[bold]{gate.name}[/]: {gate.how}", soft_wrap=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=TRAINED_MODEL, help="folder of a checkpoint (the shipped one)")
    parser.add_argument("--budget", default="25%", help="of the experts, resident (25%%)")
    parser.add_argument("--tokens", type=int, default=256, help="generated by each serving run (256)")
    parser.add_argument("--rounds", type=int, default=5, help="serving runs of each kind (5)")
    parser.add_argument("--quality-tokens", type=int, default=24_576, help="decoded for hits and perplexity (24576)")
    parser.add_argument("--texts", type=int, default=12, help="decoded side by side (12)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a context (1024)")
    parser.add_argument("--wanted", action="append", default=[], metavar="NAME=NUMBER", help="another threshold")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if not options.budget.endswith("%"):
        parser.error(f"the budget is {options.budget!r}, expected a percentage of the experts such as 25%")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    options.model = options.model.absolute()
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        targets(options.wanted)
        gates = run(options)
    except (ValueError, OSError, HotsetError) as error:
        print(f"gates: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"model": options.model.name, "gates": msgspec.to_builtins(gates)}))
    else:
        print_report(gates)
    return exit_status(gates)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
