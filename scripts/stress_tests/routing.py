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
import random
import sys
import time
from typing import Any

import posix_ipc
from stress_tests.affinity_replay import WorkerLog
from stress_tests.arena_audit import ArenaAudit
from stress_tests.arena_counters import ArenaCounters
from stress_tests.burst_check import BurstCheck
from stress_tests.checks import Check, Scoreboard
from stress_tests.messages import StartWorker
from stress_tests.planted_violations import plant
from stress_tests.processes import Processes
from stress_tests.routing_options import parse_options
from stress_tests.routing_report import print_progress, print_report
from stress_tests.routing_worker import SCOREBOARD
from stress_tests.run_folder import RunFolder
from stress_tests.score_sampler import ScoreSampler
from stress_tests.stop_signals import stop_signals
from stress_tests.synthetic_experts import SyntheticExperts, classes_of_experts, write_checkpoint
from stress_tests.violations import Unrecoverable, Violations

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.config import BackendConfig
from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_slots import expert_budget_nbytes
from hotset.runtime.instance import Instance
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.shm.segment import (
    PREFIX,
    SHM_FOLDER,
    SegmentError,
    new_instance_name,
    queue_name,
)

ROUND_SECONDS = 2.5
SAMPLE_SECONDS = 0.005
BURST_CALLS = 400
PLANT_SECONDS = 60.0  # so long a run waits at most for the violation that was planted
START_SECONDS = 60.0  # a child's start is an interpreter's; on a busy machine that is slow, but not this slow


class StressRun:
    """One run; `result` may be asked once it is over, however it ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._chance = random.Random(options.seed)
        self._lives = self._rounds = 0
        self._elapsed = 0.0
        self._planted = options.plant is None
        self._name = new_instance_name()
        self.folder = RunFolder(self._name)

    # ---- the run

    def run(self) -> None:
        options, folder = self._options, self.folder.path
        write_checkpoint(
            folder,
            num_layers=options.layers,
            num_experts=options.experts,
            top_k=options.top_k,
            seed=options.seed,
        )
        config = BackendConfig(
            model=str(folder),
            workers=options.workers,
            expert_budget=options.budget,
            max_num_seqs=1,
            warm_start=False,
        )
        model = ModelConfig.load(folder)
        self._plan = plan_instance(config, model, Checkpoint.open(folder, model))
        budget_nbytes = expert_budget_nbytes(options.budget, classes_of_experts(options.layers * options.experts))
        process = self._plan.coordinator_process
        self._scoreboard = Scoreboard(folder / SCOREBOARD, self._plan.geometry.num_processes, process)
        self._violations = violations = Violations(self._scoreboard)
        instance = Instance(self._name, self._plan)
        try:
            self._segment = instance.segment
            self._counters = ArenaCounters(instance.segment)
            self._audit = ArenaAudit(
                instance.segment, SyntheticExperts(folder), budget_nbytes, self._scoreboard, violations.report
            )
            self._sampler = ScoreSampler(self._segment, process, self._scoreboard)
            self._affinity = ExpertAffinity(AffinityConfig(options.experts), segment=self._segment, process=process)
            self._burst_check = BurstCheck(self._affinity, self._counters, self._scoreboard, violations)
            with self.folder.stderr.open("wb") as log:
                self._processes = Processes(
                    instance,
                    config,
                    self._start_worker,
                    self._audit,
                    self._scoreboard,
                    violations,
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
            self._counted = self._counters.of_run()
            instance.remove()
        self._check_leftovers()

    def _run_rounds(self) -> None:
        processes = self._processes
        processes.wait_for("starting all processes", processes.all_ready, START_SECONDS)
        self._sampler = ScoreSampler(self._segment, self._plan.coordinator_process, self._scoreboard)
        processes.on_worker_death = self._sampler.worker_died
        began = time.monotonic()
        deadline = began + self._options.seconds
        try:
            while (now := time.monotonic()) < deadline or self._is_violation_to_come(now - began):
                self._work(min(deadline, now + ROUND_SECONDS) if now < deadline else now + ROUND_SECONDS, began)
                processes.pause(START_SECONDS)
                self._violations.report_all(Check.SCORES, self._sampler.settle())
                self._audit.quiet(self._options.patience)
                self._burst_check.run(self._burst)
                self._sampler.sample()
                self._rounds += 1
        finally:
            self._elapsed = time.monotonic() - began

    def _is_violation_to_come(self, elapsed: float) -> bool:
        """Whether a kill meets a worker that has pins is a matter of chance, and of how fast the machine is."""
        return self._options.plant == "dead-pins" and not self._processes.pins_left and elapsed < PLANT_SECONDS

    def _work(self, until: float, began: float) -> None:
        """The first part of a round."""
        processes, options = self._processes, self._options
        processes.run()
        kills = options.kills_per_second if options.kill else 0.0
        next_kill = time.monotonic() + self._chance.expovariate(kills) if kills else float("inf")
        next_line = 0.0
        while (now := time.monotonic()) < until:
            processes.poll(SAMPLE_SECONDS)
            self._violations.report_all(Check.SCORES, self._sampler.sample())
            self._audit.budget()
            if now >= next_kill and processes.kill_one():
                next_kill = now + self._chance.expovariate(kills)
            if not self._planted and now - began > 0.5:
                self._planted = plant(options.plant, self._segment, self._counters, processes.pager_pid)
            if now >= next_line:
                if not options.json:
                    print_progress(now - began, self._counters, processes, self._scoreboard)
                next_line = now + (0.2 if sys.stderr.isatty() else 5.0)

    def _burst(self) -> list[WorkerLog]:
        logs = self._processes.burst(BURST_CALLS)
        if self._options.plant == "unlogged-activation":
            self._affinity.update([0])
        return logs

    # ---- what a run needs

    def _start_worker(self, process: int) -> StartWorker:
        self._lives += 1
        return StartWorker(
            instance=self._name,
            plan=self._plan,
            folder=str(self.folder.path),
            process=process,
            top_k=self._options.top_k,
            seed=self._options.seed + self._lives,
            popularity_seed=self._options.seed,
            planted=self._options.plant,
        )

    def _check_leftovers(self) -> None:
        self._scoreboard.checked(Check.LEFTOVERS)
        if left := sorted(path.name for path in SHM_FOLDER.glob(f"{PREFIX}{self._name}*")):
            self._violations.report(Check.LEFTOVERS, f"in {SHM_FOLDER} there is still {', '.join(left)}")
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.MessageQueue(queue_name(self._name)).close()
            self._violations.report(Check.LEFTOVERS, f"the queue {queue_name(self._name)} is still there")

    def result(self) -> dict[str, Any]:
        """What --json prints."""
        options, totals, kills = self._options, self._scoreboard.totals(), self._processes.kills
        return {
            "workers": options.workers,
            "experts": options.experts,
            "top_k": options.top_k,
            "layers": options.layers,
            "budget": options.budget,
            "seed": options.seed,
            "seconds": self._elapsed,
            "rounds": self._rounds,
            **self._counted,
            "routes_per_second": self._counted["routes"] / max(self._elapsed, 1e-9),
            "kills": kills.workers + kills.pagers,
            "worker_kills": kills.workers,
            "pager_kills": kills.pagers,
            "pins_reclaimed": self._processes.pins_reclaimed,
            "slots_interrupted": self._processes.slots_interrupted,
            "activations_uncounted_by_killed_workers": self._sampler.uncounted,
            "affinity_largest_error": max(0.0, self._burst_check.largest_error),
            "burst_calls": self._burst_check.calls,
            "burst_calls_with_ambiguous_epochs": self._burst_check.ambiguous,
            "checks": {
                check.title: {"checked": checked, "violated": violated, "invariant": check.described}
                for check, (checked, violated) in totals.items()
            },
            "violations": sum(violated for _, violated in totals.values()),
            "violations_in_words": self._violations.words,
            "stderr_of_processes": self.folder.stderr_tail(),
        }


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    run = StressRun(options)
    try:
        stop_signals.install()
        run.run()
        result = run.result()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (HotsetError, SegmentError, ValueError, OSError) as error:
        print(f"scripts/stress: {error}", file=sys.stderr)
        return 2
    finally:
        run.folder.remove()
    if options.json:
        print(json.dumps(result))
    else:
        print(file=sys.stderr)
        print_report(result)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
