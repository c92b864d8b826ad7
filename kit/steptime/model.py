"""Seconds of one engine step: physical work times fitted coefficients, part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.steptime.work import Number, Work

# Weight reads and matrix products of a layer overlap in part: their norm lies between the longer and the sum.
OVERLAP = 1.5
TINY = 1e-30
LIMITS = {"read": "weight reads", "kv": "KV cache reads", "kv8": "KV cache reads", "gemm": "compute", "attn": "compute"}
LIMITS |= {"reduce": "GPU links", "link": "GPU links"}


def step_parts(
    work: Work, c: Mapping[str, Number], new: Number, pairs: Number, reads: Number, rows: Number, context: Number
) -> dict[str, Number]:
    """Seconds of a step by coefficient; each part is also the step's derivative by that coefficient's logarithm.

    `new` prefill tokens look at `pairs` keys in all and read `reads` tokens of cached context; `rows` decode
    rows read `context`.
    """
    tokens = new + rows
    multiplied = new + c.get("gemm_row", 1.0) * rows  # a calibration may find that few rows multiply at another speed
    dense = {"bf16": work.bf16_s, "fp8": work.fp8_s, "fp4": work.fp4_s}
    gemm = {name: c[f"gemm_{name}"] * one for name, one in dense.items()}
    dense_s = sum(gemm.values())
    read, share = _overlap(c["read"] * work.dense_read_s, dense_s * multiplied)
    touched = 1 - work.expert_skip**tokens
    read_e, gemm_e = _overlap(c["read_e"] * work.expert_read_s * touched, c["gemm_e"] * work.expert_s * multiplied)
    prefill = 1.0 * (new > 0)
    cache_s = work.kv_read_s * (context + reads) + work.row_read_s * rows
    return {
        "read": read,
        **{f"gemm_{name}": share * part / (dense_s + TINY) for name, part in gemm.items()},
        "read_e": read_e,
        "gemm_e": gemm_e,
        "kv": c["kv"] * (1 - work.eight_bit) * cache_s,
        "kv8": c["kv8"] * work.eight_bit * cache_s,
        "attn": c["attn"] * (work.pair_s * pairs + work.window_pair_s * new),
        "reduce": c["reduce"] * work.reduces,
        "reduce_hop": c["reduce_hop"] * work.reduce_hops,
        "link": c["link"] * work.link_s * tokens,
        "fixed": c["fixed"] + 0 * rows,
        "layer": c["layer"] * work.layers,
        "moe_layer": c["moe_layer"] * work.moe_layers,
        "index_layer": c["index_layer"] * work.index_layers,
        "state_layer": c["state_layer"] * work.state_layers,
        "row": c["row"] * rows,
        "prefill": c["prefill"] * prefill,
        "prefill_layer": c["prefill_layer"] * work.layers * prefill,
    }


def request_parts(c: Mapping[str, Number], input_len: Number, streams: Number) -> dict[str, Number]:
    """Seconds before a request's first step: API, tokeniser (the whole prompt, cached or not), other streams."""
    return {"api": c["api"], "token": c["token"] * input_len, "stream": c["stream"] * streams}


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
        """Seconds of a step with chunks (tokens, tokens before) and decode rows that read `context` tokens in all."""
        new = reads = 0
        pairs = 0.0
        for tokens, before in chunks:
            new += tokens
            pairs += tokens * (before + (tokens + 1) / 2)
            reads += before
        chunk_s = self.coefficients.get("chunk", 0.0)  # of each prompt in the step; only a calibration tells it
        return self.seconds(new, pairs, reads, decodes, context) + chunk_s * len(chunks)

    def seconds(self, new: float, pairs: float, reads: float, decodes: float, context: float) -> float:
        """The same from sums over the chunks: tokens, query-key pairs, cached tokens before them."""
        parts = step_parts(self.work, self.coefficients, new, pairs, reads, decodes, context)
        return float(sum(parts.values()))

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        per_byte = self.coefficients["kv8" if self.work.eight_bit else "kv"]
        return self.seconds(0, 0.0, 0, decodes, 0), per_byte * self.work.kv_read_s

    def request_s(self, input_len: int, streams: int = 1) -> float:
        """Seconds that API and tokeniser add to the first token of a prompt of that length."""
        return float(sum(request_parts(self.coefficients, input_len, streams).values()))

    def limited_by(self, decodes: int, context: int) -> str:
        """What most of a decode step is spent on."""
        parts = step_parts(self.work, self.coefficients, 0, 0.0, 0, decodes, context)
        spent: dict[str, float] = {}
        for name, seconds in parts.items():
            kind = LIMITS.get(name.split("_")[0], "host")
            spent[kind] = spent.get(kind, 0.0) + seconds
        return max(spent, key=lambda kind: spent[kind])
