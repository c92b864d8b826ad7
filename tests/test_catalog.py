"""Look-ups, aliases, config.json files of users, and shapes that can be checked by hand."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.catalog import gpu, gpu_keys, model, model_keys
from kit.catalog.architecture import parse_config
from kit.engine_config import EngineConfig, resolve, tensor_parallel_sizes
from kit.errors import UserError
from kit.memory import plan
from kit.memory.sessions import Demand, answer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("name", "key", "quantization"),
    [
        ("llama-3.1-8b", "llama-3.1-8b", None),
        ("LLAMA-3.1-8B", "llama-3.1-8b", None),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", None),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b", "fp8"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "llama-3.1-8b", "int8"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "llama-3.1-8b", "int4-gptq"),
        ("Qwen/Qwen2.5-32B-Instruct-AWQ", "qwen2.5-32b", "int4-awq"),
        ("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", "mistral-7b-v0.3", "int4-bnb"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3-30b-a3b-2507", None),
        ("moonshotai/Kimi-K2-Thinking", "kimi-k2-thinking", "int4-gptq"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3", "fp8"),
    ],
)
def test_names_find_their_shape(name: str, key: str, quantization: str | None) -> None:
    found = model(name)
    assert (found.key, found.quantization) == (key, quantization)


def test_every_key_is_found_by_itself_and_parses() -> None:
    assert len(model_keys()) >= 64
    for key in model_keys():
        assert model(key).key == key
        assert model(key).parameters > 1e8


@pytest.mark.parametrize("name", ["llama-3.1-9b", "nobody/nothing", "gpt"])
def test_unknown_model_names_the_nearest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=f"unknown model '{name}'") as caught:
        model(name)
    if name.startswith("llama"):
        assert "nearest: llama-3.1-8b" in str(caught.value)


def test_unknown_gpu_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"unknown GPU 'h100'.*h100-sxm-80gb"):
        gpu("h100")
    assert len(gpu_keys()) == 20


def test_user_config_equals_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        own, known = model(name), model("llama-3.1-8b")
        assert own.counts == known.counts
        assert own.attention == known.attention


@pytest.mark.parametrize(
    "told",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float", "num_bits": 8}},
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    ],
)
def test_a_checkpoint_with_an_8_bit_cache_is_cached_so_under_auto(tmp_path: Path, told: dict[str, object]) -> None:
    path, card = tmp_path / "config.json", gpu("h100-sxm-80gb")
    path.write_text(json.dumps({**LLAMA, "quantization_config": told}))
    own, known = model(str(path)), model("llama-3.1-8b")
    assert resolve(EngineConfig(), own, card).kv_cache_dtype == "fp8"
    assert resolve(EngineConfig(engine="sglang"), own, card).kv_cache_dtype == "auto"
    half, full = (plan(one, card, EngineConfig(quantization="fp8")).kv_bytes_per_token for one in (own, known))
    assert 2 * half == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number"),
        ({"layer_types": ["full_attention"]}, "1 layer types for num_hidden_layers 32"),
        ({"quantization_config": {"quant_method": "magic"}}, "unknown quant_method.*'magic'"),
        ({"quantization_config": 8}, "quantization_config must be an object"),
    ],
)
def test_broken_config_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(UserError, match=message) as caught:
        model(str(path))
    assert str(path) in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"hidden_size": 1,\n oops')
    with pytest.raises(UserError, match=r"broken\.json line 2: not valid JSON"):
        model(str(broken))
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        model(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        model("./missing/config.json")


@pytest.mark.parametrize(
    ("key", "bytes_per_token"),
    [
        ("llama-2-7b", 524_288),  # MHA: 2 x 32 layers x 32 heads x 128 x 2
        ("mistral-7b-v0.3", 131_072),  # GQA: 8 heads
        ("deepseek-v3", 61 * 576 * 2),  # MLA: 512 + 64 latent dimensions a layer
        ("glm-5.1", 78 * (576 * 2 + 132)),  # and an indexer of 128 fp8 keys with a scale
        ("qwen3-next-80b-a3b", 2 * 12 * 2 * 256 * 2),  # 12 of 48 layers attend
    ],
)
def test_kv_bytes_per_token(key: str, bytes_per_token: int) -> None:
    assert model(key).kv_bytes_per_token() == bytes_per_token


def test_kv_heads_are_duplicated_and_latents_replicated_under_tp() -> None:
    few_heads = model("qwen3-235b-a22b")  # 4 KV heads
    assert few_heads.kv_bytes_per_token(2, 8) == few_heads.kv_bytes_per_token(2, 4)
    latent = model("deepseek-v3")
    assert latent.kv_bytes_per_token(2, 8) == latent.kv_bytes_per_token(2, 1)


def test_active_parameters_of_a_mixture() -> None:
    mixtral = model("mixtral-8x7b-v0.1")
    assert mixtral.active_parameters == pytest.approx(12.7e9, rel=0.02)  # published: 12.9 B with embedding


def test_tensor_parallel_sizes() -> None:
    assert tensor_parallel_sizes(model("llama-3.1-70b"), 8) == [1, 2, 4, 8]
    assert 3 not in tensor_parallel_sizes(model("llama-3.1-70b"), 8)
    with pytest.raises(UserError, match=r"--tensor-parallel-size 3 .* sizes that can run: 1, 2, 4, 8"):
        resolve(EngineConfig(tensor_parallel_size=3), model("llama-3.1-70b"), gpu("h100-sxm-80gb"))


@st.composite
def plausible_config(draw: st.DrawFn) -> dict[str, object]:
    """Fields in the ranges that published models use, in any combination."""
    heads = draw(st.sampled_from([8, 14, 16, 28, 32, 40, 64]))
    config: dict[str, object] = {
        "model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3", "gemma2", "phi", "opt", "new"])),
        "hidden_size": heads * draw(st.sampled_from([64, 96, 128])),
        "num_hidden_layers": draw(st.integers(1, 100)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads // 2, heads])),
        "vocab_size": draw(st.integers(1000, 300_000)),
        "intermediate_size": draw(st.integers(256, 40_000)),
        "max_position_embeddings": draw(st.sampled_from([2048, 32768, 131072, 10_485_760])),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, 128, 4096])),
        "head_dim": draw(st.sampled_from([None, 64, 128, 256])),
        "full_attention_interval": None,
    }
    if draw(st.booleans()):
        config |= {
            "num_experts": draw(st.sampled_from([8, 128])),
            "num_experts_per_tok": draw(st.integers(1, 8)),
            "moe_intermediate_size": draw(st.integers(128, 4096)),
        }
    if draw(st.booleans()):
        config |= {
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        }
    if draw(st.booleans()):
        config |= {
            "full_attention_interval": 4,
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
        }
    return config


@given(plausible_config(), st.sampled_from(gpu_keys()), st.integers(1, 300_000))
@settings(max_examples=150, deadline=None)
def test_no_crash_on_plausible_configs(config: dict[str, object], card: str, context: int) -> None:
    spec = parse_config(config, key="drawn")
    memory = plan(spec, gpu(card), EngineConfig())
    result = answer(memory, Demand(context_tokens=context, sessions=3))
    low, high = memory.kv_cache_bytes_interval
    assert low <= memory.kv_cache_bytes <= high
    assert result.max_concurrent_sessions >= 0
    assert result.fits == (result.max_concurrent_sessions >= 3)
