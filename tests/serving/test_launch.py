"""The command: what it prints, and what it leaves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from instances import abandoned, processes_with, wait_until

COMMAND = [sys.executable, "-P", "-m", "hotset.runtime.cli", "generate", "--prompt", "def fibonacci(n):"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def test_text_streams_and_a_table_follows() -> None:
    done = run("--max-tokens", "32", "--workers", "2", "--expert-budget", "50%", "--seed", "1")
    assert done.returncode == 0 and done.stderr == ""
    for name in ("tokens/s", "expert hit rate", "page-ins", "routing", "KV pages used", "experts in memory"):
        assert name in done.stdout


def test_json_is_one_object_with_every_key() -> None:
    done = run("--max-tokens", "32", "--temperature", "0", "--ignore-eos", "--workers", "2", "--json")
    report = json.loads(done.stdout)
    assert {
        "text",
        "token_ids",
        "tokens",
        "tokens_per_second",
        "hit_rate",
        "page_ins",
        "routing_us",
        "kv_pages_used",
        "expert_bytes_resident",
        "expert_bytes_budget",
        "workers",
    } <= report.keys()
    assert report["tokens"] == len(report["token_ids"]) == 32
    assert 0 < report["expert_bytes_resident"] <= report["expert_bytes_budget"]
    assert report["page_ins"]["urgent"] > 0 and report["kv_pages_used"] > 0
    assert report["workers"] == 2


def test_greedy_and_seeded_runs_are_repeatable() -> None:
    for flags in (["--temperature", "0"], ["--seed", "5"]):
        first, second = (json.loads(run(*flags, "--routing", "off", "--json").stdout) for _ in range(2))
        assert first["token_ids"] == second["token_ids"]


def test_several_prompts_run_at_once() -> None:
    flags = ["--prompt", "import os", "--max-tokens", "16", "--temperature", "0", "--routing", "off", "--json"]
    both = json.loads(run(*flags).stdout)
    alone = json.loads(run(*flags[2:]).stdout)
    assert len(both["text"]) == len(both["token_ids"]) == 2
    assert both["token_ids"][0] == alone["token_ids"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_at_once_and_leaves_nothing(how: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--max-tokens", "900", "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == {
        signal.SIGINT: (130, "hotset: interrupted\n"),
        signal.SIGTERM: (143, "hotset: terminated\n"),
        signal.SIGKILL: (-signal.SIGKILL, ""),
    }[how]
    assert wait_until(lambda: not abandoned())


def hears(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("times", [1, 2])
def test_Ctrl_C_at_any_moment_of_the_start_is_one_line_and_leaves_no_process(times: int) -> None:
    for number, delay in enumerate((0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6)):
        mark = f"{os.getpid()}-{times}-{number}"
        process = subprocess.Popen(
            [*COMMAND, "--max-tokens", "900", "--ignore-eos"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HOTSET_TEST": mark},
        )
        # Before that it is Python that is starting, and not yet hotset.
        assert wait_until(lambda process=process: hears(process, signal.SIGTERM))
        time.sleep(delay)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.03)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "hotset: interrupted\n"), f"after {delay} s"
        assert wait_until(lambda mark=mark: not processes_with("HOTSET_TEST", mark)), f"after {delay} s"
        assert not abandoned()


def test_an_answer_that_the_context_cuts_is_announced() -> None:
    done = run("--max-tokens", "100", "--max-model-len", "40", "--ignore-eos", "--json")
    report = json.loads(done.stdout)
    assert report["finish_reason"] == "length"
    [line] = done.stderr.splitlines()
    assert line == (
        f"hotset: --max-tokens is 100, but the answer ends after at most {report['tokens']} tokens: the context holds "
        f"40, and the prompt takes {40 - report['tokens']}"
    )


def test_help_shows_whole_sentences() -> None:
    commands = ["generate", "inspect", "pack", "calibrate"]
    for command in ([], *([name] for name in commands)):
        done = subprocess.run([*COMMAND[:4], *command, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == ""
        assert (
            "and..." not in done.stdout
            and "or..." not in done.stdout
            and "<str>" not in done.stdout.split("Options")[1]
        )
        if not command:
            rows = [line.split() for line in done.stdout.partition("Commands:")[2].strip().splitlines()]
            assert [row[0] for row in rows] == commands
            assert all(row[-1].endswith(".") and not row[-1].endswith("..") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-tokens", "0"], "max_tokens is 0, expected at least 1"),
        (["--temperature", "-1"], "temperature is -1.0, expected"),
        (["--expert-budget", "lots"], "the expert budget is 'lots', expected a share such as '50%', or bytes"),
        (["--routing", "psychic"], "routing is 'psychic', expected one of"),
        (["--prompt", "\udcff"], "the prompt is '\\udcff', expected text: surrogates not allowed"),
        (["--max-model-len", "1"], "tokens, but the context (max_model_len) holds 1"),
    ],
)
def test_a_bad_option_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("hotset: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_the_version_is_that_of_the_distribution() -> None:
    command = [sys.executable, "-P", "-m", "hotset.runtime.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"hotset {importlib.metadata.version('hotset')}\n")
