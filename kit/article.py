"""The article's lines beside what the kit computes: each verdict follows from the numbers.

data/article.yaml holds the claims, the article's figures and which calculation answers each. A claim
`holds` where our number agrees with its figure, `holds with a condition` where only the number under
the named condition does, and `does not hold` otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from kit import scenario
from kit.catalog import gpu as find_gpu
from kit.catalog import model as find_model
from kit.catalog.paths import DATA, load_yaml
from kit.decision import replicas
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.memory.sessions import Demand
from kit.memory.startup import start_up
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


def lines(notebook: str) -> list[Line]:
    """The lines that a notebook answers, by its two digits."""
    records = load_yaml(DATA / "article.yaml")["lines"]
    return [line(record) for record in records if notebook in record["notebooks"]]


def rows(notebook: str) -> list[dict[str, str]]:
    """A notebook's lines as a table reads them."""
    return [
        dict(zip(HEADINGS, (one.id, one.claim, one.figure, one.shown, f"**{one.verdict}**", one.reason), strict=True))
        for one in lines(notebook)
    ]


def table(section: str, notebook: str) -> list[dict[str, str]]:
    """A table of data/article.yaml (opening, contradictions), our numbers filled into its texts."""
    return [
        {name: str(record[name]).format(**_also(record)) for name in record["columns"]}
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
        held = [text for text in (_holds(case, key) for key in case.gpus) if text]
        rows.append({**record, "asks for": asked, "held by": ", ".join(held)})
    return rows


def _holds(case: scenario.Scenario, key: str) -> str:
    """How many of that GPU hold a scenario, in replicas where one node does not; empty for never."""
    spec, card = find_model(case.model), find_gpu(key)
    config = case.config(spec, gpu_count=case.gpu_count)
    one = scenario.row(case, spec, card, config, case.demand())
    if one["fits"] or case.models:
        return f"{case.gpu_count}x {key}" if one["fits"] else ""
    if fewest := scenario.smallest_count(spec, card, config, case.demand()):
        return f"{fewest.memory.config.gpu_count}x {key}"
    node = replicas(spec, card, config, case.demand())
    return f"{node['replicas']} replicas of {node['gpu_count']}x {key}" if node else ""


def line(record: Mapping[str, Any]) -> Line:
    """A record of data/article.yaml, computed."""
    ours = compute(record["ours"])
    condition = compute(record["condition"]) if "condition" in record else None
    met = condition is not None and agrees(condition, record["rule"])
    verdict = VERDICTS[0 if agrees(ours, record["rule"]) else 1 if met else 2]
    reason = record["reason"].format(ours=ours, condition=condition, **_also(record))
    figure = f"{record['figure']} {record['unit']}"
    return Line(record["id"], record["claim"], figure, ours, condition, verdict, reason)


def agrees(number: float, rule: Mapping[str, float]) -> bool:
    """Whether a number agrees with the article's figure.

    >>> agrees(24.7, {"about": 24, "within": 0.05}), agrees(37, {"at_least": 50})
    (True, False)
    """
    if "about" in rule:
        return abs(number - rule["about"]) <= rule["within"] * rule["about"]
    return rule.get("at_least", -inf) <= number <= rule.get("at_most", inf)


def compute(asked: Mapping[str, Any]) -> float:
    """The number of one `{name: {arguments}}` of data/article.yaml."""
    ((name, arguments),) = asked.items()
    return float(CALCULATIONS[name](**arguments))


def _also(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: compute(asked) for name, asked in record.get("also", {}).items()}


def _asked(
    model: str, gpu: str, sessions: int = 1, context_tokens: int = 4096, **flags: Any
) -> tuple[Any, Any, EngineConfig, Demand]:
    config = EngineConfig(**{"max_model_len": context_tokens, **flags})
    demand = Demand(context_tokens=context_tokens, sessions=sessions)
    return find_model(model), find_gpu(gpu), config, demand


def _sessions(**asked: Any) -> int:
    try:
        return scenario.hold(*_asked(**asked)).answer.max_concurrent_sessions
    except UserError:  # flags that no engine starts with
        return 0


def _required_gb(**asked: Any) -> float:
    held = scenario.hold(*_asked(**asked))
    return held.answer.required_bytes * held.memory.config.gpu_count / GB


def _gpus(**asked: Any) -> float:
    held = scenario.smallest_count(*_asked(**asked))
    return held.memory.config.gpu_count if held else inf


def _weights_gb(models: Sequence[str]) -> float:
    return sum(2 * find_model(name).parameters for name in models) / GB


def _kv_gb(model: str, context_tokens: int, sessions: int = 1) -> float:
    return find_model(model).kv_bytes_per_token() * context_tokens * sessions / GB


def _share_sum(scenario_key: str, gpu: str, gpu_count: int = 1, **flags: Any) -> float:
    config = EngineConfig(gpu_count=gpu_count, **flags)
    packings = scenario.pack_roles(scenario.load(scenario_key), find_gpu(gpu), config)
    return 1 - min(packing.leftover_bytes for packing in packings) / find_gpu(gpu).memory_bytes


def _engine_gpus(scenario_key: str, gpu: str) -> float:
    counts = range(1, len(scenario.load(scenario_key).models) + 1)
    return next((n for n in counts if _share_sum(scenario_key, gpu, n) <= 1), inf)


def _card(gpu: str, what: str, model: str = "mistral-7b-v0.3") -> float:
    memory = scenario.hold(*_asked(model, gpu)).memory
    total, weights = memory.gpu.memory_bytes, memory.weights.size_bytes
    rest = total - weights - memory.kv_cache_bytes
    return {
        "total_gb": total / GB,
        "usable_gb": memory.budget.size_bytes / GB,
        "share": memory.config.gpu_memory_utilization,
        "overhead_of_weights": rest / weights,
        "overhead_of_card": rest / total,
    }[what]


def _prefill_s(model: str, gpu: str, tokens: int, gpu_count: int = 1) -> float:
    flops = 2 * find_model(model).active_parameters * tokens
    return flops / (find_gpu(gpu).flops_per_s("bf16") * gpu_count)


def _ttft_multiple(scenario_key: str, gpu: str, queue: int = 0) -> float:
    case = scenario.load(scenario_key)
    tokens = case.input_tokens_first_turn * (queue + 1)
    return (case.slo["ttft_s"] or inf) / _prefill_s(case.model, gpu, tokens)


def _burst_calls(scenario_key: str, counts: str) -> int:
    case = scenario.load(scenario_key)
    return int(case.arrivals["count"]) * (case.turns if counts == "sessions" else 1)


def _growth(scenario_key: str, of: str) -> float:
    case = scenario.load(scenario_key)
    sizes: list[float] = [case.growth_tokens[0], case.growth_tokens[-1]]
    if of == "reserved":
        asked = (_asked(case.model, case.gpus[-1], context_tokens=int(n)) for n in sizes)
        sizes = [scenario.hold(*one).memory.budget.size_bytes for one in asked]
    return sizes[1] / sizes[0]


def _paused_kept(scenario_key: str, gpu: str, **flags: Any) -> float:
    case = scenario.load(scenario_key)
    spec = find_model(case.model)
    held = scenario.hold(spec, find_gpu(gpu), case.config(spec, **flags), case.demand())
    return max(0, int(held.memory.concurrency(case.context_tokens)) - case.sessions)


CALCULATIONS: dict[str, Callable[..., float]] = {
    "sessions": _sessions,  # that one replica holds
    "required_gb": _required_gb,  # of the engine's share on all GPUs, sessions included
    "gpus": _gpus,  # fewest of one node that hold the sessions on one replica
    "weights_gb": _weights_gb,  # parameters in 16 bits
    "kv_gb": _kv_gb,  # KV cache in 16 bits
    "bare_gb": lambda models, **kv: _weights_gb(models) + sum(_kv_gb(m, **kv) for m in models),
    "share_sum": _share_sum,  # what a scenario's engines take of the fullest GPU, as a multiple
    "engine_gpus": _engine_gpus,  # fewest GPUs over which a scenario's engines fit
    "card": _card,
    "load_s": lambda model, storage: start_up(2 * find_model(model).parameters, storage).weights_s,
    "ready_s": lambda model, storage, end: start_up(2 * find_model(model).parameters, storage).total_s(warm_host=True)[
        end
    ],  # low (0) or high (1) end, machine and image there
    "wake_s": lambda model, gpu: 2 * find_model(model).parameters / find_gpu(gpu).pcie_bytes_per_s,
    "prefill_s": _prefill_s,  # at the datasheet's full rate: a lower bound
    "ttft_multiple": _ttft_multiple,  # TTFT limit over the prefill bound, prompts queued before it
    "burst_calls": _burst_calls,
    "growth": _growth,  # last turn over first, of a session's KV cache or of the reserved memory
    "paused_kept": _paused_kept,  # paused sessions that stay in the pool beside the active ones
}
