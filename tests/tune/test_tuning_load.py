"""The load of a tuning: slots that are always ready, and windows that send nothing later."""

from itertools import pairwise

from kit import workload
from kit.metrics import peak_in_flight
from kit.scheduler import SchedulerConfig
from kit.simulator import Simulation, SimulationConfig
from kit.simulator.answers import columns
from kit.tune import Offer


class Line:
    """10 ms a step."""

    def step_s(self, chunks, decodes, context):
        return 0.01

    def decode_line(self, decodes):
        return 0.01, 0.0


SLOTS = SimulationConfig(SchedulerConfig(kv_blocks=200_000, max_num_seqs=64))


def test_slots_hold_exactly_so_many_turns_until_enough_were_sent() -> None:
    offer = Offer(workload.load("multi-agent"), 60.0)
    sessions = offer.ready(8, 5, 100)
    assert sessions == offer.ready(8, 5, 100)
    assert {turn.pause_after_s for one in sessions for turn in one.turns} == {0.0}
    assert not any(turn.children for one in sessions for turn in one.turns)
    turns = columns(Simulation(SLOTS, Line(), most=100).run(sessions))
    assert len(turns) == 100
    last_sent_s = turns["arrival_s"].max()
    assert peak_in_flight(turns["arrival_s"], turns["end_s"]) == 8
    for at_s in (0.25 * last_sent_s, 0.9 * last_sent_s):
        assert ((turns["arrival_s"] <= at_s) & (turns["end_s"] > at_s)).sum() == 8


def test_slots_begin_in_the_middle_of_sessions_and_carry_their_context() -> None:
    offer = Offer(workload.load("customer-service"), 60.0)
    first = [one.input_lens()[0] - one.shared_prefix_tokens for one in offer.ready(200, 1, 200)]
    drawn = [one.input_lens() for one in offer.arriving(3)]
    alone = max(lens[0] for lens in drawn) - 800
    assert max(first) > alone  # contexts of later turns
    long = offer.ready(1, 1, 40)[0]
    begun = [index for index, turn in enumerate(long.turns) if turn.compact_to == 0]
    assert begun
    assert all(after - before == 5 for before, after in pairwise(begun))  # five turns a session


def test_nothing_is_sent_after_the_window() -> None:
    offer = Offer(workload.load("simple-chat"), 100.0, sessions=50, burst=10)
    sessions = offer.arriving(1)
    assert sum(one.arrival_s == 50.0 for one in sessions) == 10
    turns = columns(Simulation(SLOTS, Line(), stop_s=100.0).run(sessions))
    assert turns["arrival_s"].max() < 100.0
    assert turns["end_s"].max() > 100.0 or len(turns) > 0
    everything = columns(Simulation(SLOTS, Line()).run(sessions))
    assert len(everything) > len(turns)
