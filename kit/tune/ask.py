"""A tuning as `kit tune` and notebook 05 ask for it: its load, its machine, and the file that keeps it."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from kit import catalog, measure
from kit.engine_config import EngineConfig
from kit.engines import Engine, launch, start
from kit.engines.control import START_DEADLINE_S
from kit.engines.launch import free_port, port_of
from kit.errors import UserError
from kit.loadgen import Target
from kit.scenario import parallel
from kit.tune.levels import Boot, Goal, Level, Result, Store
from kit.tune.load import Offer
from kit.tune.search import Setup, Tuner, tune
from kit.tune.server import ByHand, NotRestarted, Server
from kit.tune.virtual import VirtualMachine, expected
from kit.workload import Workload, load
from kit.workload.arrivals import Burst

DURATION_S = 60.0  # of an open-loop level
IN_A_BURST = 0.1  # of these sessions come at once beside them
DRAWN = 400  # sessions, for their mean turns
TRIED = (1, 4, 16, 64, 256)
OWN = ("tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype", "gpu_memory_utilization",
       "max_model_len", "max_num_batched_tokens", "enforce_eager")  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is to be tuned, for which load and limits, on which kind of machine."""

    model: str
    gpu: str
    config: EngineConfig
    workload: str
    way: str  # engine_command, base_url, emulate, simulate or recorded
    server: str = ""  # the command or the address
    truth: int | None = None
    slo_ttft_s: float | None = None  # None: the workload's
    slo_tpot_s: float | None = None
    sessions: int | None = None  # expected in duration_s; None: what is predicted to fit
    duration_s: float | None = None
    burst: int | None = None
    loaded: float = 0.8  # of what closed loops carried, where no number of sessions is given

    @classmethod
    def of(
        cls, source: str, model: str, gpu: str, config: EngineConfig, workload: str, *, engine_command: str = "",
        base_url: str = "", truth: int | None = None, **load: Any,
    ) -> "Question":  # fmt: skip
        """A notebook's: emulator (in virtual time), live (the command, or a server as it is) or recorded."""
        live = ("engine_command", engine_command) if engine_command else ("base_url", base_url)
        way, server = {"live": live, "recorded": ("recorded", ""), "emulator": ("simulate", "")}[source]
        return cls(model, gpu, config, workload, way, server, truth if way == "simulate" else None, **load)

    def goal(self) -> Goal:
        """The limits of a turn."""
        own = load(self.workload).slo
        ttft_s, tpot_s = self.slo_ttft_s or own.ttft_s or inf, self.slo_tpot_s or own.tpot_s or inf
        if ttft_s == tpot_s == inf:
            raise UserError(f"--workload {self.workload} has no limits: give --slo-ttft-s or --slo-tpot-s")
        return Goal(ttft_s, tpot_s)

    def setup(self) -> Setup:
        """Model, GPU and flags."""
        return Setup(catalog.model(self.model), catalog.gpu(self.gpu), self.config)

    def offer(self, levels: Sequence[Level]) -> Offer:
        """What arrives: as asked, else a share of what closed loops carried; without a silence before a burst."""
        workload, duration_s = load(self.workload), self.duration_s or DURATION_S
        if isinstance(workload.arrivals, Burst):
            at_once = workload.arrivals.model_copy(update={"at_s": 0.0})
            return Offer(workload.model_copy(update={"arrivals": at_once}), duration_s, self.sessions, self.burst)
        closed = [one for one in levels if one.kind == "closed"]
        sessions = self.sessions or (carried(workload, duration_s, closed, self.loaded) if closed else None)
        return Offer(workload, duration_s, sessions, self.burst or max(1, round(IN_A_BURST * (sessions or 0))))


def carried(workload: Workload, duration_s: float, levels: Sequence[Level], share: float) -> int:
    """Sessions that start within the duration and whose turns are a share of what the best level did in time."""
    best = max(levels, key=lambda one: one.goodput_requests_per_s)
    turn_s = (best.concurrency or 1) / best.requests_per_s
    rng = np.random.default_rng(0)
    drawn = [workload.session.draw(rng, key, 0.0) for key in range(DRAWN)]
    ends = [np.cumsum([turn_s + turn.pause_after_s for turn in one.turns]) for one in drawn]
    left_s = rng.uniform(0, duration_s, DRAWN)
    turns = np.mean([1 + np.searchsorted(end[:-1], left) for end, left in zip(ends, left_s, strict=True)])
    return max(1, round(share * best.goodput_requests_per_s * duration_s / float(turns)))


def predicted(question: Question) -> int | None:
    """max_num_seqs that the modelled engine would want; None where the limits are out of its reach."""
    setup, goal = question.setup(), question.goal()
    machine = VirtualMachine(setup.model, setup.gpu, question.config, question.offer(()), goal)
    boot = machine.boot({"max_num_seqs": setup.most()}, 0)
    levels = [machine.closed_loop(boot, n, 0, 2 * n + 10) for n in TRIED if n <= boot.max_num_seqs]
    return expected(setup, question.offer(levels), goal)


def own_flags(question: Question) -> dict[str, Any]:
    """The user's flags by our names, as an engine gets them beside the tuned ones."""
    spec = catalog.model(question.model)
    config = parallel(spec, question.config)
    given = {name: getattr(config, name) for name in OWN}
    if config.quantization != "fp8" or spec.quantization is not None:
        del given["quantization"]  # other formats need a checkpoint of their own
    given |= {name: None for name in OWN[:2] if given[name] == 1}
    return {name: value for name, value in given.items() if value not in (None, False, "auto")}


@dataclass(frozen=True)
class How:
    """What does not change the question: a tuning may go on with others."""

    max_boots: int = 3
    api_key_env: str | None = None
    start_deadline_s: float = START_DEADLINE_S
    own: bool = True  # False: a command has the user's flags already


def machine(question: Question, offer: Offer, folder: Path, how: How) -> AbstractContextManager[Any]:
    """The machine of that way; leaving its `with` block stops what it started."""
    goal, config, setup = question.goal(), question.config, question.setup()
    own = own_flags(question) if how.own else {}

    def emulator(flags: dict[str, Any], log: Path) -> Engine:
        more = {} if question.truth is None else {"truth": question.truth}
        return measure.emulate(question.model, question.gpu, replace(config, **flags), log, more)

    def command(flags: dict[str, Any], log: Path) -> Engine:
        port = free_port() if "{port}" in question.server else port_of(config.engine, question.server)
        one = launch(config.engine, question.model, own | flags, port=port, command=question.server)
        return start(one, log, deadline_s=how.start_deadline_s)

    if question.way == "recorded":
        return nullcontext(Recorded(folder))
    if question.way == "simulate":
        return nullcontext(VirtualMachine(setup.model, setup.gpu, config, offer, goal, question.truth))
    if question.way == "base_url":
        target = Target(question.server, question.model, api_key_env=how.api_key_env)
        return Server(ByHand(target, config.engine, own, ask=how.max_boots > 1), offer, goal, folder)
    return Server(emulator if question.way == "emulate" else command, offer, goal, folder)


class Recorded:
    """Nothing can be measured: the file holds every level, or it is not enough."""

    def __init__(self, folder: Path) -> None:
        self.missing = UserError(f"recorded run {folder}: its tuning is not complete")

    def __getattr__(self, name: str) -> Any:
        """Refused, whatever it is."""
        raise self.missing


def answer(
    question: Question, folder: Path, how: How, progress: Callable[[Boot | Level], None] = lambda one: None
) -> Result:
    """The result of the tuning; what is in the folder already is not measured again.

    Raises UserError where the folder holds another question.
    """
    if question.way == "engine_command" and "{flags}" not in question.server:
        raise UserError(f"--engine-command {question.server!r}: no {{flags}} in it, where the tuned ones go")
    setup, goal, file = question.setup(), question.goal(), folder / "tuning.jsonl"
    held = _held(file)
    at_first = held.get("expected") if held else predicted(question)
    asked = held if question.way == "recorded" else {**asdict(question), "expected": at_first}
    store, setup = Store(file, asked), replace(setup, expected=at_first)
    with machine(question, question.offer(store.levels), folder, how) as one:

        def tell(seen: Boot | Level) -> None:
            progress(seen)
            one.offer = question.offer(store.levels)

        try:
            return tune(one, setup, goal, store, how.max_boots, tell)
        except NotRestarted as error:
            if not store.boots:
                raise
            sys.stderr.write(f"kit: {error}; what was measured so far is the answer\n")
            return tune(one, setup, goal, store, len(store.boots), tell)


def emulated(question: Question, folder: Path) -> bool:
    """Whether the numbers are a model's: of virtual time, of the emulator, or of a server that says so."""
    if question.way == "base_url":
        return bool(measure.card(Target(question.server, question.model)).get("emulated"))
    held = _held(folder / "tuning.jsonl") if question.way == "recorded" else {}
    return held.get("way", question.way) in ("simulate", "emulate")


def _held(file: Path) -> dict[str, Any]:
    """What the file of a tuning answers; nothing where there is none, or a kill cut its first line."""
    with suppress(FileNotFoundError, ValueError):
        return dict(json.loads(file.read_text(encoding="utf-8").partition("\n")[0])["asked"])
    return {}


def neighbours(
    question: Question, folder: Path, how: How, values: Sequence[int], times: float = 1.0
) -> dict[int, list[Level]]:
    """Open loops on a start with each of these max_num_seqs, at `times` the tuning's load; kept as `answer` does."""
    place = folder / f"neighbours-{times:g}"
    asked = _held(folder / "tuning.jsonl")
    store, offer = Store(place / "tuning.jsonl", asked), question.offer(Store(folder / "tuning.jsonl", asked).levels)
    more = replace(offer, sessions=offer.sessions and round(times * offer.sessions))
    with machine(question, more, place, how) as one:
        tuner = Tuner(one, question.setup(), question.goal(), store, how.max_boots, lambda seen: None)
        return {value: tuner.confirm(value) for value in values}
