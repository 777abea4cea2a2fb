"""All interleavings of the residency protocol, with kills: what holds as built, and that planted mistakes are found."""

from __future__ import annotations

import re

import pytest
from race.residency_model import Scenario, Variant, explore_residency

# Each is the smallest pool that the configuration accepts for two workers with one pin and one read lane.
CONTEND = Scenario(wants=((0,), (1,)), resident=(1, 2, 3))  # what one wants is the victim for the other
SHARE = Scenario(wants=((0,), (0,)), resident=(1, 2, 3))  # one load has to serve both
SWAP = Scenario(wants=((0, 1), (1, 0)), resident=(1, 2, 3))  # an expert comes, goes and is wanted again
SWAP_WITHOUT_MESSAGES = SWAP._replace(queue_length=0)  # all are lost, the bits alone have to do
CONTEND_AND_DIE = CONTEND._replace(queue_length=0, kill_worker=True, kills_of_pager=1, timeout=True)
SHARE_AND_DIE = SHARE._replace(kill_worker=True, kills_of_pager=2, timeout=True)
# With two lanes the smallest pool has 2 * 1 + 0 + 2 = 4 slots.
TWO_LANES = Scenario(wants=((0,), (1,)), resident=(1, 2, 3, 4), lanes=2)
TWO_LOADS_AND_DIE = Scenario(
    wants=((0,),), resident=(1, 2, 3), lanes=2, prefetches=(4,), queue_length=0, kills_of_pager=1, timeout=True
)
OVERTAKE = Scenario(wants=((0,), (0,)), resident=(1, 2, 3), prefetches=(0,))  # a prefetch, and then it is wanted
GIVE_WAY = Scenario(wants=((0,), (4,)), resident=(1, 2, 3), prefetches=(4,), queue_length=0)  # it is in the way
GIVE_WAY_AND_DIE = GIVE_WAY._replace(wants=((0, 4),), kills_of_pager=1, timeout=True)
GIVE_SLOT = Scenario(wants=((0, 2),), resident=(1, 2), lanes=2, prefetches=(4,), queue_length=0)
SCENARIOS = {
    "two-lanes": TWO_LANES,
    "two-loads-and-die": TWO_LOADS_AND_DIE,
    "overtake": OVERTAKE,
    "give-way": GIVE_WAY,
    "give-way-and-die": GIVE_WAY_AND_DIE,
    "contend": CONTEND,
    "share": SHARE,
    "swap": SWAP,
    "swap-without-messages": SWAP_WITHOUT_MESSAGES,
    "contend-and-die": CONTEND_AND_DIE,
    "share-and-die": SHARE_AND_DIE,
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_no_wrong_weights_no_lost_request_no_double_residency_no_deadlock(scenario: Scenario) -> None:
    """Without kills not even the 50 ms timeout is needed: every wait ends by a wake."""
    result = explore_residency(scenario, limit=500_000)
    assert result.violation is None, str(result.violation)
    assert result.states > 4_000, "the scenario does not exercise the protocol"


WRONG_WEIGHTS = "computed with weights of"
LOST_REQUEST = r"waits for expert \d, which nobody knows of \(R3\)"
OVERWRITTEN = r"over bytes that are not expert \d's \(R1\)"
LEFT_BEHIND = "somebody waits for ever"


@pytest.mark.parametrize(
    ("mistake", "scenario", "message"),
    [
        ("clear_bit_before_loading", CONTEND, LOST_REQUEST),
        ("check_before_pin", CONTEND, WRONG_WEIGHTS),
        ("evict_without_reading_pins", CONTEND, WRONG_WEIGHTS),
        ("recover_without_request", CONTEND_AND_DIE, LOST_REQUEST),
        ("generation_after_request", SHARE, LEFT_BEHIND),
        ("no_wake_for_what_is_resident", CONTEND, LEFT_BEHIND),
        ("prefetch_clears_urgent_bit", GIVE_WAY, LOST_REQUEST),
        ("overtake_what_was_cancelled", GIVE_WAY, LOST_REQUEST),
        ("free_slot_before_the_lane_stops", GIVE_SLOT, OVERWRITTEN),
        ("publish_what_was_cancelled", GIVE_WAY_AND_DIE, OVERWRITTEN),
        ("decide_before_the_lock", GIVE_WAY_AND_DIE, WRONG_WEIGHTS),
        ("publish_without_wake", OVERTAKE, LEFT_BEHIND),
        ("finish_before_resident", TWO_LANES, LEFT_BEHIND),
    ],
)
def test_a_planted_mistake_is_found(mistake: str, scenario: Scenario, message: str) -> None:
    result = explore_residency(scenario, Variant(**{mistake: True}), limit=500_000)
    assert result.violation is not None, "the mistake was not found"
    assert re.search(message, result.violation.message)
    assert result.violation.schedule
