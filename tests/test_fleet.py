"""Fleets: nothing is lost silently, hours times price is cost, closed forms, the minute model against the turns."""

import json
from math import exp
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import scenario
from kit.catalog import gpu
from kit.cli import main
from kit.errors import UserError
from kit.fleet import Study, compare
from kit.fleet.capacity import Kind, completed
from kit.fleet.control import Fleet, Group
from kit.fleet.day import FleetDay
from kit.fleet.minutes import Queue, fill, run_minutes
from kit.fleet.study import MONTH_DAYS
from kit.fleet.traffic import each_call
from kit.prices import GpuPrice
from kit.scheduler import SchedulerConfig
from kit.workload import Session, Turn

SLO = {"ttft_s": 0.5, "tpot_s": 0.05}
HOUR = 3600.0


class ConstantSteps:
    """Every step takes the same time."""

    def __init__(self, seconds, api_s=0.0):
        self.seconds, self.api_s = seconds, api_s

    def request_s(self, input_len, at_once):
        return self.api_s

    def step_s(self, chunks, decodes, context):
        return self.seconds

    def decode_line(self, decodes):
        return self.seconds, 0.0


def kind(rated=2.0, step_s=0.02, lead_s=(300.0, 300.0), key="h100-pcie-80gb", api_s=0.0, **limits):
    """A replica that keeps the SLO up to `rated` turns per second and nothing beyond twice that."""
    rates = np.array([rated / 10, rated, rated * 1.01, rated * 2])
    scheduler = SchedulerConfig(**{"kv_blocks": 10_000, **limits})
    curves = {"done_per_s": rates, "in_flight": rates * 2, "kv_cache_usage": rates * 0}
    curves["attainment"] = np.array([1.0, 1.0, 0.5, 0.0])
    return Kind(gpu(key), 1, scheduler, ConstantSteps(step_s, api_s), lead_s, rates, **curves, e2el_s=2.0)


def options(**changes):
    defaults = {"scale_to_fraction": 0.8, "kv_cache_usage_limit": 0.8, "decision_delay_s": 60, "cooldown_s": 360}
    more = {"drain_s": 120, "resume": False, "sticky": True, "interruption": {"mean_s": 1800, "away_s": 600}}
    return SimpleNamespace(**{**defaults, **more, **changes})


def price(usd=2.0, **fields):
    return GpuPrice(gpu="h100-pcie-80gb", on_demand=usd, spot=usd / 2, reserved=usd * 0.7, **fields)


def poisson_sessions(rate, until_s, seed=0, turns=1, output_len=50, pause_s=30.0):
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * until_s) + 10))
    steps = [Turn(100, output_len, pause_s) for _ in range(turns)]
    return [Session(key, float(at), list(steps), 0, 64) for key, at in enumerate(times[times < until_s])]


def calls(counts, per_session=1):
    """So many turns at the start of each minute, `per_session` neighbours of one session."""
    at_s = np.repeat(60.0 * np.arange(len(counts)), counts)
    return at_s, np.arange(len(at_s)) // per_session, np.zeros(len(at_s), int)


MARKETS = st.sampled_from(["on_demand", "spot", "reserved"])
GROUPS = st.lists(st.tuples(MARKETS, st.integers(0, 2), st.integers(0, 3), st.booleans()), min_size=1, max_size=3)


def build(shape, chosen, horizon_s, seed, api_s=0.0, **fields):
    one = kind(api_s=api_s)
    made = [Group(one, market, price(**fields), floor, floor + more, spare) for market, floor, more, spare in shape]
    return Fleet(made, chosen, horizon_s, seed)


@settings(max_examples=12, deadline=None)
@given(GROUPS, st.booleans(), st.booleans(), st.integers(0, 99), st.sampled_from([0.0, 30.0, 120.0]))
def test_every_turn_ends_in_one_count_and_every_hour_is_paid(shape, resume, sticky, seed, notice_s):
    chosen = options(resume=resume, sticky=sticky)
    fleet = build(shape, chosen, HOUR, seed, api_s=seed % 3, interruption_notice_s=notice_s)
    sessions = poisson_sessions(0.3, HOUR, seed, turns=3)
    day = FleetDay(fleet).run(sessions)
    done = completed(day, SLO)
    waiting = len(day.held) + len(day.in_flight)
    unsent = sum(len(state.session.turns) - state.turn - 1 for state, _ in day.held)
    unsent += sum(len(one.owner.session.turns) - one.owner.turn - 1 for one in day.in_flight.values())
    assert day.planned == sum(len(one.turns) for one in sessions)
    assert day.planned == len(done) + day.lost + len(day.refused) + waiting + unsent
    assert day.lost == 0 or not resume
    assert not len(done) or done.residence_s.min() > 0
    lives = fleet.live + fleet.ended
    assert sum(fleet.hours().values()) == pytest.approx(
        sum(max(0.0, min(one.end_s, HOUR) - one.start_s) for one in lives) / 3600
    )
    for one in lives:
        assert one.start_s <= one.ready_s
        assert one.drain_s <= one.end_s
        assert one.group.market == "spot" or not one.reclaimed
    assert day.lost == 0 or any(one.end_s < np.inf for one in lives)


def test_sub_agents_turns_are_in_the_minute_model_as_in_the_days():
    kids = [Session(0, 0.0, [Turn(10, 2, 5.0), Turn(10, 2)], 1, 16), Session(0, 1.0, [Turn(10, 2)], 1, 16)]
    parent = Session(0, 0.0, [Turn(10, 2, 3.0, children=kids), Turn(10, 2)], 0, 64)
    day = FleetDay(build([("on_demand", 1, 0, False)], options(), HOUR, 0)).run([parent])
    done = completed(day, SLO).sort_values("arrival_s")
    made = sorted(each_call(parent))
    assert [call[2] for call in made] == done.input_len.tolist() == [74, 26, 26, 38, 86]
    turn_s = done.residence_s.mean()
    assert [paused + number * turn_s for paused, number, *_ in made] == pytest.approx(done.arrival_s, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(GROUPS, st.booleans(), st.integers(0, 99), st.lists(st.integers(0, 400), min_size=5, max_size=240))
def test_the_minute_model_keeps_every_turn(shape, resume, seed, turns):
    fleet = build(shape, options(resume=resume), HOUR, seed)
    total = run_minutes(fleet, calls(turns, 1 + seed % 3), 0.5, 100.0)
    assert total["completed"] + total["lost"] + total["unfinished"] == pytest.approx(sum(turns), abs=1e-6)
    assert -1e-9 <= total["good"] <= total["completed"] + 1e-6
    assert min(total.values()) >= -1e-6
    assert total["lost"] == 0 or not resume


def test_a_held_turn_delays_what_its_session_sends_next():
    queue = Queue((np.array([10.0, 70.0]), np.zeros(2, int), np.zeros(2, int)), 7200)
    assert queue.minute(0, np.inf, 0.5) == (1, 0, 0)  # no replica: came, not in time, not served
    assert queue.minute(1, np.inf, 0.5) == (0, 0, 0)  # the second waits for the answer to the first
    assert queue.minute(2, 130.0, 0.5) == (0, 0, 1)  # a replica, 120 s after the turn came
    assert queue.minute(3, 180.0, 0.5) == (1, 1, 1)  # so the second comes at 190 s


def test_a_replica_fills_by_what_it_cannot_end():
    one = kind(rated=2.0)  # 2 s a turn, 4 turns per second at most
    assert fill(one, 0.0, 1.0, 60) == (pytest.approx(2.0), pytest.approx(1.0))
    held, met = fill(one, 0.0, 10.0, 60)
    assert held == pytest.approx(60 * (10 - 4), rel=0.05)
    assert met < 0.1
    later, met = fill(one, held, 0.0, 60)
    assert later == pytest.approx(held - 60 * 4, rel=0.05)
    assert met == pytest.approx(0.0, abs=0.01)


def test_losing_work_never_raises_attainment():
    """The same fleet, its spot machines reclaimed more and more often."""
    reached = []
    for mean_s in (1e9, 1800, 900, 450):
        chosen = options(interruption={"mean_s": mean_s, "away_s": 300})
        day = FleetDay(build([("spot", 2, 0, False)], chosen, HOUR, 3)).run(poisson_sessions(0.4, HOUR, turns=3))
        reached.append(completed(day, SLO).good.sum() / day.planned)
        assert (day.lost > 0) == (mean_s < 1e9)
    assert reached[0] == 1.0
    assert reached == sorted(reached, reverse=True)


def test_a_month_always_on_is_720_hours_times_the_price():
    month_s = MONTH_DAYS * 86_400.0
    fleet = build([("on_demand", 3, 0, False)], options(), month_s, 0, discount_fraction=0.1)
    run_minutes(fleet, calls(np.full(43_200, 3)), 0.5, 100.0)
    (hours,) = fleet.hours().values()
    assert hours * fleet.groups[0].price.usd_per_hour("on_demand") == pytest.approx(3 * 720 * 2.0 * 0.9)


def mean_wait_of_md_c(rate, service_s, servers, terms=400):
    """Mean wait of M/D/c: what is there after D is what was left waiting plus the arrivals of D."""
    load = rate * service_s
    arrivals = [exp(-load)]
    for n in range(1, terms):
        arrivals.append(arrivals[-1] * load / n)
    state = np.zeros(terms)
    state[0] = 1.0
    for _ in range(3000):
        left = np.append(state[: servers + 1].sum(), state[servers + 1 :])
        state = np.convolve(left, arrivals)[:terms]
    waiting = np.maximum(np.arange(terms) - servers, 0)
    return float(waiting @ state) / rate


def test_md_c_and_little_within_one_per_cent():
    steps, step_s, servers, rate, horizon_s = 250, 0.004, 4, 2.8, 8000.0
    one = kind(step_s=step_s, max_num_seqs=servers, enable_prefix_caching=False)
    day = FleetDay(Fleet([Group(one, "on_demand", price(), 1, 1)], options(), horizon_s), tick_s=1.0)
    done = completed(day.run(poisson_sessions(rate, horizon_s, 5, output_len=steps)), SLO)
    service_s = steps * step_s
    expected_s = service_s + mean_wait_of_md_c(len(done) / horizon_s, service_s, servers)
    assert done.residence_s.mean() == pytest.approx(expected_s, rel=0.01)
    in_flight = np.mean([held for now, held, *_ in day.timeline if now <= horizon_s])
    assert in_flight == pytest.approx(len(done) / horizon_s * done.residence_s.mean(), rel=0.01)


def test_a_new_machine_comes_after_decision_delay_and_lead_and_stays_for_its_minimum():
    fleet = build([("on_demand", 1, 0, False), ("on_demand", 0, 2, False)], options(), HOUR, 0, minimum_runtime_s=1200)
    burst = [Session(k, 600.0 + k / 40, [Turn(100, 50)]) for k in range(24_000)]  # 40 turns/s for ten minutes
    day = FleetDay(fleet).run(burst)
    extra = [one for one in fleet.live + fleet.ended if one.group is fleet.groups[1]]
    assert [one.start_s for one in extra] == [720.0, 720.0]  # seen at 660, still there a minute later
    assert [one.ready_s for one in extra] == [1020.0, 1020.0]
    assert all(one.end_s - one.start_s >= 1200 for one in extra)
    assert day.planned == len(completed(day, SLO))


def test_notice_lets_turns_finish_and_without_it_they_are_lost_or_sent_again():
    def run(notice_s, resume=False):
        chosen = options(interruption={"mean_s": 900, "away_s": 1e9}, resume=resume)
        shape = [("spot", 2, 0, False), ("on_demand", 1, 0, False)]
        fleet = build(shape, chosen, HOUR, 1, interruption_notice_s=notice_s)
        return FleetDay(fleet).run(poisson_sessions(1.0, HOUR, 2, turns=2))

    assert run(0.0).lost > 0
    assert run(120.0).lost == 0
    again = run(0.0, resume=True)
    assert (again.lost, again.resumed > 0) == (0, True)
    assert len(completed(again, SLO)) == again.planned


def test_speed_weights_share_out_the_sessions_and_stickiness_keeps_them():
    fast, slow = kind(rated=6.0), kind(rated=2.0, key="rtx-5090-32gb", step_s=0.06)
    groups = [Group(fast, "on_demand", price(), 1, 1), Group(slow, "on_demand", price(), 1, 1)]
    for sticky in (True, False):
        day = FleetDay(Fleet(groups, options(sticky=sticky), HOUR))
        done = completed(day.run(poisson_sessions(2.0, HOUR, turns=3, pause_s=20.0)), SLO)
        places = done.groupby("session").replica.nunique()
        assert bool(places.max() == 1) is sticky
        by_load = done.groupby("replica").residence_s.sum()
        assert 1.5 < by_load.max() / by_load.min() < 6 or not sticky


def test_fallback_replaces_what_spot_lacks_and_leaves_when_it_is_back():
    chosen = options(interruption={"mean_s": 1200, "away_s": 900})
    day = FleetDay(build([("spot", 2, 0, False), ("on_demand", 0, 0, True)], chosen, 6 * HOUR, 4))
    day.run(poisson_sessions(0.2, 6 * HOUR))
    spare = [one for one in day.fleet.live + day.fleet.ended if one.group.fallback]
    assert len(spare) > 2
    assert sum(one.end_s < 6 * HOUR for one in spare) > 1


def scenario_of(**fleet):
    case = scenario.load("customer-service-daily")
    chosen = {"sessions_per_day": 500, "gpu": "h100-pcie-80gb", "tier_gpu": "rtx-5090-32gb", **fleet}
    return case.model_copy(update={"fleet": chosen, "conversations_per_day": None})


@pytest.fixture(scope="module")
def result():
    burst = {"at_s": 36_000, "sessions": 200, "over_s": 60}
    study = Study(scenario_of(gpu="l40s-48gb", sessions_per_day=2500, bursts=[burst]), days=2, seed=1)
    return compare(study, "on-demand,spot,burst,scale-to-zero,tiered,per-token-api")


def test_minutes_agree_with_turns_on_a_sampled_day(result):
    for name, row in result["policies"].items():
        for check in row["checks"]:
            assert abs(check["usd_difference_fraction"]) < 0.05, name
            assert abs(check["attainment_difference"]) < 0.02, name


def test_rows_say_what_the_contract_asks(result):
    keys = {
        "usd_per_month", "usd_per_1k_conversations", "usd_per_million_tokens", "slo_attainment_fraction",
        "interruptions", "lost_turns", "gpu_hours", "idle_fraction",
    }  # fmt: skip
    for row in result["policies"].values():
        assert keys <= row.keys()
        paid = sum(one["usd"] for one in row["bill"])
        assert row["usd_per_month"] == pytest.approx(paid * MONTH_DAYS / 2)
        for one in row["bill"]:
            assert one["usd_per_gpu_hour"] is None or one["usd"] == pytest.approx(
                one["gpu_hours"] * one["usd_per_gpu_hour"]
            )
        assert sum(row["gpu_hours"].values()) == pytest.approx(sum(one["gpu_hours"] for one in row["bill"]))
    spot, api = result["policies"]["spot"], result["policies"]["per-token-api"]
    assert spot["interruption_model"] == "hours"
    assert list(spot["other_interruptions"]) == ["monthly"]
    assert spot["interruptions"] > spot["other_interruptions"]["monthly"]["interruptions"]
    assert api["slo_attainment_fraction"] is None
    assert result["policies"]["scale-to-zero"]["lead_outlasts_burst"] is True
    json.dumps(result, allow_nan=False)


def test_the_interval_of_a_replica_goes_into_cost_and_attainment(result):
    rows = result["policies"]
    for name, row in rows.items():
        low, high = row["usd_per_month_interval"]
        assert low <= row["usd_per_month"] <= high
        if name != "per-token-api":
            worst, best = row["slo_attainment_interval"]
            assert worst <= row["slo_attainment_fraction"] <= best
    low, high = rows["on-demand"]["usd_per_month_interval"]
    assert low < high
    assert rows["per-token-api"]["slo_attainment_interval"] is None
    slow, fast = result["capacity"]["mistral-nemo-2407 on l40s-48gb"]["turns_per_s_interval"]
    assert slow < result["capacity"]["mistral-nemo-2407 on l40s-48gb"]["turns_per_s"] < fast


def test_the_cheapest_policy_is_among_those_within_the_slo(result):
    rows = result["policies"]
    best = rows[result["cheapest_meeting_slo"]]
    assert best["slo_attainment_fraction"] >= 0.95
    others = [one for one in rows.values() if (one["slo_attainment_fraction"] or 0) >= 0.95]
    assert best["usd_per_month"] == min(one["usd_per_month"] for one in others)


def test_same_seed_same_answer():
    first, second, other = (Study(scenario_of(gpu="l40s-48gb"), days=1, seed=seed) for seed in (7, 7, 8))
    rows = [first.row("spot")]
    second.kinds = other.kinds = first.kinds
    assert second.row("spot") == rows[0] != other.row("spot")


def test_an_slo_that_nothing_keeps_is_said_with_the_nearest_policy():
    case = scenario_of(sessions_per_day=200).model_copy(update={"slo": {"ttft_s": 0.5, "tpot_s": 0.001}})
    told = compare(Study(case, days=1), "on-demand,scale-to-zero")
    assert told["cheapest_meeting_slo"] is None
    assert told["nearest"] in ("on-demand", "scale-to-zero")


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"burst_gpu": "rtx-5090-32gb"}, "rtx-5090-32gb leaves mistral-nemo-2407 room for 3, fewer than 4 sessions"),
        ({"gpu": "gb200-186gb"}, "no on_demand price of gb200-186gb at any provider"),
        ({"gpuu": "x"}, "unknown field of fleet 'gpuu'; nearest: gpu"),
        ({"cooldown_s": -5}, "cooldown_s must be a number above 0, got -5"),
        ({"sessions_per_day": "many"}, "sessions_per_day must be a number above 0, got 'many'"),
        ({"interruption_model": "daily"}, "unknown interruption_model 'daily'"),
        ({"sessions_per_day": float("inf")}, "sessions_per_day must be a number above 0, got inf"),
        ({"bursts": [{"at": 5}]}, "burst {'at': 5} must have numbers at_s and sessions"),
        ({"bursts": [{"at_s": "noon", "sessions": 5}]}, "must have numbers at_s and sessions"),
        ({"bursts": 5}, "bursts must be a list, got 5"),
        ({"scale_to_fraction": 0}, "scale_to_fraction must be a number above 0 and at most 1, got 0"),
        ({"provider": "azur"}, "unknown provider 'azur'; nearest: azure"),
    ],
)  # fmt: skip
def test_a_fleet_that_cannot_be_is_refused(fleet, message):
    with pytest.raises(UserError, match=message):
        compare(Study(scenario_of(**fleet), days=1), "burst")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "on-demnd"], "unknown policy 'on-demnd'; nearest: on-demand"),
        (["--days", "-3"], "days must be a number above 0, got -3"),
        (["--days", "many"], "--days 'many'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kit", "fleet", "--scenario", "customer-service-daily", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not told.out


def test_the_command_prints_a_table_and_json(monkeypatch, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({
        "model": "llama-3.1-8b", "sessions": 10, "context_tokens": 8192, "workload": "customer-service",
        "gpus": ["l40s-48gb"], "fleet": {"sessions_per_day": 100},
        "prices": {"l40s-48gb": {"on_demand": 1.25}},
    }))  # fmt: skip
    for extra in ([], ["--json"]):
        line = ["kit", "fleet", "--scenario", str(file), "--days", "1", "--policies", "on-demand", *extra]
        monkeypatch.setattr("sys.argv", line)
        main()
        text = capsys.readouterr().out
        if extra:
            row = json.loads(text)["policies"]["on-demand"]
            assert row["usd_per_month"] == pytest.approx(720 * 1.25)
        else:
            assert "on-demand" in text
            assert "modelled" in text
            assert "quoted: l40s-48gb at own: on_demand 1.25 USD" in text
