"""`hotset generate`: prompts in, text out, and what it took."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotset.runtime.stop_signals import stop_signals

if TYPE_CHECKING:
    from hotset.runtime.answers import Completion
    from hotset.runtime.backend import Backend
    from hotset.runtime.sampling_params import SamplingParams


def generate(
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Text to continue. Several run at once, spread over the workers.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Checkpoint folder or GGUF file; without it the model that ships."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Only the likeliest tokens of this probability in all.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Only so many of the likeliest tokens; 0 means all.")] = 0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="The answer ends before this string; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Serving processes; default: 2, or 1 on one core.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for everything, such as 4GiB: as many experts as fit are kept."),
    ] = None,
    expert_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Instead, memory for experts alone: 50%, 500MB ...; default: 50%."),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="How experts in memory are preferred: off (exact), bonus, range, mass, resnorm or substitute; "
            "default: substitute.",
        ),
    ] = None,
    eviction: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="Which expert goes: td, affinity, lru, lfu, adaptive, or blends such as lru+affinity; default: td.",
        ),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCES",
            help="What names experts to read ahead: off, auto, gate-ahead, gate-ahead-2, transitions, runners-up, "
            "affinity, or several with + between; default: off.",
        ),
    ] = None,
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Neither begin with the last run's experts nor remember this one's.")
    ] = False,
    read_mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="How experts are read: auto, buffered or direct; default: auto."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest prompt plus answer, in tokens; default: what the model has."),
    ] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for KV pages, such as 64MiB.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="How KV pages are stored: float32, float16, bfloat16, q8_0 or q4_0; default: float32.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and table.")] = False,
) -> None:
    """Continue the prompts, streaming the text as it comes, and say what it took."""
    from hotset.runtime.backend import Backend
    from hotset.runtime.commands.generation_report import generation_report, print_generation_report
    from hotset.runtime.sampling_params import SamplingParams

    settings: dict[str, Any] = {
        "memory": memory,
        "expert_budget": expert_budget,
        "workers": workers,
        "routing": routing,
        "eviction": eviction,
        "prefetch": prefetch,
        "warm_start": not cold_start,
        "read_mode": read_mode,
        "max_model_len": max_model_len,
        "kv_cache_memory": kv_cache_memory,
        "kv_cache_dtype": kv_cache_dtype,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with stop_signals, Backend(model, **settings) as backend:
        if memory is not None:
            _note(backend.plan.memory)
        _note_short_answers(backend, prompt, max_tokens)
        began = time.monotonic()
        completions = _answers(backend, prompt, params, shown=not as_json)
        report = generation_report(completions, time.monotonic() - began, backend.stats())
    print_generation_report(report, as_json)


def _note(sentence: object) -> None:
    print(f"hotset: {sentence}", file=sys.stderr)


def _note_short_answers(backend: Backend, prompts: list[str], max_tokens: int) -> None:
    context = backend.plan.max_model_len
    for number, prompt in enumerate(prompts, 1):
        tokens = len(backend.tokenizer.encode(prompt))
        if tokens < context < tokens + max_tokens:
            which = "the answer" if len(prompts) == 1 else f"answer {number}"
            _note(
                f"--max-tokens is {max_tokens}, but {which} ends after at most {context - tokens} tokens: "
                f"the context holds {context}, and the prompt takes {tokens}"
            )


def _answers(backend: Backend, prompts: list[str], params: SamplingParams, *, shown: bool) -> list[Completion]:
    """All run at once; the first is shown as it comes, and then the others, one after the other."""
    from hotset.runtime.answers import Piece, join_pieces

    streams = [backend.stream(prompt, params) for prompt in prompts]
    completions: list[Completion] = []
    for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        if shown and len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}--- {prompt}", flush=True)
        pieces: list[Piece] = []
        try:
            for piece in stream:
                pieces.append(piece)
                if shown:
                    print(piece.text, end="", flush=True)
        finally:
            if shown and pieces:
                print(flush=True)  # whatever comes now begins a line
        completions.append(join_pieces(0, pieces))
    return completions
