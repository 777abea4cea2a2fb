"""The `hotset` command: what becomes of its errors and of Ctrl-C. What it does is in `commands`."""

from __future__ import annotations

import sys

from hotset.runtime.stop_signals import Stopped, stop_signals


def main() -> None:
    """Runs the command; what goes wrong ends as one sentence and a non-zero status."""
    stop_signals.install()  # first of all: what follows imports for a while
    status = 1
    try:
        status = _run()
    except Stopped:
        pass
    except BaseException:
        if not stop_signals.status:
            raise
        # What failed because it was told to end has nothing more to say.
    stop_signals.uninstall()
    if stop_signals.status:
        print(f"hotset: {stop_signals.words}", file=sys.stderr)
    raise SystemExit(stop_signals.status or status)


def _run() -> int:
    from hotset.runtime.commands import app
    from hotset.runtime.errors import HotsetError

    try:
        app(prog_name="hotset")
    except SystemExit as done:  # typer's, who has said what there was to say
        return done.code if isinstance(done.code, int) else 1
    except (HotsetError, ValueError, OSError) as error:
        if not stop_signals.status:
            print(f"hotset: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
