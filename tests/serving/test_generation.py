"""What a running backend answers."""

from __future__ import annotations

import msgspec
import pytest
from instances import PROMPTS, wait_until

from hotset.runtime import Backend, RequestFailed, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=48, routing="off", ignore_eos=True)


def test_pieces_of_a_stream_make_up_the_generated_text(backend: Backend) -> None:
    pieces = list(backend.stream(PROMPTS[0], GREEDY))
    whole = backend.generate(PROMPTS[0], GREEDY)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert len(whole.token_ids) == 48
    assert pieces[-1].finish_reason == whole.finish_reason == "length"
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_text_is_that_of_the_tokens(backend: Backend) -> None:
    whole = backend.generate(PROMPTS[1], GREEDY)
    assert whole.text == backend.tokenizer.decode(whole.token_ids)
    assert whole.prompt_tokens == len(backend.tokenizer.encode(PROMPTS[1]))


def test_exact_routing_gives_the_same_tokens_with_any_number_of_workers_and_any_budget(backend: Backend) -> None:
    expected = [backend.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
    with Backend(workers=1, expert_budget="100%") as single:
        assert [single.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
    with Backend(workers=3, expert_budget="25%") as three:
        assert [answer.token_ids for answer in three.generate(PROMPTS, GREEDY)] == expected


def test_prompts_served_together_give_the_tokens_of_prompts_served_alone(backend: Backend) -> None:
    alone = [backend.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
    assert [answer.token_ids for answer in backend.generate(PROMPTS, GREEDY)] == alone


def test_a_prompt_longer_than_a_step_gives_the_tokens_of_one_that_is_prefilled_at_once(backend: Backend) -> None:
    prompt = "x = 1\n" * 60
    with Backend(workers=1, max_num_batched_tokens=16) as small_steps:
        assert small_steps.generate(prompt, GREEDY).token_ids == backend.generate(prompt, GREEDY).token_ids


def test_a_seed_repeats_the_draws(backend: Backend) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=24, routing="off")
    first, second = backend.generate(PROMPTS[2], params), backend.generate(PROMPTS[2], params)
    assert first.token_ids == second.token_ids
    other = SamplingParams(temperature=1.0, seed=8, max_tokens=24, routing="off")
    assert backend.generate(PROMPTS[2], other).token_ids != first.token_ids


def test_token_ids_are_as_good_a_prompt_as_text(backend: Backend) -> None:
    ids = backend.tokenizer.encode(PROMPTS[0])
    expected = backend.generate(PROMPTS[0], GREEDY).token_ids
    assert backend.generate(ids, GREEDY).token_ids == expected
    assert backend.generate(ids.tolist(), GREEDY).token_ids == expected


def test_the_text_ends_before_a_stop_string(backend: Backend) -> None:
    whole = backend.generate(PROMPTS[0], GREEDY).text
    stop = whole[10:14]
    params = SamplingParams(temperature=0, max_tokens=48, routing="off", ignore_eos=True, stop=[stop])
    answer = backend.generate(PROMPTS[0], params)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_an_answer_that_a_stop_string_ends_says_what_the_prefix_cache_had(backend: Backend) -> None:
    prompt = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, name):\n        self.name = name\n" * 2
    whole = backend.generate(prompt, GREEDY).text
    stopped = backend.generate(prompt, msgspec.structs.replace(GREEDY, stop=[whole[10:14]]))
    assert stopped.finish_reason == "stop"
    assert stopped.cached_tokens == backend.generate(prompt, GREEDY).cached_tokens > 0


def test_closing_a_stream_frees_its_pages(backend: Backend) -> None:
    stream = backend.stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True))
    next(stream)
    assert backend.stats().kv_pages_used > 0
    stream.close()
    assert wait_until(lambda: backend.stats().kv_pages_used == 0)
    assert backend.stats().requests_running == 0


def test_more_requests_than_rows_wait_and_are_all_served() -> None:
    with Backend(workers=2, max_num_seqs=2, expert_budget="50%") as backend:
        params = SamplingParams(temperature=0, max_tokens=8, routing="off", ignore_eos=True)
        answers = backend.generate(PROMPTS * 3, params)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in answers[:4]] * 3


def test_D6_running_out_of_pages_preempts_and_the_text_is_the_same(backend: Backend) -> None:
    params = SamplingParams(temperature=0, max_tokens=80, routing="off", ignore_eos=True)
    expected = [answer.token_ids for answer in backend.generate(PROMPTS, params)]
    page = backend.plan.geometry.page_nbytes
    with Backend(workers=2, kv_cache_memory=12 * page, expert_budget="50%") as small:
        assert [answer.token_ids for answer in small.generate(PROMPTS, params)] == expected
        assert small.stats().preemptions > 0
        assert small.stats().kv_pages_used == 0


def test_D7_a_request_that_can_never_fit_is_refused_with_both_numbers(backend: Backend) -> None:
    limit = backend.plan.max_model_len
    with pytest.raises(RequestFailed, match=rf"needs {limit + 1} tokens.* holds {limit}"):
        backend.generate([1] * limit, GREEDY)


@pytest.mark.parametrize("prompt", ["", [], [-1], [10**6], [[1, 2]]])
def test_a_prompt_that_is_none_is_refused(backend: Backend, prompt: object) -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(backend.stream(prompt, GREEDY))  # type: ignore[arg-type]


def test_everything_resident_is_all_hits_after_the_warm_up() -> None:
    with Backend(workers=2, expert_budget="100%") as backend:
        backend.generate(PROMPTS[0], GREEDY)  # every expert that it needs is read once
        backend.reset_stats()
        backend.generate(PROMPTS[0], GREEDY)
        stats = backend.stats()
        assert stats.decode_expert_misses == 0 and stats.evictions == 0
        assert stats.decode_hit_rate == 1.0


def test_the_smallest_legal_budget_answers() -> None:
    with Backend(workers=2, expert_budget="8%") as backend:
        assert backend.plan.geometry.num_slots == 10
        answer = backend.generate(PROMPTS[0], GREEDY)
        assert len(answer.token_ids) == 48
        assert backend.stats().evictions > 0


def test_C2_a_shared_beginning_is_computed_once() -> None:
    system = "import os\nimport sys\n\n\nclass Handler:\n    def __init__(self, name):\n        self.name = name\n" * 2
    prompts = [system + question for question in ("\n    def run(", "\n    def close(", "\ndef main():")]
    with Backend(workers=1, expert_budget="50%") as backend:
        first = backend.generate(prompts[0], GREEDY)
        assert first.cached_tokens == 0
        computed = backend.stats().prefill_tokens
        assert computed == first.prompt_tokens
        for prompt in prompts:
            backend.reset_stats()
            answer = backend.generate(prompt, GREEDY)
            shared = len(backend.tokenizer.encode(system)) // 16 * 16
            assert answer.cached_tokens >= shared - 16
            assert backend.stats().prefill_tokens == answer.prompt_tokens - answer.cached_tokens
        with Backend(workers=1, expert_budget="50%") as fresh:
            assert fresh.generate(prompts[2], GREEDY).token_ids == answer.token_ids


def test_C11_exact_requests_do_not_reuse_rows_of_a_cache_preference(backend: Backend) -> None:
    prompt = "def unlikely_to_be_asked_before(argument):\n    return argument\n" * 3
    preferring = SamplingParams(temperature=0, max_tokens=4)
    backend.generate(prompt, preferring)
    assert backend.generate(prompt, GREEDY).cached_tokens == 0
    assert backend.generate(prompt, GREEDY).cached_tokens > 0
    assert backend.generate(prompt, preferring).cached_tokens > 0


@pytest.mark.parametrize(
    ("routing", "option", "strong"),
    [
        ("resnorm", "resnorm_strength", 0.5),
        ("substitute", "substitute_limit", 0.1),
    ],
)
def test_a_preference_measured_by_the_residual_spares_misses_and_at_strength_0_none(
    routing: str, option: str, strong: float
) -> None:
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    exact = msgspec.structs.replace(params, routing="off")
    misses: dict[float, int] = {}
    for strength in (0.0, strong):
        settings = {"expert_budget": "25%", "routing": routing, option: strength, "warm_start": False}
        with Backend(workers=1, **settings) as backend:
            answers = backend.generate(PROMPTS, params)
            stats = backend.stats()
            misses[strength] = stats.decode_expert_misses
            assert (stats.lost_mass > 0) == (strength > 0)
            exact_answers = backend.generate(PROMPTS, exact)
            assert ([a.token_ids for a in answers] == [a.token_ids for a in exact_answers]) == (strength == 0)
            backend.reset_stats()
            preferring = backend.stream(PROMPTS[0], params)
            backend.generate(PROMPTS[1:], exact)  # meanwhile: a step has rows of both kinds
            list(preferring)
            assert (backend.stats().lost_mass > 0) == (strength > 0)
    assert misses[strong] < 0.75 * misses[0.0]


def test_numbers_add_up(backend: Backend) -> None:
    backend.reset_stats()
    answer = backend.generate(PROMPTS[0], GREEDY)
    stats = backend.stats()
    assert stats.decode_tokens == 47  # the first one comes from the prefill
    assert stats.prefill_tokens == answer.prompt_tokens - answer.cached_tokens
    assert stats.decode_expert_hits + stats.decode_expert_misses == 47 * 4 * 4  # layers x top-k, all distinct
    assert 0 < stats.resident_expert_bytes <= stats.expert_budget_bytes
    assert stats.routing_decisions == (stats.decode_tokens + stats.prefill_tokens) * 4
