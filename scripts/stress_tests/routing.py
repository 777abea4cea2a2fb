"""The routing stress test: worker processes route on one arena and use the experts, the real pager loads and evicts.

    scripts/stress --workers 4 --seconds 30 --kill

A run is a sequence of rounds. In the first part of a round everybody works, and with --kill processes are killed at
random; the workers check what they use and what they route, and the parent samples scores and budget. Then the workers
finish their steps, the arena is audited at rest, and a short burst of routing without kills is recomputed in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import posix_ipc
from stress_tests.affinity_replay import TOLERANCE, replay
from stress_tests.arena_audit import ArenaAudit
from stress_tests.checks import Check, Scoreboard
from stress_tests.messages import Planted, StartWorker
from stress_tests.processes import Processes, Unrecoverable
from stress_tests.routing_worker import SCOREBOARD
from stress_tests.score_sampler import ScoreSampler
from stress_tests.stop_signals import stop_signals
from stress_tests.synthetic_experts import SyntheticExperts, classes_of_experts, write_checkpoint

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.config import BackendConfig
from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_slots import expert_budget_nbytes
from hotset.runtime.instance import Instance
from hotset.runtime.metrics import MoeMetrics
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, Section, SlotState
from hotset.shm.segment import (
    PREFIX,
    SHM_FOLDER,
    SegmentError,
    new_instance_name,
    queue_name,
)

FOLDER_PREFIX = "hotset-stress-"
ROUND_SECONDS = 2.5
SAMPLE_SECONDS = 0.005
BURST_CALLS = 400
START_SECONDS = 60.0  # a child's start is an interpreter's; on a busy machine that is slow, but not this slow
MAX_REPORTS = 40  # violations that are told in words; all are counted


def remove_stale_folders() -> None:
    """The checkpoints of runs that were killed; an instance's name begins with its process id."""
    for folder in Path(tempfile.gettempdir()).glob(FOLDER_PREFIX + "*"):
        process = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


class StressRun:
    """One run; `result` may be asked once it is over, however it ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._chance = random.Random(options.seed)
        self._lives = 0
        self.reports: list[str] = []
        self._rounds = self._ambiguous = self._burst_calls = self._peak_nbytes = 0
        self._largest_error = 0.0
        self._elapsed = 0.0
        self._planted_done = False
        self._name = new_instance_name()
        remove_stale_folders()
        self._folder = Path(tempfile.gettempdir()) / (FOLDER_PREFIX + self._name)
        self._folder.mkdir(mode=0o700)

    # ---- the run

    def run(self) -> None:
        options = self._options
        write_checkpoint(
            self._folder,
            num_layers=options.layers,
            num_experts=options.experts,
            top_k=options.top_k,
            seed=options.seed,
        )
        config = BackendConfig(
            model=str(self._folder),
            workers=options.workers,
            expert_budget=options.budget,
            max_num_seqs=1,
            warm_start=False,
        )
        model = ModelConfig.load(self._folder)
        self._plan = plan_instance(config, model, Checkpoint.open(self._folder, model))
        budget_nbytes = expert_budget_nbytes(options.budget, classes_of_experts(options.layers * options.experts))
        self._scoreboard = Scoreboard(
            self._folder / SCOREBOARD, self._plan.geometry.num_processes, self._plan.coordinator_process
        )
        instance = Instance(self._name, self._plan)
        try:
            self._segment, self._arena = instance.segment, instance.arena
            self._experts = SyntheticExperts(self._folder)
            self._audit = ArenaAudit(instance.segment, self._experts, budget_nbytes, self._scoreboard, self.report)
            process = self._plan.coordinator_process
            self._sampler = ScoreSampler(self._segment, process, self._scoreboard)
            self._affinity = ExpertAffinity(AffinityConfig(options.experts), segment=self._segment, process=process)
            with (self._folder / "stderr").open("wb") as log:
                self._processes = Processes(
                    instance,
                    config,
                    self._start_worker,
                    self._audit,
                    self._scoreboard,
                    self.report,
                    self.tell,
                    patience=options.patience,
                    planted=options.plant,
                    log=log,
                    chance=self._chance,
                )
                try:
                    self._run_rounds()
                    self._processes.stop()
                except Unrecoverable:
                    pass
                finally:
                    self._processes.kill_all()
        finally:
            # Once the arena is unmapped its counters cannot be read.
            self._counters = self._read_counters()
            instance.remove()
        self._check_leftovers()

    def _run_rounds(self) -> None:
        processes = self._processes
        processes.wait_for("starting all processes", processes.all_ready, START_SECONDS)
        self._affinity = ExpertAffinity(
            AffinityConfig(self._options.experts),
            segment=self._segment,
            process=self._plan.coordinator_process,
        )
        self._sampler = ScoreSampler(self._segment, self._plan.coordinator_process, self._scoreboard)
        processes.on_worker_death = self._sampler.worker_died
        began = time.monotonic()
        deadline = began + self._options.seconds
        try:
            while (now := time.monotonic()) < deadline:
                self._work(min(deadline, now + ROUND_SECONDS), began)
                processes.pause(START_SECONDS)
                self._problems(Check.SCORES, self._sampler.settle())
                self._audit.quiet(self._options.patience)
                self._burst()
                self._rounds += 1
        finally:
            self._elapsed = time.monotonic() - began

    def _work(self, until: float, began: float) -> None:
        """The first part of a round."""
        processes, options = self._processes, self._options
        processes.run()
        kills = options.kills_per_second if options.kill else 0.0
        next_kill = time.monotonic() + self._chance.expovariate(kills) if kills else float("inf")
        next_line = 0.0
        while (now := time.monotonic()) < until:
            processes.poll(SAMPLE_SECONDS)
            self._problems(Check.SCORES, self._sampler.sample())
            self._audit.budget()
            if now >= next_kill and processes.kill_one():
                next_kill = now + self._chance.expovariate(kills)
            if options.plant and not self._planted_done and now - began > 0.5:
                self._plant()
            if now >= next_line:
                self._progress(now - began)
                next_line = now + (0.2 if sys.stderr.isatty() else 5.0)

    def _burst(self) -> None:
        """Affinity and counts, recomputed."""
        layers = range(self._options.layers)
        scores, _ = self._affinity.snapshot()
        epochs = np.array([self._arena.load_u64(Section.LAYERS, layer, 0) for layer in layers], np.int64)
        activations, tokens = self._activations(), self._count(Counter.ROUTING_DECISIONS)
        logs = self._processes.burst(BURST_CALLS)
        if self._options.plant == "unlogged-activation":
            self._affinity.update([0])
        end_scores, _ = self._affinity.snapshot()
        end_epochs = np.array([self._arena.load_u64(Section.LAYERS, layer, 0) for layer in layers], np.int64)
        expected = replay(self._affinity.config, scores.astype(np.float64), epochs, end_epochs, logs)
        self._burst_calls += sum(len(log) for log, _ in logs)
        self._ambiguous += expected.ambiguous

        self._problems(Check.AFFINITY, expected.problems)
        error = np.maximum(end_scores - expected.highest, expected.lowest - end_scores)
        self._largest_error = max(self._largest_error, float(error.max()))
        self._scoreboard.checked(Check.AFFINITY, error.size)
        self._problems(
            Check.AFFINITY,
            [
                f"the score of expert {e} of layer {layer} is {end_scores[layer, e]:.6f}, in float64 "
                f"{expected.lowest[layer, e]:.6f} to {expected.highest[layer, e]:.6f}"
                for layer, e in np.argwhere(error > TOLERANCE).tolist()
            ],
        )
        self._scoreboard.checked(Check.COUNTS, error.size + epochs.size + 1)
        grown = self._activations() - activations
        self._problems(
            Check.COUNTS,
            [
                f"expert {e} of layer {layer} was activated {grown[layer, e]} times, in the logs "
                f"{expected.activations[layer, e]} times"
                for layer, e in np.argwhere(grown != expected.activations).tolist()
            ],
        )
        if not np.array_equal(end_epochs - epochs, expected.epochs):
            self.report(Check.COUNTS, f"the epochs grew by {end_epochs - epochs}, in the logs by {expected.epochs}")
        routed = self._count(Counter.ROUTING_DECISIONS) - tokens
        if routed != expected.tokens:
            self.report(Check.COUNTS, f"{routed} tokens were counted, {expected.tokens} are in the logs")
        self._sampler.sample()

    # ---- what a run needs

    def _start_worker(self, process: int) -> StartWorker:
        self._lives += 1
        return StartWorker(
            instance=self._name,
            plan=self._plan,
            folder=str(self._folder),
            process=process,
            top_k=self._options.top_k,
            seed=self._options.seed + self._lives,
            popularity_seed=self._options.seed,
            planted=self._options.plant,
        )

    def _plant(self) -> None:
        """A violation that the checks have to find; some are done elsewhere, where they belong."""
        plant: Planted = self._options.plant
        arena = self._arena
        slots = [s for s in range(self._plan.geometry.num_slots) if arena.slot(s)[2] == SlotState.RESIDENT]
        if plant == "stopped-pager":
            os.kill(self._processes.pager_pid, signal.SIGSTOP)
        elif plant == "score":
            rare = int(self._activations()[0].argmin())
            now = arena.load_u64(Section.LAYERS, 0, 0)
            arena.store_u64(Section.AFFINITY, 0, rare, 0xFFFFFF << 40 | now)  # the largest score
        elif not slots:
            return  # again at the next sample
        for slot in slots:
            if plant == "slot-byte":
                self._segment.slots()[slot][77] ^= 1
            elif plant == "format":
                self._segment.view(Section.SLOT_INFO)[slot, 0]["format"] = 0
            elif plant == "slot-length":
                self._segment.view(Section.SLOT_INFO)[slot, 0]["nbytes"] = 100 << 20
        self._planted_done = True

    def report(self, check: Check, text: str) -> None:
        """Counts a violation, and tells it."""
        self._scoreboard.violated(check)
        self.tell(check, text)

    def tell(self, check: Check, text: str) -> None:
        """Keeps the first violations in words."""
        if len(self.reports) < MAX_REPORTS:
            self.reports.append(f"{check.title}: {text}")

    def _problems(self, check: Check, problems: list[str]) -> None:
        for problem in problems:
            self.report(check, problem)

    def _activations(self) -> np.ndarray:
        totals = np.empty((self._options.layers, self._options.experts), np.uint64)
        self._arena.activation_totals(totals)
        return totals.astype(np.int64)

    def _count(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return int(totals[counter])

    def _progress(self, elapsed: float) -> None:
        if self._options.json:
            return
        processes = self._processes
        violated = sum(violations for _, violations in self._scoreboard.totals().values())
        line = (
            f"{elapsed:5.1f} s  {self._count(Counter.ROUTING_DECISIONS):,} routes  "
            f"{self._count(Counter.URGENT_PAGE_INS) + self._count(Counter.PREFETCH_PAGE_INS):,} page-ins  "
            f"{processes.worker_kills}+{processes.pager_kills} kills  {violated} violations"
        )
        print(f"\r{line:<79}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            print(file=sys.stderr)

    def _check_leftovers(self) -> None:
        self._scoreboard.checked(Check.LEFTOVERS)
        if left := sorted(path.name for path in SHM_FOLDER.glob(f"{PREFIX}{self._name}*")):
            self.report(Check.LEFTOVERS, f"in {SHM_FOLDER} there is still {', '.join(left)}")
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.MessageQueue(queue_name(self._name)).close()
            self.report(Check.LEFTOVERS, f"the queue {queue_name(self._name)} is still there")

    # ---- the end

    def _read_counters(self) -> dict[str, Any]:
        routing = MoeMetrics(self._segment).summary().routing_latency
        hits, misses = self._count(Counter.DECODE_EXPERT_HITS), self._count(Counter.DECODE_EXPERT_MISSES)
        return {
            "routes": self._count(Counter.ROUTING_DECISIONS),
            "p50_us": routing.p50,
            "p99_us": routing.p99,
            "expert_uses": hits + misses,
            "hit_rate": hits / max(1, hits + misses),
            "page_ins_urgent": self._count(Counter.URGENT_PAGE_INS),
            "page_ins_prefetch": self._count(Counter.PREFETCH_PAGE_INS),
            "evictions": self._count(Counter.EVICTIONS),
            "evictions_refused": self._count(Counter.EVICTIONS_REFUSED),
        }

    def result(self) -> dict[str, Any]:
        """What --json prints."""
        options, totals = self._options, self._scoreboard.totals()
        return {
            "workers": options.workers,
            "experts": options.experts,
            "top_k": options.top_k,
            "layers": options.layers,
            "budget": options.budget,
            "seed": options.seed,
            "seconds": self._elapsed,
            "rounds": self._rounds,
            **self._counters,
            "routes_per_second": self._counters["routes"] / max(self._elapsed, 1e-9),
            "kills": self._processes.worker_kills + self._processes.pager_kills,
            "worker_kills": self._processes.worker_kills,
            "pager_kills": self._processes.pager_kills,
            "pins_reclaimed": self._processes.pins_reclaimed,
            "slots_interrupted": self._processes.slots_interrupted,
            "activations_uncounted_by_killed_workers": self._sampler.uncounted,
            "affinity_largest_error": max(0.0, self._largest_error),
            "burst_calls": self._burst_calls,
            "burst_calls_with_ambiguous_epochs": self._ambiguous,
            "checks": {
                check.title: {"checked": checked, "violated": violated, "invariant": check.described}
                for check, (checked, violated) in totals.items()
            },
            "violations": sum(violated for _, violated in totals.values()),
            "violations_in_words": self.reports,
            "stderr_of_processes": self.stderr_tail(),
        }

    def remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def stderr_tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / "stderr").read_text()[-4000:]
        return ""


def print_report(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

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


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/stress",
        description="Route concurrently on one arena, and check it. scripts/stress kv is the test of the KV cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long")
    parser.add_argument("--experts", type=int, default=64, help="per layer")
    parser.add_argument("--top-k", type=int, default=6, help="experts per token")
    parser.add_argument("--layers", type=int, default=4, help="of experts")
    parser.add_argument("--budget", default="35%", help="memory for experts: a share of them, or bytes")
    parser.add_argument("--kill", action="store_true", help="kill workers and the pager at random")
    parser.add_argument("--kills-per-second", type=float, default=5.0, help="on the average, with --kill")
    parser.add_argument("--seed", type=int, default=None, help="of logits, weights and kills")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds after which a waiting worker is lost")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    # For the tests of this test: does it find what it is there for?
    parser.add_argument("--plant", choices=get_args(Planted), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "little")
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    stop_signals.install()
    run = StressRun(options)
    try:
        run.run()
        result = run.result()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (HotsetError, SegmentError, ValueError, OSError) as error:
        print(f"scripts/stress: {error}", file=sys.stderr)
        return 2
    finally:
        run.remove_folder()
    if options.json:
        print(json.dumps(result))
    else:
        print(file=sys.stderr)
        print_report(result)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
