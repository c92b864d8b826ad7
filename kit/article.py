"""The article's lines beside what the kit computes: each verdict follows from the numbers.

data/article.yaml holds the claims, the article's figures and which calculation answers each. A claim
`holds` where our number agrees with its figure, `holds with a condition` where only the number under
the named condition does, and `does not hold` otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from kit import budget, scenario
from kit.catalog import GpuSpec, ModelSpec
from kit.catalog import gpu as find_gpu
from kit.catalog import model as find_model
from kit.catalog.paths import DATA, load_yaml
from kit.decision import decide
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.memory.sessions import Demand
from kit.memory.startup import start_up
from kit.predict import Ask, predict
from kit.units import GB

VERDICTS = ("holds", "holds with a condition", "does not hold")
HEADINGS = ("line", "the article says", "its figure (quoted)", "ours (modelled)", "verdict", "why")


@dataclass(frozen=True, slots=True)
class Line:
    """One claim with the article's figure, our number, the number under a condition, the verdict."""

    id: str
    claim: str
    figure: str
    ours: float
    on_condition: float | None
    verdict: str
    reason: str

    @property
    def shown(self) -> str:
        """Our numbers as text."""
        numbers = [f"{n:,.0f}" if n >= 1000 else f"{n:.3g}" for n in (self.ours, self.on_condition) if n is not None]
        return "; on condition ".join(numbers)


def lines(notebook: str, found: Mapping[str, float] | None = None) -> list[Line]:
    """The lines that a notebook answers, by its two digits: those computed, or those that what it `found` answers."""
    records = load_yaml(DATA / "article.yaml")["lines" if found is None else "measured"]
    return [line(record, found) for record in records if notebook in record["notebooks"]]


def rows(notebook: str, measured: Mapping[str, float] | None = None) -> list[dict[str, str]]:
    """A notebook's lines as a table reads them."""
    found = lines(notebook, measured)
    texts = ((one.id, one.claim, one.figure, one.shown, f"**{one.verdict}**", one.reason) for one in found)
    return [dict(zip(HEADINGS, text, strict=True)) for text in texts]


def table(section: str, notebook: str) -> list[dict[str, str]]:
    """A table of data/article.yaml (opening, contradictions), our numbers filled into its texts."""
    return [
        {name: text.format(**_also(record)) for name, text in record.items() if name not in ("notebooks", "also")}
        for record in load_yaml(DATA / "article.yaml")[section]
        if notebook in record["notebooks"]
    ]


def patterns() -> list[dict[str, str]]:
    """The four compute patterns: the scenario that answers each, and what holds it."""
    rows = []
    for record in load_yaml(DATA / "article.yaml")["patterns"]:
        case = scenario.load(record["scenario"])
        models = ", ".join(role.model for role in case.models) or case.model
        asked = f"{case.sessions} sessions of {case.context_tokens:,} tokens: {models}"
        held = ", ".join(filter(None, (_holds(case, key) for key in case.gpus)))
        rows.append({**record, "asks for": asked, "held by": held})
    return rows


def _holds(case: scenario.Scenario, key: str) -> str:
    """How many of that GPU hold a scenario, in replicas where one node does not; empty for never."""
    spec = find_model(case.model)
    found = decide(case, spec, find_gpu(key), case.config(spec, gpu_count=case.gpu_count), case.demand())
    if key in found["fitting_gpus"]:
        return f"{case.gpu_count}x {key}"
    if found["recommended"] and not case.models:
        return f"{found['recommended']['gpu_count']}x {key}"
    node = found["replicas"]
    return f"{node['replicas']} replicas of {node['gpu_count']}x {key}" if node and not case.models else ""


def line(record: Mapping[str, Any], found: Mapping[str, float] | None = None) -> Line:
    """A record of data/article.yaml, computed, or looked up in what was found."""
    numbers = [compute(record[name], found) for name in ("ours", "condition") if name in record]
    verdict = VERDICTS[next((rank for rank, number in enumerate(numbers) if agrees(number, record["rule"])), 2)]
    ours, condition = numbers[0], numbers[1] if len(numbers) > 1 else None
    reason = record["reason"].format(ours=ours, condition=condition, **_also(record), **(found or {}))
    return Line(record["id"], record["claim"], f"{record['figure']} {record['unit']}", ours, condition, verdict, reason)


def agrees(number: float, rule: Mapping[str, float]) -> bool:
    """Whether a number agrees with the article's figure.

    >>> agrees(24.7, {"about": 24, "within": 0.05}), agrees(37, {"at_least": 50})
    (True, False)
    """
    if "about" in rule:
        return abs(number - rule["about"]) <= rule["within"] * rule["about"]
    return rule.get("at_least", -inf) <= number <= rule.get("at_most", inf)


def compute(asked: Mapping[str, Any] | str, found: Mapping[str, float] | None = None) -> float:
    """The number of one `{name: {arguments}}` of data/article.yaml; keys become what they name.

    A text alone names a number that was found.
    """
    if isinstance(asked, str):
        return (found or {})[asked]
    ((name, given),) = asked.items()
    return float(CALCULATIONS[name](**{key: KINDS.get(key, lambda one: one)(value) for key, value in given.items()}))


def _also(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: compute(asked) for name, asked in record.get("also", {}).items()}


def _held(model: ModelSpec, gpu: GpuSpec, sessions: int = 1, context_tokens: int = 4096, **flags: Any) -> scenario.Held:
    config = EngineConfig(**{"max_model_len": context_tokens, **flags})
    return scenario.hold(model, gpu, config, Demand(context_tokens, sessions))


def _sessions(**asked: Any) -> int:
    try:
        return _held(**asked).answer.max_concurrent_sessions
    except UserError:  # flags that no engine starts with
        return 0


def _required_gb(**asked: Any) -> float:
    held = _held(**asked)
    return held.answer.required_bytes * held.memory.config.gpu_count / GB


def _bare_gb(models: list[ModelSpec], context_tokens: int = 0, sessions: int = 1) -> float:
    tokens = context_tokens * sessions
    return sum(2 * model.parameters + model.kv_bytes_per_token() * tokens for model in models) / GB


def _share_sum(case: scenario.Scenario, gpu: GpuSpec, gpu_count: int = 1, **flags: Any) -> float:
    packings = scenario.pack_roles(case, gpu, EngineConfig(gpu_count=gpu_count, **flags))
    return 1 - min(packing.leftover_bytes for packing in packings) / gpu.memory_bytes


def _overhead(of: str, model: ModelSpec, gpu: GpuSpec) -> float:
    memory = _held(model, gpu).memory
    sizes = {"weights": memory.weights.size_bytes, "card": gpu.memory_bytes}
    return (sizes["card"] - sizes["weights"] - memory.kv_cache_bytes) / sizes[of]


def _ready_s(model: ModelSpec, storage: str, end: int | None = None) -> float:
    start = start_up(2 * model.parameters, storage)
    return start.weights_s if end is None else start.total_s(warm_host=True)[end]


def _prefill_s(model: ModelSpec, gpu: GpuSpec, tokens: int, gpu_count: int = 1) -> float:
    return 2 * model.active_parameters * tokens / (gpu.flops_per_s("bf16") * gpu_count)


def _ttft_multiple(case: scenario.Scenario, gpu: GpuSpec, queue: int = 0) -> float:
    tokens = case.input_tokens_first_turn * (queue + 1)
    return (case.slo["ttft_s"] or inf) / _prefill_s(find_model(case.model), gpu, tokens)


def _paused_kept(case: scenario.Scenario, gpu: GpuSpec, **flags: Any) -> int:
    spec = find_model(case.model)
    held = scenario.hold(spec, gpu, case.config(spec, **flags), case.demand())
    return max(0, int(held.memory.concurrency(case.context_tokens)) - case.sessions)


def _predicted(
    model: ModelSpec, gpu: GpuSpec, answer: str, concurrency: int, end: int | None = None, input_tokens: int = 1000,
    output_tokens: int = 200, **flags: Any,
) -> float:  # fmt: skip
    found = predict(model, gpu, EngineConfig(**flags), Ask(input_tokens, output_tokens, concurrency))
    if answer == "all_tokens_per_s":
        return float(found["requests_per_s"]) * (input_tokens + output_tokens)
    return float(found[answer] if end is None else found["intervals"][answer][end])


def _replica(case: scenario.Scenario, gpu: GpuSpec, gpu_count: int = 1) -> budget.Machine:
    spec = find_model(case.model)
    return budget.machine(spec, gpu, case.config(spec, gpu_count=gpu_count))


def _ttft_over_decode(case: scenario.Scenario, gpu: GpuSpec, gpu_count: int = 1, *, keep_kv: bool = True) -> float:
    found = budget.task(_replica(case, gpu, gpu_count), case, keep_kv=keep_kv)
    return float(found["ttft_s"] / found["decode_s"])


def _day_tokens(case: scenario.Scenario, counts: str) -> float:
    """Of all conversations of a day: output, what every turn sends again and adds, or what is new in it."""
    first, added, output = case.input_tokens_first_turn, case.tokens_added_per_turn, case.output_tokens_per_turn
    sent = sum(case.growth_tokens) - output * case.turns
    each = {"output": output * case.turns, "sent": sent, "new": first + (added + output) * (case.turns - 1)}
    return float((case.conversations_per_day or 0) * each[counts])


KINDS: dict[str, Callable[[Any], Any]] = {
    "model": find_model, "models": lambda names: [*map(find_model, names)], "gpu": find_gpu, "case": scenario.load,
}  # fmt: skip
CALCULATIONS: dict[str, Callable[..., float]] = {
    "sessions": _sessions,  # that one replica holds
    "together": lambda count, **asked: count * _sessions(**asked),  # sessions of several engines on one GPU
    "required_gb": _required_gb,  # of the engine's share on all GPUs, sessions included
    # fewest of one node that hold the sessions on one replica
    "gpus": lambda **asked: next((n for n in scenario.COUNTS if _held(**asked, gpu_count=n).answer.fits), inf),
    "bare_gb": _bare_gb,  # parameters and KV cache in 16 bits
    "kv_gb": lambda model, context_tokens: model.kv_bytes_per_token() * context_tokens / GB,
    "share_sum": _share_sum,  # what a scenario's engines take of the fullest GPU, as a multiple
    # fewest GPUs over which a scenario's engines fit
    "engine_gpus": lambda case, gpu: next((n for n in range(1, 9) if _share_sum(case, gpu, n) <= 1), inf),
    "total_gb": lambda gpu: gpu.memory_bytes / GB,
    "usable_gb": lambda **asked: _held(**asked).memory.budget.size_bytes / GB,
    "share": lambda **asked: _held(**asked).memory.config.gpu_memory_utilization,
    "overhead": _overhead,  # neither weights nor KV cache, as a fraction of the weights or the card
    "ready_s": _ready_s,  # low (0) or high (1) end, machine and image there; without an end the weights alone
    "cold_s": lambda model, storage, end: start_up(2 * model.parameters, storage).total_s()[end],  # from nothing
    "wake_s": lambda model, gpu: 2 * model.parameters / gpu.pcie_bytes_per_s,
    "prefill_s": _prefill_s,  # at the datasheet's full rate: a lower bound
    "ttft_multiple": _ttft_multiple,  # TTFT limit over the prefill bound, prompts queued before it
    "burst_calls": lambda case, counts: case.arrivals["count"] * (case.turns if counts == "sessions" else 1),
    "growth": lambda case: case.growth_tokens[-1] / case.growth_tokens[0],  # of a session's KV cache, by the last turn
    "ratio": lambda of, to: compute(of) / compute(to),
    "predicted": _predicted,  # of a closed loop; end 0 or 1 of its interval
    "phase": lambda model, gpu, rate: budget.phases(model, gpu)[rate],  # a rate of one GPU alone
    "kept_limits": lambda case, gpu, preset, streams: budget.judge(  # share of turns within a preset's limits
        _replica(case, gpu), case, streams, budget.preset(preset)
    )["slo_attainment_fraction"],
    "ttft_over_decode": _ttft_over_decode,  # what halving each would save of a task's time in the model, as a ratio
    "day_tokens": _day_tokens,
    "peak_tokens_per_s": lambda case: _day_tokens(case, "output") / 86_400 * case.arrivals["peak_to_mean"],
    "paused_kept": _paused_kept,  # paused sessions that stay in the pool beside the active ones
}
