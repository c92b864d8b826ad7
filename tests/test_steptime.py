"""Step times: work that can be counted by hand, and coefficients with what is known about them."""

import json
from dataclasses import replace

import pytest

from kit.catalog import gpu, model
from kit.engine_config import EngineConfig, resolve
from kit.steptime import StepTime, fitted, step_time, work
from kit.steptime.coefficients import FOLDER
from kit.steptime.model import request_parts, step_parts

H100 = "h100-sxm-80gb"
IDEAL = dict.fromkeys(
    ("read", "read_e", "kv", "kv8", "gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e", "attn", "link"), 1.0
) | dict.fromkeys(
    ("reduce", "reduce_hop", "fixed", "layer", "moe_layer", "index_layer", "state_layer", "row", "prefill",
     "prefill_layer", "api", "token", "stream"), 0.0
)  # fmt: skip


def case(name: str, card: str = H100, **flags):
    spec, device = model(name), gpu(card)
    return spec, device, resolve(EngineConfig(**flags), spec, device)


def test_one_row_reads_every_weight_but_the_embedding_once() -> None:
    done = work(*case("llama-3.1-8b"))
    assert done.dense_read_s == pytest.approx(2 * 7_504_924_672 / 3.35e12, rel=1e-3)
    assert done.expert_read_s == 0
    assert done.kv_read_s == pytest.approx(131_072 / 3.35e12)
    assert done.bf16_s == pytest.approx(2 * 7_504_924_672 / 989e12)
    assert done.reduces == done.link_s == 0


def test_ranks_share_weights_and_send_what_they_computed() -> None:
    one, four = (
        work(*case("llama-3.1-70b", quantization="fp8")),
        work(*case("llama-3.1-70b", quantization="fp8", gpu_count=4)),
    )
    assert four.dense_read_s == pytest.approx(one.dense_read_s / 4, rel=0.01)
    assert four.kv_read_s == pytest.approx(one.kv_read_s / 4)
    assert four.eight_bit == 1  # fp8 weights count under the coefficient of quantised caches
    assert four.reduces == 160
    assert four.link_s == pytest.approx(160 * 2 * 3 / 4 * 8192 * 2 / 450e9)  # a ring sends 3/4 twice


def test_experts_touched_grow_with_the_batch_to_all_of_them() -> None:
    done = work(*case("qwen3-30b-a3b"))
    one, many = (step_parts(done, IDEAL, 0, 0.0, 0, rows, 0)["read_e"] for rows in (1, 4096))
    assert one == pytest.approx(done.expert_read_s * 8 / 128, rel=0.02)
    assert many > 0.5 * done.expert_read_s


def test_a_causal_chunk_looks_at_half_of_its_square() -> None:
    spec, device, config = case("llama-3.1-8b")
    steps = StepTime(work(spec, device, config), IDEAL | {"read": 0.0, "gemm_bf16": 0.0})
    pairs = 8192 * 8193 / 2
    assert steps.step_s([(8192, 0)], 0, 0) == pytest.approx(4 * 32 * 4096 * pairs / 989e12, rel=1e-3)
    halves = steps.step_s([(4096, 0)], 0, 0) + steps.step_s([(4096, 4096)], 0, 0)
    assert halves == pytest.approx(steps.step_s([(8192, 0)], 0, 0) + 4096 * 131_072 / 3.35e12, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-120b", "deepseek-v3", "qwen3.5-397b-a17b"])
def test_decode_steps_lie_on_their_line(name: str) -> None:
    steps = step_time(*case(name, "b200-sxm-180gb", gpu_count=8))
    for rows, context in ((1, 10), (64, 100_000), (900, 400_000)):
        base_s, per_token_s = steps.decode_line(rows)
        assert steps.step_s([], rows, context) == pytest.approx(base_s + per_token_s * context)


def test_mla_cache_and_window_layers_are_cheaper_than_full_heads() -> None:
    mla, full = work(*case("deepseek-v3", "h200-sxm-141gb", gpu_count=8)), work(*case("llama-3.1-405b", gpu_count=8))
    assert mla.pair_s > 0
    assert full.kv_read_s > 0
    windowed = work(*case("gpt-oss-120b"))
    assert windowed.row_read_s > 0  # windows that are full: a cost of the row, not of the context


def test_parts_are_derivatives_by_the_logarithm_of_their_coefficients() -> None:
    spec, device, config = case("gpt-oss-120b", "b200-sxm-180gb", gpu_count=4)
    c, done = dict(fitted(spec, device, config).coefficients), work(spec, device, config)
    parts = step_parts(done, c, 2000, 2e6, 0, 30, 60_000)
    total = sum(parts.values())
    for name, part in parts.items():
        moved = sum(step_parts(done, c | {name: c[name] * 1.0001}, 2000, 2e6, 0, 30, 60_000).values())
        assert (moved - total) / 1e-4 == pytest.approx(part, rel=1e-2, abs=1e-9)


def test_tokenising_counts_the_whole_prompt() -> None:
    c = {"api": 0.01, "token": 2e-6, "stream": 0.0}
    assert sum(request_parts(c, 100_000, 1).values()) == pytest.approx(0.21)


def test_coefficients_say_what_is_behind_them() -> None:
    assert fitted(*case("llama-3.1-70b", quantization="fp8", gpu_count=4)).basis == "measured"
    known = fitted(*case("llama-3.1-70b", "b200-sxm-180gb", quantization="fp8", gpu_count=2))
    far = fitted(*case("llama-3.1-8b", "l4-24gb"))
    assert (known.basis, far.basis) == ("transfer", "new_gpu")
    assert far.tpot_factor >= known.tpot_factor > 1
    assert "guess" in far.warnings[0]
    other = fitted(*case("llama-3.1-8b", engine="tgi"))
    assert other.basis == "new"
    assert "guess" in other.warnings[0]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_hold_positive_coefficients_and_growing_intervals(path) -> None:
    data = json.loads(path.read_text())
    assert set(data["coefficients"]) == set(IDEAL)
    assert all(value > 0 for value in data["coefficients"].values())
    for name in ("ttft", "tpot"):
        factors = [data["factor_90"][basis][name] for basis in ("measured", "transfer", "new_gpu", "new")]
        assert factors == sorted(factors)
        assert factors[0] > 1
    assert data["files"]
    assert data["script"]


def test_another_era_has_another_host_cost() -> None:
    spec, device, config = case("llama-3.1-8b")
    old, new = (fitted(spec, device, replace(config, engine_version=v)).coefficients for v in ("0.8.5", "0.32.0"))
    assert old["row"] != new["row"]
    assert old["read"] == new["read"]
