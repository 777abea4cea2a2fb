"""The KV stress test: an instance with too little KV memory, whose workers and pager are killed while it is used.

    scripts/stress kv --workers 4 --seconds 30

Clients ask greedily with exact routing, so every answer is known beforehand from an instance that nothing happens to.
Prompts begin alike and share pages, streams are closed halfway, pages are moved together, sequences are preempted and
move between workers. Meanwhile reader processes look at pages from outside (G3), and the bookkeeping is checked (A13).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import posix_ipc
from laboratory.arguments import Parser, model_path, positive, whole
from stress_tests.kv_load import MAX_MODEL_LEN, Load, killer, record_answers
from stress_tests.kv_report import Report, print_report
from stress_tests.page_publication import check_publication
from stress_tests.page_watchers import PageWatchers, change_full_pages
from stress_tests.stop_signals import stop_signals

from hotset.runtime import Backend, HotsetError
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.runtime.model.config import ModelConfig
from hotset.shm.segment import PREFIX, SHM_FOLDER, queue_name

STEP_TOKENS = 32  # so that a prompt takes several steps, of which any may be the last of its worker
PAGES_PER_WORKER = 6  # of a model without windows, whose requests take up to nine: sequences are preempted
PUBLICATIONS = 100_000


def stress(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    chance = random.Random(options.seed)
    say = (lambda text: None) if options.json else (lambda text: print(text, file=sys.stderr, flush=True))
    say("recording the answers of requests that nothing happens to ...")
    answers = record_answers(options.model)
    sizes: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": STEP_TOKENS}
    with Backend(options.model, workers=1, warm_start=False, **sizes) as probe:
        plan = probe.plan
    longest = pages_of_sequence(plan.kv_windows, MAX_MODEL_LEN, plan.geometry.block_size, plan.kv_max_step)
    pages = max(PAGES_PER_WORKER * options.workers * longest * plan.geometry.block_size // MAX_MODEL_LEN, longest + 2)
    kills: Counter[str] = Counter()
    moves = defragmentations = 0
    settings = {"workers": options.workers, "kv_cache_memory": pages * plan.geometry.page_nbytes, "warm_start": False}
    with (
        Backend(options.model, **settings, **sizes) as backend,
        PageWatchers(backend.instance, backend.plan.geometry, options.seed) as watchers,
    ):
        load = Load(backend, answers, report, options.seed)
        load.start()
        murderer = threading.Thread(target=killer, args=(backend, load, chance, kills), daemon=True)
        murderer.start()
        if options.plant:
            planted = backend.instance, backend.plan.geometry, load.stopping
            threading.Thread(target=change_full_pages, args=planted, daemon=True).start()
        begin = told = time.monotonic()
        end = begin + options.seconds
        while time.monotonic() < end and not load.stopping.is_set():
            time.sleep(chance.uniform(0.1, 0.6))
            moves += backend.defragment(chance.choice([None, 1, 4]))
            defragmentations += 1
            problem = backend.check_cache()
            report.check("the bookkeeping is consistent (A13)", problem is None, str(problem))
            if still := load.standing_still():
                report.check("no request stands still", False, f"clients {still}; {backend.stats()}")
                break
            if time.monotonic() - told > 5:
                told = time.monotonic()
                stats = backend.stats()
                say(
                    f"{told - begin:5.0f} s  {load.requests} requests, {load.tokens} tokens, {kills.total()} kills, "
                    f"{stats.preemptions} preemptions, {stats.migrations} migrations, {moves} pages moved"
                )
        load.stopping.set()
        load.join()
        murderer.join()
        deadline = time.monotonic() + 5
        while (stats := backend.stats()).kv_pages_used and time.monotonic() < deadline:
            time.sleep(0.05)
        report.check("all pages come back", not stats.kv_pages_used, f"{stats.kv_pages_used} pages are still used")
        problem = backend.check_cache()
        report.check("the bookkeeping is consistent (A13)", problem is None, str(problem))
        for checked, stale, wrong in watchers.finish():
            report.check("kept pages keep their bytes (G3)", not wrong, f"{wrong} pages changed", times=checked)
            report.check("readers learn of reuse (G3)", True, times=stale)
        name, elapsed = backend.instance, time.monotonic() - begin
    left = [path.name for path in SHM_FOLDER.glob(f"{PREFIX}{name}*")]
    try:
        posix_ipc.MessageQueue(queue_name(name)).close()
        left.append(queue_name(name))
    except posix_ipc.ExistentialError:
        pass
    report.check("nothing is left behind", not left, f"{left}")
    return {
        "seconds": round(elapsed, 1),
        "requests": load.requests,
        "tokens": load.tokens,
        "aborted": load.aborted,
        "failed": dict(load.refused),
        "kills": dict(kills),
        "preemptions": stats.preemptions,
        "migrations": stats.migrations,
        "defragmentations": defragmentations,
        "pages_moved": moves,
        "prefix_cache_hit_rate": round(stats.prefix_cache_hit_rate, 3),
    }


def main() -> int:
    parser = Parser(prog="scripts/stress kv", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--workers", type=whole(1), default=4, help="worker processes; default: 4")
    parser.add_argument("--seconds", type=positive, default=30.0, help="how long; default: 30")
    parser.add_argument(
        "--model", type=model_path, default=None, help="folder of a checkpoint; default: the model that ships"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=None, help="of requests and kills; default: another every time"
    )
    parser.add_argument(
        "--publications", type=whole(1), default=PUBLICATIONS, help=f"pages that G2 publishes; default: {PUBLICATIONS}"
    )
    parser.add_argument("--plant", action="store_true", help="violate an invariant on purpose; the run has to find it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    try:
        ModelConfig.load(options.model or TRAINED_MODEL)
    except HotsetError as error:
        parser.error(str(error))
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    report = Report()
    try:
        stop_signals.install()
        check_publication(report, options.publications)
        result = stress(options, report)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except HotsetError as error:
        report.check("the instance lives", False, str(error))
        result = {}
    result |= {"seed": options.seed, "checks": dict(report.checks), "violations": dict(report.violations)}
    if options.json:
        print(json.dumps(result))
    else:
        print_report(result)
    for words in report.words[:20]:
        print(words, file=sys.stderr)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
