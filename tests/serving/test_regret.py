"""Live regret: what LRU and Belady's MIN would have hit, while serving."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from instances import PROMPTS, wait_until

from hotset.runtime import Backend, SamplingParams


def helpers() -> set[int]:
    """Of all instances that this process started; their coordinators are its children, and they theirs."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"hotset.workers.regret" not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            grandparent = Path("/proc", parent, "stat").read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(grandparent) == os.getpid():
            found.add(int(folder.name))
    return found


def test_stats_say_what_other_policies_would_have_hit_and_serving_does_not_need_it() -> None:
    others = helpers()
    with Backend(workers=2, expert_budget="25%", routing="off") as backend:
        params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
        texts = [completion.text for completion in backend.generate(PROMPTS, params)]
        layer_steps = backend.stats().steps * 4
        assert wait_until(lambda: backend.stats().regret is not None)
        regret = backend.stats().regret
        assert regret is not None
        assert 0 < regret.lru_hit_rate < regret.min_hit_rate < 1
        assert 0 < regret.demands <= layer_steps
        assert 4 / 8 <= regret.crowd <= 4

        (helper,) = helpers() - others
        assert os.getpriority(os.PRIO_PROCESS, helper) == 19
        os.kill(helper, signal.SIGKILL)
        assert wait_until(lambda: backend.stats().regret is None)
        assert [completion.text for completion in backend.generate(PROMPTS, params)] == texts
