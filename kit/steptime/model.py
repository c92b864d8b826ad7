"""Seconds of one engine step: physical work times fitted coefficients, part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.steptime.work import Number, Work

# Weight reads and matrix products of a layer overlap in part: their norm lies between the longer and the sum.
OVERLAP = 1.5
TINY = 1e-30
GROUPS = {
    "mem": ("read", "read_e", "kv", "kv8"),
    "cmp": ("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e", "attn"),
    "link": ("reduce", "reduce_hop", "link"),
    "host": ("fixed", "layer", "moe_layer", "row", "prefill", "prefill_layer"),
    "step": ("fixed", "layer", "moe_layer", "prefill", "prefill_layer"),
    "moe": ("read_e", "gemm_e", "moe_layer"),
    "request": ("api", "token", "stream"),
}
LIMITS = {
    "read": "weight reads", "read_e": "weight reads", "kv": "KV cache reads", "kv8": "KV cache reads",
    "gemm_bf16": "compute", "gemm_fp8": "compute", "gemm_fp4": "compute", "gemm_e": "compute", "attn": "compute",
    "reduce": "GPU links", "reduce_hop": "GPU links", "link": "GPU links",
}  # fmt: skip


def step_parts(
    work: Work,
    c: Mapping[str, Number],
    new: Number,
    pairs: Number,
    reads: Number,
    rows: Number,
    context: Number,
) -> dict[str, Number]:
    """Seconds of a step by coefficient; the step is their sum.

    `new` prefill tokens look at `pairs` keys in all and read `reads` tokens of cached context; `rows`
    decode rows read `context`. Each part is also the derivative of the step by the logarithm of its
    coefficient, which is what a fit needs.
    """
    tokens = new + rows
    gemm = {name: c[f"gemm_{name}"] * one for name, one in _dense(work)}
    dense_s = sum(gemm.values())
    read, share = _overlap(c["read"] * work.dense_read_s, dense_s * tokens)
    touched = 1 - work.expert_skip**tokens
    read_e, gemm_e = _overlap(c["read_e"] * work.expert_read_s * touched, c["gemm_e"] * work.expert_s * tokens)
    prefill = 1.0 * (new > 0)
    seen = context + reads
    return {
        "read": read,
        **{f"gemm_{name}": share * part / (dense_s + TINY) for name, part in gemm.items()},
        "read_e": read_e,
        "gemm_e": gemm_e,
        "kv": c["kv"] * (work.kv_read_s * seen + work.row_read_s * rows),
        "kv8": c["kv8"] * (work.kv8_read_s * seen + work.row8_read_s * rows),
        "attn": c["attn"] * (work.pair_s * pairs + work.window_pair_s * new),
        "reduce": c["reduce"] * work.reduces,
        "reduce_hop": c["reduce_hop"] * work.reduce_hops,
        "link": c["link"] * work.link_s * tokens,
        "fixed": c["fixed"] + 0 * rows,
        "layer": c["layer"] * work.layers,
        "moe_layer": c["moe_layer"] * work.moe_layers,
        "row": c["row"] * rows,
        "prefill": c["prefill"] * prefill,
        "prefill_layer": c["prefill_layer"] * work.layers * prefill,
    }


def request_parts(c: Mapping[str, Number], input_len: Number, streams: Number) -> dict[str, Number]:
    """Seconds before a request's first step, by coefficient: API, tokeniser, other open streams.

    The whole prompt is tokenised on every turn, however much of it the prefix cache holds.
    """
    return {"api": c["api"], "token": c["token"] * input_len, "stream": c["stream"] * streams}


def _dense(work: Work) -> tuple[tuple[str, Number], ...]:
    return ("bf16", work.bf16_s), ("fp8", work.fp8_s), ("fp4", work.fp4_s)


def _overlap(read: Number, multiply: Number) -> tuple[Number, Number]:
    """Seconds that reads and products take together, as two parts of one sum."""
    both = (read**OVERLAP + multiply**OVERLAP) ** (1 / OVERLAP)
    scale = (both + TINY) ** (OVERLAP - 1)
    return read**OVERLAP / scale, multiply**OVERLAP / scale


@dataclass(frozen=True, slots=True)
class StepTime:
    """Step times of one replica, as the simulator and the emulator ask for them."""

    work: Work
    coefficients: Mapping[str, float]

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill chunks (tokens, tokens before) and decode rows.

        `context` is the KV tokens that all decode rows read together.
        """
        new = reads = 0
        pairs = 0.0
        for tokens, before in chunks:
            new += tokens
            pairs += tokens * (before + (tokens + 1) / 2)
            reads += before
        return self.seconds(new, pairs, reads, decodes, context)

    def seconds(self, new: float, pairs: float, reads: float, decodes: float, context: float) -> float:
        """The same from sums over the chunks: tokens, query-key pairs, cached tokens before them."""
        parts = step_parts(self.work, self.coefficients, new, pairs, reads, decodes, context)
        return float(sum(parts.values()))

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        c, work = self.coefficients, self.work
        return self.step_s((), decodes, 0), c["kv"] * work.kv_read_s + c["kv8"] * work.kv8_read_s

    def request_s(self, input_len: int, streams: int = 1) -> float:
        """Seconds that API and tokeniser add to the first token of a prompt of that length."""
        return float(sum(request_parts(self.coefficients, input_len, streams).values()))

    def limited_by(self, decodes: int, context: int) -> str:
        """What most of a decode step is spent on."""
        parts = step_parts(self.work, self.coefficients, 0, 0.0, 0, decodes, context)
        spent: dict[str, float] = {}
        for name, seconds in parts.items():
            kind = LIMITS.get(name, "host")
            spent[kind] = spent.get(kind, 0.0) + seconds
        return max(spent, key=lambda kind: spent[kind])
