"""What the routing stress test prints, on its way and in the end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from stress_tests.arena_counters import ArenaCounters
from stress_tests.checks import Scoreboard
from stress_tests.processes import Processes

from hotset.shm.counters import Counter


def print_progress(elapsed: float, counters: ArenaCounters, processes: Processes, scoreboard: Scoreboard) -> None:
    """One line, which the next one overwrites if it is on a terminal."""
    routes = counters.count(Counter.ROUTING_DECISIONS)
    page_ins = counters.count(Counter.URGENT_PAGE_INS) + counters.count(Counter.PREFETCH_PAGE_INS)
    violated = sum(violations for _, violations in scoreboard.totals().values())
    line = (
        f"{elapsed:5.1f} s  {routes:,} routes  {page_ins:,} page-ins  "
        f"{processes.kills.workers}+{processes.kills.pagers} kills  {violated} violations"
    )
    print(f"\r{line:<79}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        print(file=sys.stderr)


def print_report(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['routes']:,} routes in {result['seconds']:.1f} s, {result['routes_per_second']:,.0f} a second; "
        f"p50 {result['p50_us']:.2f} us, p99 {result['p99_us']:.2f} us per token\n"
        f"{result['worker_kills']} workers and {result['pager_kills']} pagers killed, with "
        f"{result['pins_reclaimed']} pins set and {result['slots_interrupted']} slots half-way\n"
        f"{result['expert_uses']:,} uses of experts, hit rate {result['hit_rate']:.1%}; "
        f"{result['page_ins_urgent']:,} urgent page-ins, {result['page_ins_prefetch']:,} prefetched\n"
        f"affinity: {result['burst_calls']:,} calls in {result['rounds']} bursts recomputed, "
        f"{result['burst_calls_with_ambiguous_epochs']} of ambiguous order, "
        f"largest error {result['affinity_largest_error']:.1e}",
        highlight=False,
    )
    table = Table("", "checked invariant")
    for heading in ("checked", "violated"):
        table.add_column(heading, justify="right")
    for title, check in result["checks"].items():
        table.add_row(title, check["invariant"], f"{check['checked']:,}", f"{check['violated']:,}")
    console.print(table, highlight=False)
    for report in result["violations_in_words"]:
        console.print(report, style="red", highlight=False, markup=False)
    if result["stderr_of_processes"]:
        console.print("The processes wrote to stderr:", result["stderr_of_processes"], markup=False, highlight=False)
