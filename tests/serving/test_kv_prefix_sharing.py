"""Section C of the acceptance cases through a coordinator with two workers: what a prompt finds of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hotset.runtime import Backend, SamplingParams

ONE = SamplingParams(temperature=0, max_tokens=1, routing="off", ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, routing="off", ignore_eos=True)


def three_pages(case: int) -> list[int]:
    """C of the acceptance cases, in token ids that no other case uses."""
    return [token for page in range(3) for token in [300 + 10 * case + page] * 16]


def hit(backend: Backend, prompt: Sequence[int]) -> int:
    return backend.generate(list(prompt), ONE).cached_tokens


def test_C1_C2_a_second_prompt_shares_the_common_pages(backend: Backend) -> None:
    c = three_pages(1)
    assert [hit(backend, c + [3] * 7), hit(backend, c + [3] * 5)] == [0, 48]


def test_C5_the_last_token_is_always_computed(backend: Backend) -> None:
    c = three_pages(2)
    assert [hit(backend, prompt) for prompt in (c, c, [*c, 9])] == [0, 32, 48]


@pytest.mark.parametrize(("common", "expected"), [(40, 32), (15, 0), (48, 48)])
def test_C12_hits_are_whole_pages(backend: Backend, common: int, expected: int) -> None:
    c = three_pages(3)
    backend.generate(c, ONE)
    assert hit(backend, c[:common] + [5 + common] * (64 - common)) == expected


def test_C12_a_page_counts_only_behind_its_own_prefix(backend: Backend) -> None:
    c = three_pages(4)
    backend.generate(c, ONE)
    assert hit(backend, [5] * 16 + c[16:32] + [1]) == 0


def test_C13_a_part_of_a_cached_prompt_is_found(backend: Backend) -> None:
    c = three_pages(5)
    backend.generate(c, ONE)
    assert hit(backend, c[:32] + [7] * 16) == 32


def test_C4_C15_what_was_evicted_is_not_found_and_its_pages_serve_others(backend: Backend) -> None:
    prompts = [[500 + number] * 100 for number in range(4)]
    expected = [answer.token_ids for answer in backend.generate(prompts, SHORT)]
    page_nbytes = backend.plan.geometry.page_nbytes
    with Backend(workers=2, max_model_len=128, kv_cache_memory=8 * page_nbytes, expert_budget="50%") as small:
        for _ in range(2):  # eight pages: each prompt takes those of the one before
            answers = [small.generate(prompt, SHORT) for prompt in prompts]
            assert [answer.token_ids for answer in answers] == expected
            assert [answer.cached_tokens for answer in answers] == [0, 0, 0, 0]
        assert small.check_cache() is None


def test_C16_two_computations_of_the_same_prompt_survive_each_other(backend: Backend) -> None:
    prompt = three_pages(6)
    streams = [backend.stream(prompt, SHORT) for _ in range(2)]  # one on each worker, neither finds the other
    first, second = ([token for piece in stream for token in piece.token_ids] for stream in streams)
    assert first == second == backend.generate(prompt, SHORT).token_ids
    assert hit(backend, [*prompt[:16], 1]) == 16
    assert backend.check_cache() is None
