"""A bundle's nginx before real emulators: what reaches clients when engines are silent, full, dead or replaced."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from behind_nginx import ask, kill, many, names, needs_nginx, staged, told, until

from kit.deploy.stage import Stage
from kit.engine_config import EngineConfig

pytestmark = needs_nginx
SILENCE_S = 65  # nginx gives up after 60 where nobody told it otherwise


@pytest.fixture(scope="module", params=["consistent-hash", "sticky-round-robin"])
def stack(tmp_path_factory, request):
    edge = {"balance": request.param}
    with staged(tmp_path_factory.mktemp("edge"), [{"pace": "50,25"}] * 4, edge) as made:
        yield *made, request.param


@pytest.fixture(scope="module", autouse=True)
def silent(tmp_path_factory):
    """A request that takes longer than nginx's own patience, under way while the other tests run."""
    with (
        staged(tmp_path_factory.mktemp("silent"), [{"pace": f"{SILENCE_S}000,5"}]) as (made, _),
        ThreadPoolExecutor(2) as pool,
    ):
        yield [pool.submit(ask, made, stream=stream) for stream in (True, False)]


def session_names(count: int) -> list[str]:
    return [next(names) for _ in range(count)]


def test_tokens_pass_one_by_one(stack):
    answer = ask(stack[0], tokens=40)
    assert (answer.status, answer.tokens, answer.whole) == (200, 40, True)
    assert answer.tokens_at_first == 1
    assert answer.reads > 30


def test_an_answer_without_stream_is_whole(stack):
    answer = ask(stack[0], tokens=8, stream=False)
    assert (answer.status, answer.whole) == (200, True)
    assert b'"completion_tokens": 8' in answer.body


def test_a_session_stays_on_its_replica_and_sessions_spread_evenly(stack):
    made, engines, balance = stack
    finished = lambda: [told(one).histograms["ttft"].count for one in engines]  # noqa: E731
    before, homes = finished(), []
    for session in session_names(200):
        for _ in range(2):
            assert ask(made, session, tokens=1).status == 200
        now = finished()
        homes.append([after - earlier for after, earlier in zip(now, before, strict=True)])
        before = now
    affinity = sum(max(home) == 2 for home in homes) / len(homes)
    loads = [sum(column) / 2 for column in zip(*homes, strict=True)]
    assert affinity >= 0.99
    # A hash deals by chance: 50 +- 6 sessions each. Even is what remembers sessions, the router too (test_routers.py).
    most = 1.05 * 50 if balance == "sticky-round-robin" else 50 + 4.5 * (200 * 0.25 * 0.75) ** 0.5
    assert max(loads) <= most, loads


def test_a_reload_drops_no_stream(stack):
    made, *_ = stack
    answers = many(made, session_names(60), lambda: [made.reload() for _ in range(3)], tokens=60)
    assert [(one.status, one.tokens, one.whole) for one in answers] == [(200, 60, True)] * 60


@pytest.mark.parametrize("balance", ["consistent-hash", "sticky-round-robin"])
def test_a_full_engine_is_passed_over_before_the_first_byte(tmp_path, balance):
    full = {"config": EngineConfig(max_model_len=8192, max_num_seqs=1), "max_num_queued_reqs": 2}
    with staged(tmp_path, [full, {}, {}], {"balance": balance}) as (made, engines), ThreadPoolExecutor(2) as pool:
        direct = Stage(tmp_path, engines[0].launch.base_url, made.key)
        long = [pool.submit(ask, direct, tokens=4000)]
        assert until(lambda: told(engines[0]).running == 1)
        long.append(pool.submit(ask, direct, tokens=4000))
        assert until(lambda: told(engines[0]).waiting == 1)
        assert ask(direct, tokens=1).status == 503
        refused = told(engines[0]).refused
        answers = many(made, session_names(30))
        assert {(one.status, one.whole) for one in answers} == {(200, True)}
        assert told(engines[0]).refused > refused  # some did go there first
        kill(engines[0])
        for one in long:
            one.result()


@pytest.mark.parametrize("balance", ["consistent-hash", "sticky-round-robin"])
def test_a_killed_replica_costs_its_own_streams_alone(tmp_path, balance):
    with staged(tmp_path, [{"pace": "50,25"}] * 4, {"balance": balance}) as (made, engines):
        lost: list[float] = []

        def one_dies() -> None:
            assert until(lambda: sum(told(one).running for one in engines) == 40)
            time.sleep(0.5)  # ten times the pace to a first token: each stream is under way
            lost.append(told(engines[0]).running)
            kill(engines[0])

        answers = many(made, session_names(40), one_dies, tokens=120)
        cut = [one for one in answers if not one.whole]
        assert 0 < len(cut) <= lost[0] < 40
        assert all(one.status == 200 and 0 < one.tokens < 120 for one in cut)  # no second answer follows the first
        assert all(one.tokens == 120 for one in answers if one.whole)
        survivors = sum(told(one).histograms["ttft"].count for one in engines[1:])
        assert survivors == 40 - lost[0]  # nothing was sent again
        after = many(made, session_names(30))
        assert {(one.status, one.whole) for one in after} == {(200, True)}


def test_a_request_that_is_silent_for_longer_than_a_minute_survives(silent: list[Future]):
    streamed, at_once = (one.result() for one in silent)
    assert (streamed.status, streamed.whole, streamed.tokens) == (200, True, 8)
    assert (at_once.status, at_once.whole) == (200, True)
