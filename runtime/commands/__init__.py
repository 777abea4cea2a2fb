"""The commands of `hotset`, one module each. They import what they need when they run, so that help is quick."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from hotset.runtime.commands.calibrate import calibrate
from hotset.runtime.commands.generate import generate
from hotset.runtime.commands.inspect import inspect
from hotset.runtime.commands.pack import pack

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hotset {importlib.metadata.version('hotset')}")
        raise typer.Exit


@app.callback()
def hotset(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve mixture-of-experts models whose experts do not fit in memory.

    hotset COMMAND --help lists a command's options.
    """


app.command(short_help="Continue prompts, streaming the text.")(generate)
app.command(short_help="Say what a model is and how much of it fits.")(inspect)
app.command(short_help="Write a model as the pager reads it best.")(pack)
app.command(short_help="Find how much cache preference a model bears.")(calibrate)
