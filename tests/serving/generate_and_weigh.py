"""Run by test_memory.py in a process of its own: generates within `memory`, and weighs all processes meanwhile.

usage: generate_and_weigh.py MODEL MEMORY WORKERS        prints one JSON object
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

from hotset.runtime import Backend, SamplingParams


def proportional_bytes(pid: int) -> int:
    """A process's share of the memory that it maps (PSS): summed over processes, nothing counts twice."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M))


def main(model: str, memory: str, workers: str) -> None:
    with Backend(model, memory=int(memory), workers=int(workers), max_num_seqs=4) as backend:
        pids = [os.getpid(), backend.coordinator_pid, backend.pager_pid, *backend.worker_pids]
        weights: list[int] = []
        done = threading.Event()

        def weigh() -> None:
            while not done.wait(0.05):
                weights.append(sum(map(proportional_bytes, pids)))

        weigher = threading.Thread(target=weigh)
        weigher.start()
        prompts = [list(range(1 + 10 * start, 200 + 10 * start)) for start in range(4)]
        answers = backend.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True, temperature=0))
        done.set()
        weigher.join()
        stats = backend.stats()
        report = {
            "tokens": [answer.token_ids for answer in answers],
            "planned": backend.plan.memory.total,
            "largest": max(weights),
            "slots": backend.plan.geometry.num_slots,
            "evictions": stats.evictions,
            "restarts": stats.worker_restarts + stats.pager_restarts,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
