"""Whatever a program does with a backend, and whatever does not listen: every call ends."""

from __future__ import annotations

from instances import PROMPTS

from hotset.runtime import Backend, SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=4, routing="off", ignore_eos=True)
MORE_THAN_A_SOCKET_TAKES = 1 << 20


def test_parameters_may_be_larger_than_what_a_socket_takes_at_once(backend: Backend) -> None:
    """The worker has nothing to say until it has read all of them."""
    stop = ["x" * MORE_THAN_A_SOCKET_TAKES]
    large = SamplingParams(temperature=0, max_tokens=4, routing="off", ignore_eos=True, stop=stop)
    expected = backend.generate(PROMPTS, SHORT)
    assert [a.token_ids for a in backend.generate(PROMPTS, large)] == [a.token_ids for a in expected]
