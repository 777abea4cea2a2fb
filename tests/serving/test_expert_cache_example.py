"""The program of README.md that uses an expert cache: a layer of experts computed by an engine of one's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import numpy as np
from hotset.runtime import ExpertCache, RouterConfig

with ExpertCache(expert_budget="25%", processes=2) as cache:  # or ExpertCache("path/of/a/model", ...)
    router = cache.router(RouterConfig(cache.num_experts, cache.experts_per_token, policy="bonus"))
    rng = np.random.default_rng(0)
    hidden, gate = rng.standard_normal((1, 128), np.float32), rng.standard_normal((128, 32), np.float32)
    output = np.zeros_like(hidden)
    experts, weights, _ = router.route_batch(logits := hidden @ gate, layer=1)
    with cache.pinned(1, experts, wanted=router.true_top_k(logits, 1)) as pinned:  # what is missing is being read
        for expert, parts in pinned.items():  # what is in memory comes first
            tokens, ranks = np.nonzero(experts == expert)
            g, u = (hidden[tokens] @ parts.float32(name).T for name in ("gate", "up"))
            output[tokens] += weights[tokens, ranks, None] * ((g / (1 + np.exp(-g)) * u) @ parts.float32("down").T)
        print(output.shape, cache.resident(1)[experts].all())  # (1, 128) True
"""


def test_the_program_runs_as_it_is_printed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", PROGRAM)
