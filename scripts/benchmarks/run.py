"""Runs one benchmark, as scripts/bench does: its `main`, and what becomes of its errors, of Ctrl-C and of SIGTERM.

    run.py NAME [option ...]

They end it in order: its instances, memory and folders go with it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

from stress_tests.stop_signals import stop_signals

from hotset.runtime import HotsetError
from hotset.shm.segment import SegmentError


def main(name: str, arguments: list[str]) -> int:
    benchmark = importlib.import_module(name)
    try:
        stop_signals.install()
        return benchmark.main(arguments)
    except KeyboardInterrupt:
        print(f"bench {name}: stopped", file=sys.stderr)
        return 130
    except (HotsetError, SegmentError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
