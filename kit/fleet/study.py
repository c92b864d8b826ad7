"""Policies side by side: sized from the load, run by the minute and by the turn, priced from the book."""

import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from math import ceil, inf
from types import SimpleNamespace
from typing import Any

import numpy as np

from kit import prices, scenario
from kit.catalog import gpu as find_gpu
from kit.catalog import model as find_model
from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError, unknown
from kit.fleet.capacity import RAMP_S, Kind, completed, measure
from kit.fleet.control import TICK_S, Fleet, Group
from kit.fleet.day import FleetDay
from kit.fleet.minutes import run_minutes
from kit.fleet.traffic import DAY_S, Tier, Traffic
from kit.memory.startup import start_up
from kit.metrics import PASSING_ATTAINMENT
from kit.simulator import replica
from kit.steptime import fitted

MONTH_DAYS = 30  # 720 hours
INTERVAL_DAYS = 7  # from which intervals are told
Parts = list[tuple[list[Group], Tier]]


class Study:
    """One scenario's load, replicas and prices; `row` runs a policy over the days."""

    def __init__(self, case: scenario.Scenario, days: float = 30, seed: int = 0, today: dt.date | None = None) -> None:
        data = load_yaml(DATA / "fleet.yaml")
        self.policies, self.interruptions = data["policies"], data["interruptions"]
        given = data["defaults"] | case.fleet
        known = data["defaults"] | {"days": 1, "sessions_per_day": 1}
        for name, value in {"days": days, **case.fleet}.items():
            if name not in known:
                raise unknown("field of fleet", name, data["defaults"], shown=30)
            share = name.endswith(("_fraction", "_limit"))
            number = isinstance(value, int | float) and 0 <= value <= (1 if share else 1e9)
            if isinstance(known[name], int | float) and not (number and (value or (not share and name != "days"))):
                raise UserError(f"{name} must be a number above 0{' and at most 1' * share}, got {value!r}")
            if isinstance(known[name], list) and not isinstance(value, list):
                raise UserError(f"{name} must be a list, got {value!r}")
        for burst in given["bursts"]:
            values = burst.values() if isinstance(burst, dict) else [None]
            numbers = all(isinstance(value, int | float) and 0 <= value < inf for value in values)
            if not (numbers and {"at_s", "sessions"} <= burst.keys() <= {"at_s", "sessions", "over_s"}):
                raise UserError(f"fleet: burst {burst!r} must have numbers at_s and sessions, and may have over_s")
        if given["interruption_model"] not in self.interruptions:
            raise unknown("interruption_model", given["interruption_model"], self.interruptions)
        self.case, self.days, self.seed, self.today = case, days, seed, today or dt.date.today()
        self.slo: dict[str, float | None] = {"ttft_s": None, "tpot_s": None, **case.slo}
        self.settings, self.book = SimpleNamespace(**given), prices.own_prices(case.prices) + prices.book()
        self.traffic = Traffic(case, self.settings, days, seed)
        minutes = (self.traffic.calls(0, days * DAY_S)[0] // TICK_S).astype(int)
        self.turns_per_s = np.bincount(minutes, minlength=ceil(days * DAY_S / TICK_S)) / TICK_S
        self.peak_per_s, self.kinds = float(self.turns_per_s.max()), dict[tuple[str, str], Kind]()

    def kind(self, gpu_key: str, model_key: str) -> Kind:
        """A replica of the model on that GPU, its capacity simulated once; refused where the model leaves no room."""
        if (key := (gpu_key, model_key)) not in self.kinds:
            gpu, model = find_gpu(gpu_key), find_model(model_key)
            count = self.case.gpu_count if model_key == self.case.model else 1
            config = scenario.parallel(model, self.case.config(model, gpu_count=count))
            held = scenario.hold(model, gpu, config, self.case.demand())
            if (room := held.answer.max_concurrent_sessions) < self.settings.min_sessions:
                asked = f"{self.settings.min_sessions} sessions of {self.case.context_tokens:,} tokens"
                raise UserError(f"{gpu_key} leaves {model_key} room for {room}, fewer than {asked} (see kit size)")
            limits, steps, _ = replica(model, gpu, config)
            limits = replace(limits, enable_prefix_caching=self.settings.prefix_caching)
            lead_s = start_up(held.memory.weights.size_bytes * count, self.settings.storage).total_s()
            factor = fitted(model, gpu, held.memory.config).tpot_factor
            load = limits, steps, self.traffic.workload, self.slo, self.traffic.tokens
            again = partial(measure, *load, ramp_s=RAMP_S / 3)
            self.kinds[key] = Kind(gpu, count, limits, steps, lead_s, **measure(*load), factor=factor, slower=again)
        return self.kinds[key]

    def price(self, gpu: str, market: str) -> prices.GpuPrice:
        """The row of the book, or the user's, for that GPU and market."""
        if row := prices.find(gpu, market, self.book, self.settings.provider):
            return row
        raise UserError(f"no {market} price of {gpu} at {self.settings.provider or 'any provider'}: give one in prices")

    @cached_property
    def gpu(self) -> str:
        """The chosen GPU, or of the scenario's the one whose replicas for the peak cost least, the SLO first."""
        if self.settings.gpu:
            return str(self.settings.gpu)
        costs, reasons = {}, []
        for gpu in self.case.gpus:
            try:
                usd, kind = self.price(gpu, "on_demand").usd_per_hour("on_demand"), self.kind(gpu, self.case.model)
                costs[gpu] = kind.target_per_s == 0, usd * ceil(self.peak_per_s / kind.rated_per_s)
            except UserError as error:
                reasons.append(str(error))
        if not costs:
            raise UserError(f"no GPU can be used: {'; '.join(reasons) or 'the scenario names none in gpus'}")
        return min(costs, key=lambda gpu: costs[gpu])

    def parts(self, policy: str, end: int | None = None) -> Parts:
        """The machines of a policy by their share of the sessions, sized for an end of the capacity's interval."""
        settings, tiered = self.settings, self.policies[policy].get("tiers")
        edge = settings.tier_fraction if tiered else 0.0
        tiers = [(settings.tier_gpu, settings.tier_model, 0.0, edge)] * bool(edge)
        tiers.append((self.gpu, self.case.model, edge, 1.0))
        return [(self._groups(policy, gpu, model, high - low, end), (low, high)) for gpu, model, low, high in tiers]

    def _groups(self, policy: str, gpu: str, model: str, share: float, end: int | None) -> list[Group]:
        """The machines for a share of the load: for its peak, its mean, or what repays a reservation."""
        made: list[Group] = []
        for one in self.policies[policy]["groups"]:
            key = self.settings.burst_gpu or gpu if one.get("burst") else gpu
            kind = self.kind(key, model)
            kind = kind if end is None else kind.ends[end]
            price, rated = self.price(key, one["market"]), kind.rated_per_s
            loads = {"peak": share * self.peak_per_s, "mean": share * float(self.turns_per_s.mean())}
            loads["missing"] = loads["peak"] - sum(group.floor * group.kind.rated_per_s for group in made)
            most = {name: max(1, ceil(load / rated)) for name, load in loads.items()}
            if one.get("size") == "baseline":
                list_price = self.price(kind.gpu.key, "on_demand")
                repaid = price.usd_per_hour("reserved") / list_price.usd_per_hour("on_demand")
                busy = [(self.turns_per_s > number * rated).mean() for number in range(most["peak"])]
                most["baseline"] = max(1, sum(fraction >= repaid for fraction in busy))
            floor, ceiling = most[one["size"]] if "size" in one else 0, most["missing"] if one.get("scaled") else 0
            made.append(Group(kind, one["market"], price, floor, ceiling, "fallback" in one))
        return made

    def run(self, parts: Parts, model: str, first_s: float, last_s: float, *, whole: bool) -> dict[str, Any]:
        """Figures of a window, every turn simulated (whole) or by the minute, under one model of interruptions."""
        total, bill = Counter[str](), list[dict[str, Any]]()
        self.settings.interruption = self.interruptions[model]
        for groups, tier in parts:
            fleet = Fleet(groups, self.settings, last_s - first_s, self.seed)
            if whole:
                day = FleetDay(fleet)
                good = completed(day.run(self.traffic.sessions(first_s, last_s, tier)), self.slo).good
                out: dict[str, Any] = {"completed": len(good), "good": int(good.sum()), "planned": day.planned}
                out |= {"lost": day.lost, "resumed": day.resumed, "refused": len(day.refused)}
            else:
                calls = self.traffic.calls(first_s, last_s, tier, groups[0].kind.e2el_s)
                out = run_minutes(fleet, calls, self.slo["ttft_s"], self.traffic.stay_s)
                out["planned"] = len(calls[0])
            ended = [one for one in fleet.live + fleet.ended if one.reclaimed and one.end_s < fleet.horizon_s]
            total.update({**out, "interruptions": len(ended)})
            for group, hours in fleet.hours().items():
                total["possible"] += hours * 3600 * group.kind.rated_per_s  # type: ignore[assignment]
                usd, paid = group.price.usd_per_hour(group.market), hours * group.kind.gpu_count
                what = {"gpu": group.kind.gpu.key, "market": group.market, "usd_per_gpu_hour": usd}
                bill.append(what | {"gpu_hours": paid, "usd": paid * usd})
        total["unfinished"] = total["planned"] - total["completed"] - total["refused"] - total["lost"]
        return self._figures(total, bill, last_s - first_s) | {"method": "turns" if whole else "minutes"}

    def _figures(self, total: Counter[str], bill: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        usd, share = sum(one["usd"] for one in bill), seconds / DAY_S / self.days
        conversations, hours = len(self.traffic.starts_s) * share, Counter[str]()
        for one in bill:
            hours[one["gpu"]] += one["gpu_hours"]
        tokens = conversations * (self.traffic.prompt_tokens + self.traffic.output_tokens)
        counted = ("planned", "completed", "refused", "lost", "resumed", "unfinished")
        return {
            "usd_per_month": usd * MONTH_DAYS * DAY_S / seconds,
            "usd_per_1k_conversations": usd / conversations * 1e3 if conversations else None,
            "usd_per_million_tokens": usd / tokens * 1e6 if tokens else None,
            "slo_attainment_fraction": total["good"] / total["planned"] if total["planned"] else None,
            "interruptions": total["interruptions"], "lost_turns": total["lost"], "gpu_hours": dict(hours),
            "idle_fraction": max(0.0, 1 - total["completed"] / total["possible"]) if total["possible"] else None,
            "turns": {name: float(total[name]) for name in counted}, "bill": bill,
        }  # fmt: skip

    def row(self, policy: str) -> dict[str, Any]:
        """A policy's figures; a month is checked against sampled days, spot shown under both interruption models."""
        record, settings, end_s, whole = self.policies[policy], self.settings, self.days * DAY_S, self.days <= 1
        if record.get("api"):
            return self._api()
        parts = self.parts(policy)
        groups = [group for part, _ in parts for group in part]
        chosen, spot = settings.interruption_model, any(group.market == "spot" for group in groups)
        result = self.run(parts, chosen, 0, end_s, whole=whole) | {"interruption_model": chosen if spot else None}
        result |= self._intervals(policy, parts, result)
        others = [name for name in self.interruptions if spot and name != chosen]
        result["other_interruptions"] = {name: self.run(parts, name, 0, end_s, whole=whole) for name in others}
        result["checks"] = []
        for day in [] if whole else [day for day in settings.sampled_days if day + 1 <= self.days]:
            by = [self.run(parts, chosen, day * DAY_S, (day + 1) * DAY_S, whole=full) for full in (False, True)]
            if not by[1]["turns"]["planned"]:
                continue
            gap = by[0]["slo_attainment_fraction"] - by[1]["slo_attainment_fraction"]
            cost = by[0]["usd_per_month"] / by[1]["usd_per_month"] - 1
            result["checks"].append({"day": day, "attainment_difference": gap, "usd_difference_fraction": cost})
        told = [group.price.told(self.today) for group in groups]
        return result | {"prices": told, "replicas": [group.floor for group in groups], **self._lead(groups)}

    def _intervals(self, policy: str, parts: Parts, central: Mapping[str, Any]) -> dict[str, Any]:
        """90 %: USD of the policy sized for slow and for fast machines, attainment of this fleet if they are such."""
        usd, met = [central["usd_per_month"]], [central["slo_attainment_fraction"]]
        window: Any = self.settings.interruption_model, 0, min(self.days, INTERVAL_DAYS) * DAY_S
        for end in (0, 1):
            same = [([replace(one, kind=one.kind.ends[end]) for one in groups], tier) for groups, tier in parts]
            usd.append(self.run(self.parts(policy, end), *window, whole=False)["usd_per_month"])
            met.append(self.run(same, *window, whole=False)["slo_attainment_fraction"])
        attainment = None if None in met else (min(met), max(met))
        return {"usd_per_month_interval": (min(usd), max(usd)), "slo_attainment_interval": attainment}

    def _lead(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Seconds from signal to service of the scaled machines against the median burst above the fixed ones."""
        lead_s = [self.settings.decision_delay_s + end for end in groups[-1].kind.lead_s]
        fixed = sum(group.floor * group.kind.rated_per_s for group in groups)
        bursts = [len(list(run)) * TICK_S for above, run in groupby(self.turns_per_s > fixed) if above]
        if not bursts or not any(group.ceiling for group in groups):
            return {"lead_time_s": None, "burst_s": None, "lead_outlasts_burst": None}
        burst_s = float(np.median(bursts))
        return {"lead_time_s": lead_s, "burst_s": burst_s, "lead_outlasts_burst": lead_s[0] > burst_s}

    def _api(self) -> dict[str, Any]:
        """The token price times the tokens; nobody publishes its attainment, so that is unknown."""
        load, price = self.traffic, prices.token_price(find_model(self.case.model).key)
        if price is None:
            raise UserError(f"no per-token price of {self.case.model} in data/prices.yaml")
        usd = price.input * (load.prompt_tokens - load.resent_tokens) + price.output * load.output_tokens
        usd = (usd + (price.cached or price.input) * load.resent_tokens) * len(load.starts_s) / 1e6
        bill = [{"gpu": "", "market": "per_token", "usd_per_gpu_hour": None, "gpu_hours": 0.0, "usd": usd}]
        figures = self._figures(Counter(), bill, self.days * DAY_S)
        figures |= {"usd_per_month_interval": (figures["usd_per_month"],) * 2, "gpu_hours": {}}
        unknowns = ("slo_attainment_interval", "interruption_model", "lost_turns", "interruptions", "turns")
        figures |= dict.fromkeys(unknowns) | {"method": "quoted", "other_interruptions": {}, "checks": []}
        return figures | {"prices": [price.told(self.today)]}


def compare(study: Study, policies: str = "all", tell: Callable[[str], object] = str) -> dict[str, Any]:
    """Each policy's row, the cheapest that meets the SLO for 95 % of the turns, or the nearest where none does.

    Each policy's name goes to `tell` before it is played.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    names = list(study.policies) if policies == "all" else policies.split(",")
    if wrong := [name for name in names if name not in study.policies]:
        raise unknown("policy", wrong[0], [*study.policies, "all"])
    for name in names:
        tell(f"{name} ...\n")
        try:
            rows[name] = study.row(name)
        except UserError as error:
            if policies != "all":
                raise
            skipped[name] = str(error)
    reached = {name: row["slo_attainment_fraction"] or 0.0 for name, row in rows.items()}
    meeting = [name for name, fraction in reached.items() if fraction >= PASSING_ATTAINMENT]
    capacity = {}
    for (gpu, model), one in study.kinds.items():  # the ends of those that were used are known
        interval = [end.target_per_s for end in vars(one).get("ends", ())] or None
        capacity[f"{model} on {gpu}"] = {"turns_per_s": one.target_per_s, "turns_per_s_interval": interval}
    return {
        "policies": rows,
        "cheapest_meeting_slo": min(meeting, key=lambda name: rows[name]["usd_per_month"], default=None),
        "nearest": None if meeting else max(reached, key=lambda name: reached[name], default=None),
        "skipped": skipped, "gpu": study.gpu, "capacity": capacity, "slo": study.case.slo, "days": study.days,
        "conversations": len(study.traffic.starts_s),
    }  # fmt: skip
