"""The datasheet roofline: bounds that can be checked by hand."""

import pytest

from kit.catalog import gpu, model
from kit.engine_config import EngineConfig, resolve
from kit.steptime import (
    ALL_REDUCE_LATENCY_S,
    BANDWIDTH_EFFICIENCY,
    COMPUTE_EFFICIENCY,
    STEP_OVERHEAD_S,
    Roofline,
    roofline,
)


def built(name: str, card: str = "h100-sxm-80gb", weights_bytes: float = 16e9, **flags) -> Roofline:
    spec, device = model(name), gpu(card)
    return roofline(spec, device, resolve(EngineConfig(**flags), spec, device), weights_bytes)


def test_one_row_reads_all_weights_and_its_context() -> None:
    base_s, per_token_s = built("llama-3.1-8b").decode_line(1)
    assert base_s - STEP_OVERHEAD_S == pytest.approx(16e9 / (3.35e12 * BANDWIDTH_EFFICIENCY))
    assert per_token_s == pytest.approx(131_072 / (3.35e12 * BANDWIDTH_EFFICIENCY))


def test_a_long_prompt_is_bound_by_multiplication() -> None:
    steps = built("llama-3.1-8b")
    linear_s = 2 * model("llama-3.1-8b").active_parameters * 8192 / (989e12 * COMPUTE_EFFICIENCY)
    attention_s = 4 * 32 * 4096 * 8192 * 8193 / 2 / (989e12 * COMPUTE_EFFICIENCY)
    expected = STEP_OVERHEAD_S + linear_s + attention_s
    assert steps.step_s([(8192, 0)], 0, 0) == pytest.approx(expected)


def test_a_step_without_chunks_lies_on_the_decode_line() -> None:
    for name in ("llama-3.1-8b", "qwen3-30b-a3b"):
        steps = built(name)
        for rows, context in ((1, 10), (64, 100_000), (900, 400_000)):
            base_s, per_token_s = steps.decode_line(rows)
            assert steps.step_s([], rows, context) == pytest.approx(base_s + per_token_s * context)


def test_few_rows_of_a_mixture_read_few_experts() -> None:
    steps = built("qwen3-30b-a3b", weights_bytes=60e9)
    one, many = steps.decode_line(1)[0], steps.decode_line(2000)[0]
    whole = 60e9 / (3.35e12 * BANDWIDTH_EFFICIENCY)
    assert one - STEP_OVERHEAD_S < 0.2 * whole
    assert many - STEP_OVERHEAD_S >= whole * 0.99


def test_tensor_parallel_ranks_share_reads_and_pay_all_reduces() -> None:
    one = built("llama-3.1-70b", weights_bytes=140e9, gpu_count=1).decode_line(1)[0]
    four = built("llama-3.1-70b", weights_bytes=140e9, gpu_count=4).decode_line(1)[0]
    links_s = 2 * 80 * (ALL_REDUCE_LATENCY_S + 1.5 * 2 * 8192 / 450e9)
    assert four - STEP_OVERHEAD_S - links_s == pytest.approx((one - STEP_OVERHEAD_S) / 4)


def test_eight_bit_weights_multiply_at_twice_the_rate() -> None:
    plain, eight = built("llama-3.1-8b"), built("llama-3.1-8b", quantization="fp8")
    assert eight.flops_per_s == pytest.approx(2 * plain.flops_per_s, rel=0.001)
    assert built("llama-3.1-8b", quantization="int4-awq").flops_per_s == plain.flops_per_s
