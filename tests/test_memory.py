"""The start-up memory rule: hand-made cases, eras, monotony, published logs where at hand."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.catalog import gpu, model
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.memory import plan
from kit.memory.packing import pack
from kit.memory.pool import group_size
from kit.memory.sessions import Demand, alternatives, answer, context_by_turn
from kit.memory.startup import start_up
from kit.units import GIB

H100, L40S = gpu("h100-sxm-80gb"), gpu("l40s-48gb")
LLAMA = model("llama-3.1-8b")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def of(engine_version: str = "0.19.0", **flags: object) -> EngineConfig:
    return EngineConfig(engine_version=engine_version, **flags)  # type: ignore[arg-type]


def test_sampler_peak_by_hand() -> None:
    """14 B a logit, one float32 row a multiprocessor, hidden states of batch and rows, cuBLAS."""
    memory = plan(LLAMA, H100, of(max_num_seqs=1024, max_num_batched_tokens=8192))
    rows, vocab, hidden = 1024, 128256, 4096
    by_hand = 14 * rows * vocab + 4 * 132 * vocab + 2 * (8192 + rows) * hidden + 32 * 2**20
    assert memory.activation.size_bytes == by_hand


def test_older_sampler_sorts() -> None:
    """The sort-based sampler of 0.16 held 38 B a logit: 3.0 GiB more at 1024 rows here."""
    old = plan(LLAMA, H100, of("0.16.0")).activation.size_bytes
    new = plan(LLAMA, H100, of("0.17.0")).activation.size_bytes
    assert old - new == pytest.approx((38 - 14) * 1024 * 128256 - 4 * 132 * 128256)


def test_weights_are_parameters_and_rotary_table() -> None:
    memory = plan(LLAMA, H100, of())
    assert memory.weights.size_bytes == 2 * LLAMA.parameters + 2 * 131072 * 128
    quantised = plan(LLAMA, H100, of(quantization="fp8")).weights.size_bytes
    linear = LLAMA.counts.attention + LLAMA.counts.attention_kv + LLAMA.counts.mlp
    assert memory.weights.size_bytes - quantised == linear  # embedding, head and norms stay 16 bit


def test_defaults_by_version_and_gpu_class() -> None:
    def defaults(version: str, card: str) -> tuple[float, int, int]:
        r = resolve(of(version), LLAMA, gpu(card))
        return r.gpu_memory_utilization, r.max_num_seqs, r.max_num_batched_tokens

    assert defaults("0.19.0", "h100-sxm-80gb") == (0.9, 1024, 8192)
    assert defaults("0.32.0", "h100-sxm-80gb") == (0.92, 1024, 8192)
    assert defaults("0.32.0", "a100-sxm-80gb") == (0.92, 256, 2048)
    assert defaults("0.32.0", "rtx-4090-24gb") == (0.92, 256, 2048)


def test_graphs_are_charged_from_0_21() -> None:
    before, after = (plan(LLAMA, H100, of(v, gpu_memory_utilization=0.9)) for v in ("0.20.0", "0.21.0"))
    charged = before.pool.size_bytes - after.pool.size_bytes
    assert charged == pytest.approx(after.cuda_graph.size_bytes)
    eager = plan(LLAMA, H100, of("0.21.0", gpu_memory_utilization=0.9, enforce_eager=True))
    assert eager.pool.size_bytes == pytest.approx(before.pool.size_bytes)


def test_v0_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"vLLM 0\.7\.3 runs the V0 engine.*choices: 0\.8\.0 to 0\.33"):
        plan(LLAMA, H100, of("0.7.3"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpu_memory_utilization": 1.7}, "--gpu-memory-utilization .* got 1.7"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1, got 0"),
        ({"gpu_count": 4, "tensor_parallel_size": 2}, "--gpu-count 4 is not"),
        ({"pipeline_parallel_size": 64}, "exceeds the 32 layers"),
        ({"max_model_len": -5}, "--max-model-len must be at least 1, got -5"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1, got 0"),
        ({"kv_cache_dtype": "fp4"}, "unknown --kv-cache-dtype 'fp4'"),
        ({"quantization": "int3"}, "unknown quantization 'int3'"),
        ({"engine": "vlm"}, "unknown engine 'vlm'; nearest: vllm"),
    ],
)
def test_impossible_flags_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(LLAMA, H100, EngineConfig(**flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"context_tokens": -1}, {"sessions": 0}, {"headroom_fraction": 1.0}])
def test_impossible_demands_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"got (-1|0|1\.0)"):
        Demand(**{"context_tokens": 1000, **bad})  # type: ignore[arg-type]


def test_uniform_pool_is_whole_blocks() -> None:
    memory = plan(LLAMA, H100, of())
    assert memory.kv_cache_tokens() == memory.kv_cache_bytes // (16 * 131072) * 16
    assert memory.concurrency(8192) == pytest.approx(memory.kv_cache_tokens() / 8192, rel=1e-3)
    assert plan(LLAMA, H100, of(kv_cache_dtype="fp8")).kv_cache_tokens() == pytest.approx(
        2 * memory.kv_cache_tokens(), rel=1e-3
    )


def test_sliding_layers_share_the_pool() -> None:
    """Gemma 2: 23 full and 23 sliding layers are two groups; a short context uses both alike."""
    memory = plan(model("gemma-2-27b"), H100, of())
    assert memory.layout.num_groups == 2
    assert memory.layout.block_bytes == 16 * 23 * 2 * 16 * 128 * 2
    long, short = (memory.layout.blocks_per_sequence(n, 8192) for n in (131072, 1024))
    assert short == 2 * 64
    assert long == 131072 // 16 + -(-(4095 + 8192) // 16) + 1


def test_state_layers_stretch_the_attention_block() -> None:
    """Qwen3.5: a state of 3.2 MB must fit one block, so a block holds 784 tokens."""
    memory = plan(model("qwen3.5-27b"), gpu("a100-sxm-80gb"), of("0.26.0", max_model_len=262144))
    state = 4 * 48 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 48 * 128)
    assert memory.layout.block_size == -(-state // 4096 // 16) * 16 == 784
    assert memory.layout.state_groups == 3
    assert memory.layout.blocks_per_sequence(262144, 8192) == -(-262144 // 784) + 3 * 2


def test_group_size_pads_nearly_equal_kinds() -> None:
    assert group_size([23, 23]) == 23
    assert group_size([10, 30]) == 10
    assert group_size([20, 25]) == 25


def test_mla_pool_does_not_grow_by_sharding_its_cache() -> None:
    spec = model("deepseek-v2-lite")
    one, two = (plan(spec, H100, of(tensor_parallel_size=n)) for n in (1, 2))
    assert one.layout.block_bytes == two.layout.block_bytes
    assert two.kv_bytes_per_token == 2 * one.kv_bytes_per_token


def test_pipeline_takes_the_poorest_rank() -> None:
    spec = model("llama-3.1-70b")
    split = plan(spec, H100, of(pipeline_parallel_size=4))
    assert split.config.gpu_count == 4
    head = 2 * spec.counts.lm_head
    assert split.weights.size_bytes > 2 * (spec.parameters - 2 * spec.counts.embedding) / 4 + 0.9 * head


def test_paused_sessions_take_from_the_active() -> None:
    memory = plan(LLAMA, H100, of())
    alone = answer(memory, Demand(context_tokens=8192)).max_concurrent_sessions
    beside = answer(memory, Demand(context_tokens=8192, paused_sessions=10)).max_concurrent_sessions
    assert alone - beside == 10


def test_what_does_not_fit_says_what_would() -> None:
    spec, demand = model("llama-3.1-70b"), Demand(context_tokens=8192)
    result = answer(plan(spec, H100, EngineConfig()), demand)
    assert not result.fits
    assert result.limited_by == "weights"
    assert result.required_bytes - plan(spec, H100, EngineConfig()).budget.size_bytes == pytest.approx(
        result.shortfall_bytes
    )
    found = list(alternatives(spec, H100, EngineConfig(), demand))
    assert "2x h100-sxm-80gb (tensor parallel 2)" in found


def test_a_model_len_beyond_the_pool_cannot_start() -> None:
    memory = plan(LLAMA, gpu("rtx-4090-24gb"), EngineConfig())
    result = answer(memory, Demand(context_tokens=4096))
    assert result.fits
    assert 4096 <= result.max_model_len < 131072
    asked = answer(memory, Demand(context_tokens=4096), asked_max_model_len=True)
    assert not asked.fits


def test_pattern_2_does_not_fit_one_l40s() -> None:
    """7B + 13B + 7B in 16 bit are 54 GB before any cache; an H100 holds them by explicit shares."""
    names = ("mistral-7b-v0.3", "llama-2-13b", "mistral-7b-v0.3")
    demand = Demand(context_tokens=4096, sessions=2)
    engines = [(model(name), EngineConfig(max_num_seqs=16), demand) for name in names]
    assert not pack(L40S, engines).fits
    packed = pack(H100, engines)
    assert packed.fits
    assert sum(share.gpu_memory_utilization for share in packed.shares) < 1
    assert all(share.sessions >= 2 for share in packed.shares)


def test_context_by_turn_grows_by_what_is_added() -> None:
    assert context_by_turn(2000, 200, 200, 10)[-1] == 2200 + 9 * 400


def test_start_up_is_weights_over_storage_plus_phases() -> None:
    cold = start_up(26e9, "gp3-125").total_s()
    warm = start_up(26e9, "gp3-125").total_s(warm_host=True)
    assert 208 < warm[0] < warm[1] < cold[1]
    with pytest.raises(UserError, match="unknown storage 'tape'"):
        start_up(1, "tape")


def test_sglang_pool_is_fraction_less_weights() -> None:
    """Published: 94.76 GB free, fraction 0.7, 2.41 GB of weights, 63.92 GB of cache."""
    config = EngineConfig(engine="sglang", engine_version="0.5.2", gpu_memory_utilization=0.7)
    card = replace(gpu("h100-nvl-94gb"), memory_bytes=int(94.76 * GIB))
    memory = plan(model("llama-3.2-1b"), card, config)
    low, high = memory.kv_cache_bytes_interval
    assert low < 63.92 * GIB < high


@given(
    st.sampled_from(["llama-3.1-8b", "gemma-3-27b", "deepseek-v2-lite", "qwen3.5-27b", "mixtral-8x7b-v0.1"]),
    st.floats(0.3, 0.97),
    st.floats(0.005, 0.03),
    st.integers(1, 60_000),
    st.integers(1, 60_000),
)
@settings(max_examples=80, deadline=None)
def test_monotone(name: str, share: float, more: float, context: int, longer: int) -> None:
    """More memory holds more; longer contexts and more sessions need more."""
    spec, card = model(name), gpu("h200-sxm-141gb")
    small, large = (plan(spec, card, of(gpu_memory_utilization=u)) for u in (share, share + more))
    assert small.kv_cache_tokens() <= large.kv_cache_tokens()
    one, two = Demand(context_tokens=context), Demand(context_tokens=context + longer)
    many = Demand(context_tokens=context, sessions=7)
    assert answer(large, one).max_concurrent_sessions >= answer(large, two).max_concurrent_sessions
    assert answer(large, one).required_bytes <= answer(large, two).required_bytes
    assert answer(large, one).required_bytes <= answer(large, many).required_bytes


def test_published_logs() -> None:
    """The measures of the memory model, where the published logs are at hand."""
    sys.path.insert(0, str(BENCHMARKS))
    import memory_accuracy

    if not memory_accuracy.LOGS.exists():
        pytest.skip("no published start-up logs beside the repository")
    rows = [row for row in memory_accuracy.predicted_rows(memory_accuracy.LOGS) if row.engine == "vllm"]
    assert len(rows) >= 45
    found = memory_accuracy.summary(rows)
    assert found.median <= 0.005
    assert found.within_3 >= 0.85
    assert found.within_5 >= 0.92
    assert 0.85 <= found.coverage <= 0.95
    others = [row for row in rows if not row.cluster.startswith(memory_accuracy.CAMPAIGN)]
    assert memory_accuracy.summary(others).median <= 0.01


def test_second_model_runner_drops_the_sampler_copies_and_for_a_while_the_graphs() -> None:
    """Dense models from 0.25, all from 0.29; its graph estimate was a stub until then (#49224)."""
    dense = {v: plan(LLAMA, H100, of(v, gpu_memory_utilization=0.9)) for v in ("0.24.0", "0.25.0", "0.29.0")}
    assert dense["0.24.0"].activation.size_bytes > dense["0.25.0"].activation.size_bytes
    assert [dense[v].graphs_charged for v in dense] == [True, False, True]
    hybrid = model("qwen3.5-27b")
    assert plan(hybrid, H100, of("0.26.0")).graphs_charged
    assert plan(hybrid, H100, of("0.26.0")).activation == plan(hybrid, H100, of("0.24.0")).activation
