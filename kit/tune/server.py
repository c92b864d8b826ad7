"""A machine over HTTP: started anew for each boot, or restarted by its owner; its levels measured by kit/loadgen."""

import http.client
import re
import select
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from kit import catalog, loadgen
from kit.engines import Engine
from kit.engines.control import START_DEADLINE_S
from kit.engines.launch import flag_arguments
from kit.errors import UserError
from kit.loadgen import Options, Target
from kit.loadgen.plan import Level as Load
from kit.loadgen.plan import own_arrivals
from kit.measure import card
from kit.metrics import Requests
from kit.telemetry import read_page
from kit.tune.levels import LONGEST_S, Boot, Goal, Level, cut_short, judge
from kit.tune.load import Offer

GRACE_S = 60.0  # nobody can be asked: a script may restart the server within this
POLL_S, ANSWER_S = 0.5, 10.0
LIMIT = re.compile(r'"?(?:max_num_seqs|max_running_requests)"?[=:] ?(\d+)')  # vLLM (developer mode), SGLang
Begin = Callable[[dict[str, Any], Path], Engine | Target]


class NotRestarted(UserError):  # noqa: N818
    """The server's owner did not restart it with the flags asked for."""


class Server:
    """An engine behind HTTP as a tuning's machine; leaving its `with` block stops what it started."""

    def __init__(self, begin: Begin, offer: Offer, goal: Goal, folder: Path) -> None:
        self.begin, self.offer, self.goal, self.folder = begin, offer, goal, folder
        self.engine: Engine | None = None

    def boot(self, flags: Mapping[str, Any], index: int) -> Boot:
        """The engine up with these flags, by our names."""
        self.stop()
        up = self.begin(dict(flags), self.folder / f"boot-{index}.log")
        self.engine = up if isinstance(up, Engine) else None
        target = Target(up.launch.base_url, "") if isinstance(up, Engine) else up
        self.target = replace(target, model=card(target)["id"])
        limit = max_num_seqs(target) or int(flags["max_num_seqs"])
        started_s = self.engine.started_s if self.engine else None
        return Boot(index, dict(flags), limit, pool(up), started_s)

    def closed_loop(self, boot: Boot, concurrency: int, seed: int, min_turns: int) -> Level:
        """Slots that send their next turn when one ends; it stops when so many were sent."""
        turns = min_turns + 2 * concurrency
        sessions = self.offer.ready(concurrency, seed, turns)
        load = Load("", sessions, "concurrency", concurrency, concurrency, duration_s=LONGEST_S, turns=turns)
        return self._measure(boot, "closed", seed, load, concurrency)

    def open_loop(self, boot: Boot, seed: int, max_concurrency: int | None = None) -> Level:
        """Sessions as they arrive."""
        load = own_arrivals(self.offer.arriving(seed), self.offer.duration_s)
        return self._measure(boot, "open", seed, replace(load, max_concurrency=max_concurrency), max_concurrency)

    def _measure(self, boot: Boot, kind: str, seed: int, load: Load, concurrency: int | None) -> Level:
        name = f"boot-{boot.index}-{kind}-{concurrency or 'all'}-{seed}"
        options = Options(self.goal.slo_ttft_s, self.goal.slo_tpot_s, log=lambda line: None)
        place = self.folder / "levels" / name
        (summary,) = loadgen.measure(self.target, [replace(load, name=name)], options, place, {"level": name})
        server = summary["server"] | {"kv_cache_usage_max": summary["server"]["kv_cache_usage"]}
        client = [f"the client was the limit: {reason}" for reason in summary["verdict_reasons"]]
        rows = pd.read_json(place / "requests.jsonl", lines=True)
        columns = {one.name: rows[one.name].to_numpy(float) for one in fields(Requests) if one.name != "ok"}
        requests = Requests(**columns, ok=rows["ok"].to_numpy(bool))
        prompts = rows["prompt_tokens"].fillna(rows["input_len"]).to_numpy(float)
        warnings = (*client, *summary["warnings"])
        warnings += cut_short((load.turns or 0) - summary["sent"], summary["duration_s"])
        return judge(boot, kind, seed, requests, prompts, self.goal, server, concurrency, warnings)

    def stop(self) -> None:
        """Stop the engine that was started, if any."""
        if self.engine is not None:
            self.engine.stop()
        self.engine = None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass
class ByHand:
    """A server that its owner restarts: tells the flags and waits until it answers again."""

    target: Target  # its model: the asked one
    engine: str
    own: dict[str, Any]  # flags of the user's
    ask: bool  # False: measured as it is
    first: bool = True

    def __call__(self, flags: dict[str, Any], log: Path) -> Target:
        """Its address, up with these flags as far as it tells. Raises NotRestarted."""
        wanted = int(flags["max_num_seqs"])
        if self.first:  # one that does not answer at all is a mistake
            check_model(self.target)
        if self.ask and max_num_seqs(self.target) != wanted:
            asked = " ".join(flag_arguments(self.engine, self.own | flags)[0])
            sys.stderr.write(
                f"\nStart the server with: {asked}\nWaiting until {self.target.base_url} answers again ..\n"
            )
            if sys.stdin.isatty():
                sys.stderr.write("(Enter: it runs with these flags already)\n")
            self._wait(wanted, asked)
        self.first = False
        check_model(self.target)
        return self.target

    def _wait(self, wanted: int, asked: str) -> None:
        someone, gone = sys.stdin.isatty(), False
        until = time.monotonic() + GRACE_S
        while someone or time.monotonic() < until:
            up, told = answers(self.target), max_num_seqs(self.target)
            entered = someone and bool(select.select([sys.stdin], [], [], 0)[0]) and bool(sys.stdin.readline())
            if up and (told == wanted or (told is None and (gone or entered))):
                return
            if up and (gone or entered):
                sys.stderr.write(f"It runs with {told}, not {wanted}\n")
            if up == gone:  # it went down, or came back
                until = time.monotonic() + (GRACE_S if up else START_DEADLINE_S)
            gone = not up
            time.sleep(POLL_S)
        if not (self.first and up):
            raise NotRestarted(f"--base-url {self.target.base_url}: not restarted with {asked}")
        sys.stderr.write("It was not restarted and nobody can be asked here: measured as it is\n")


def check_model(target: Target) -> None:
    """Refuses a server that serves another model than the asked one."""
    found = card(target)
    names = [str(found[name]) for name in ("id", "root") if found.get(name)]
    if not any(_same(name, target.model) for name in names):
        raise UserError(
            f"--base-url {target.base_url} serves {' = '.join(dict.fromkeys(names))}, not --model {target.model}"
        )


def _same(served: str, asked: str) -> bool:
    if Path(served).name.lower() == Path(asked).name.lower():
        return True
    try:
        return catalog.model(served).key == catalog.model(asked).key
    except UserError:
        return False


def answers(target: Target) -> bool:
    """Whether it serves now."""
    try:
        return bool(card(target))
    except UserError:
        return False


def max_num_seqs(target: Target) -> int | None:
    """The limit that the server runs with, where it says so."""
    for path in ("/server_info?config_format=json", "/get_server_info"):
        try:
            found = LIMIT.search(_get(target, path))
        except (OSError, ValueError, http.client.HTTPException):
            continue
        if found:
            return int(found[1])
    return None


def pool(up: Engine | Target) -> int | None:
    """Tokens of the KV cache: of the log of an engine that was started, else of the metrics page."""
    try:
        if isinstance(up, Engine):
            return up.kv_cache_tokens()
        page = read_page(_get(up, "/metrics"))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return int(page.kv_cache_tokens) if page and page.kv_cache_tokens else None


def _get(target: Target, path: str) -> str:
    with urllib.request.urlopen(target.root + path, timeout=ANSWER_S) as answer:
        return str(answer.read().decode(errors="replace"))
