"""The catalogue files: complete, consistent with each other, and right against published counts."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
SHARED = Path(os.environ.get("KIT_SHARED", ROOT.parent / "shared"))
GIB = 2**30

GPU_KEYS = [
    "h100-sxm-80gb",
    "h100-pcie-80gb",
    "h100-nvl-94gb",
    "h200-sxm-141gb",
    "b200-sxm-180gb",
    "b300-sxm-288gb",
    "gb200-186gb",
    "a100-sxm-80gb",
    "a100-sxm-40gb",
    "a100-pcie-80gb",
    "l40s-48gb",
    "l4-24gb",
    "a10g-24gb",
    "t4-16gb",
    "rtx-3090-24gb",
    "rtx-4090-24gb",
    "rtx-5090-32gb",
    "rtx-6000-ada-48gb",
    "rtx-pro-6000-96gb",
    "mi300x-192gb",
]
MODEL_FILES = sorted((DATA / "models").glob("*.json"))
MODELS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in MODEL_FILES}
GPUS: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "gpus.yaml").read_text(encoding="utf-8"))
SCENARIO_FILES = sorted((DATA / "scenarios").glob("*.yaml"))


def shared_rows(name: str) -> list[dict[str, str]]:
    path = SHARED / "ground_truth" / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- parameter counts, written out tensor by tensor and independent of the package ---

QKV_BIAS = {"qwen2", "qwen2_moe", "qwen2_5_vl", "glm4_moe", "opt", "phi", "gpt_oss"}
OUTPUT_BIAS = {"opt", "phi", "gpt_oss"}
QK_NORM = {
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma3_text",
    "gemma4_text",
}
ROUTER_BIAS = {
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "glm4_moe",
    "glm_moe_dsa",
    "minimax_m2",
    "deepseek_v4",
    "gpt_oss",
}


def mla_parameters(c: dict[str, Any]) -> int:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query = heads * (nope + rope)
    rank = c["q_lora_rank"]
    count = hidden * rank + rank + rank * query if rank else hidden * query
    count += hidden * (latent + rope) + latent  # kv_a_proj and its norm
    count += latent * heads * (nope + value) + heads * value * hidden  # kv_b_proj, o_proj
    if "index_head_dim" in c:
        index, index_heads = c["index_head_dim"], c["index_n_heads"]
        count += rank * index_heads * index + hidden * (index + index_heads) + 2 * index
    return count


def attention_parameters(c: dict[str, Any], kind: str) -> int:
    hidden, heads, model_type = c["hidden_size"], c["num_attention_heads"], c["model_type"]
    if "kv_lora_rank" in c:
        return mla_parameters(c)
    kv_heads = c.get("num_key_value_heads", heads)
    head_dim = c.get("head_dim", hidden // heads)
    kv_matrices = 2
    if kind == "full_attention" and "global_head_dim" in c:
        head_dim, kv_heads = c["global_head_dim"], c["num_global_key_value_heads"]
        kv_matrices = 1 if c["attention_k_eq_v"] else 2
    gated = c.get("attn_output_gate") or model_type == "qwen3_next"
    count = hidden * heads * head_dim * (3 if gated else 2)  # q (twice as wide if gated), o
    count += kv_matrices * hidden * kv_heads * head_dim
    if model_type in QKV_BIAS:
        count += (heads + 2 * kv_heads) * head_dim
    if model_type in OUTPUT_BIAS:
        count += hidden
    if model_type in QK_NORM:
        count += 2 * head_dim
    if model_type == "minimax_m2":
        count += (heads + kv_heads) * head_dim
    if model_type == "gpt_oss":
        count += heads  # attention sinks
    return count


def linear_attention_parameters(c: dict[str, Any]) -> int:
    hidden, value_heads = c["hidden_size"], c["linear_num_value_heads"]
    key = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value = value_heads * c["linear_value_head_dim"]
    projections = hidden * (2 * key + 2 * value + 2 * value_heads) + value * hidden
    convolution = (2 * key + value) * c["linear_conv_kernel_dim"]
    return projections + convolution + 2 * value_heads + c["linear_value_head_dim"]


def feed_forward_parameters(c: dict[str, Any], layer: int) -> int:
    hidden, model_type = c["hidden_size"], c["model_type"]
    if model_type in ("opt", "phi"):
        width = c["ffn_dim"] if model_type == "opt" else c["intermediate_size"]
        return 2 * hidden * width + width + hidden
    experts = c.get("num_experts") or c.get("num_local_experts") or c.get("n_routed_experts")
    if not experts or layer < c.get("first_k_dense_replace", 0):
        return int(3 * hidden * c["intermediate_size"])
    width = c.get("moe_intermediate_size") or c["intermediate_size"]
    count = experts * 3 * hidden * width + experts * hidden
    if model_type in ROUTER_BIAS:
        count += experts
    if model_type == "gpt_oss":
        count += experts * (2 * width + hidden)
    count += c.get("n_shared_experts", 0) * 3 * hidden * width
    if model_type == "llama4_text":
        count += 3 * hidden * width  # one shared expert
    if "shared_expert_intermediate_size" in c:
        count += 3 * hidden * c["shared_expert_intermediate_size"] + hidden  # and its gate
    return int(count)


def compressed_parameters(c: dict[str, Any], ratio: int) -> int:
    """DeepSeek-V4: low-rank queries, one key-value head, grouped output, hyper-connections."""
    hidden, heads, head_dim = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    rank, out_rank = c["q_lora_rank"], c["o_lora_rank"]
    count = hidden * rank + rank + rank * heads * head_dim + hidden * head_dim + head_dim
    count += heads * head_dim * out_rank + c["o_groups"] * out_rank * hidden + heads

    def compressor(width: int, overlap: int) -> int:
        return overlap * width * (2 * hidden + ratio) + width

    if ratio:
        count += compressor(head_dim, 2 if ratio == 4 else 1)
    if ratio == 4:
        index, index_heads = c["index_head_dim"], c["index_n_heads"]
        count += rank * index_heads * index + hidden * index_heads + compressor(index, 2)
    streams = c["hc_mult"]
    return int(count + 2 * ((2 + streams) * streams * (streams * hidden + 1) + 3))


def layer_kinds(c: dict[str, Any]) -> list[str]:
    layers = c["num_hidden_layers"]
    if "layer_types" in c:
        return list(c["layer_types"])
    if "full_attention_interval" in c:
        period = c["full_attention_interval"]
        return ["linear_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return ["full_attention"] * layers


def text_parameters(config: dict[str, Any]) -> int:
    """Parameters of a config.json's language model, without extra prediction layers."""
    c = config.get("text_config", config)
    hidden, vocab, model_type = c["hidden_size"], c["vocab_size"], c["model_type"]
    count = vocab * hidden * (1 if c["tie_word_embeddings"] else 2) + hidden
    if model_type == "opt":
        count += (c["max_position_embeddings"] + 2) * hidden + hidden
    if model_type == "phi":
        count += vocab + hidden
    norms = {"phi": 2, "opt": 4, "gemma2": 4, "gemma3_text": 4, "gemma4_text": 4}
    for layer, kind in enumerate(layer_kinds(c)):
        count += feed_forward_parameters(c, layer) + norms.get(model_type, 2) * hidden
        if "compress_ratios" in c:
            count += compressed_parameters(c, c["compress_ratios"][layer])
        elif kind == "linear_attention":
            count += linear_attention_parameters(c)
        else:
            count += attention_parameters(c, kind)
    return count


def prediction_layer_parameters(config: dict[str, Any]) -> int:
    """Qwen3-Next's prediction layer: one full layer and the projection of two inputs."""
    c = config
    hidden = c["hidden_size"]
    layer = attention_parameters(c, "full_attention") + feed_forward_parameters(c, 0)
    return layer + 2 * hidden * hidden + 5 * hidden


# --- models ---


@pytest.mark.parametrize("key", MODELS)
def test_model_record_is_complete(key: str) -> None:
    record = MODELS[key]
    assert record["key"] == key == key.lower()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", record["id"])
    assert record["source"]
    assert re.fullmatch(r"20\d\d-\d\d", record["date"])
    config = record["config"]
    assert config["architectures"]
    text = config.get("text_config", config)
    for field in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert text[field], field
    assert text["vocab_size"] > 30_000
    assert text["max_position_embeddings"] >= 2048
    assert isinstance(text["tie_word_embeddings"], bool)
    assert ("vision_parameters" in record) == ("vision_config" in config)


@pytest.mark.parametrize("key", MODELS)
def test_layer_lists_have_one_entry_per_layer(key: str) -> None:
    text = MODELS[key]["config"].get("text_config", MODELS[key]["config"])
    layers = text["num_hidden_layers"]
    for field in ("layer_types", "no_rope_layers", "attn_type_list"):
        if field in text:
            assert len(text[field]) == layers, field
    if "compress_ratios" in text:  # the extra prediction layer has one too
        assert len(text["compress_ratios"]) == layers + text["num_nextn_predict_layers"]


@pytest.mark.parametrize("key", MODELS)
def test_parameters_follow_from_the_shapes(key: str) -> None:
    assert MODELS[key]["parameters"] == text_parameters(MODELS[key]["config"])


def test_names_are_unique() -> None:
    seen: dict[str, str] = {}
    for key, record in MODELS.items():
        for name in {key, *(n.split("/")[-1].lower() for n in (record["id"], *record["aliases"]))}:
            assert seen.setdefault(name, key) == key, f"{name} is both {seen[name]} and {key}"


def by_name() -> dict[str, dict[str, Any]]:
    return {
        name.split("/")[-1].lower(): record for record in MODELS.values() for name in (record["id"], *record["aliases"])
    }


def test_every_published_model_is_here_with_its_count() -> None:
    names = by_name()
    wrong = []
    for row in shared_rows("model_architectures.csv"):
        record = names[row["model_id"].split("/")[-1].lower()]
        if not row["params_billion"]:
            continue
        count = record["parameters"]
        if "vision tower" in row["params_basis"]:  # these published totals include it
            count += record["vision_parameters"]
        if record["key"] == "qwen3-next-80b-a3b":  # this one includes the prediction layer
            count += prediction_layer_parameters(record["config"])
        error = count / 1e9 / float(row["params_billion"]) - 1
        if abs(error) > 0.005:
            wrong.append((record["key"], f"{error:+.2%}"))
    assert not wrong


FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "experts_per_tok": "num_experts_per_tok",
    "first_dense_layers": "first_k_dense_replace",
}


def test_shapes_agree_with_the_published_configs() -> None:
    names = by_name()
    for row in shared_rows("model_architectures.csv"):
        record = names[row["model_id"].split("/")[-1].lower()]
        text = record["config"].get("text_config", record["config"])
        for column, field in FIELDS.items():
            if row[column]:
                assert text.get(field, 0) == int(row[column]), (record["key"], field)
        kv_heads = text.get("num_key_value_heads", text["num_attention_heads"])
        assert kv_heads == int(row["kv_heads"]), record["key"]
        assert text["tie_word_embeddings"] == (row["tie_embeddings"] == "True"), record["key"]


def rotary_table_bytes(config: dict[str, Any]) -> float:
    """The cos-sin table that vLLM keeps in 16 bits and counts as weights."""
    c = config.get("text_config", config)
    if c["model_type"] == "opt":
        return 0
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    share = (c.get("rope_parameters") or c).get("partial_rotary_factor", 1.0)
    scaling = c.get("rope_scaling") or {}
    stretch = scaling["factor"] if scaling.get("rope_type") == "linear" else 1
    return 2.0 * c.get("qk_rope_head_dim", width * share) * c["max_position_embeddings"] * stretch


def test_bytes_agree_with_logged_weights() -> None:
    """One-GPU vLLM start-ups of 16-bit checkpoints above 2 GiB: rounding hides nothing there."""
    names = by_name()
    errors = {}
    for row in shared_rows("kv_cache_logs.csv"):
        record = names.get(row["model"].split("/")[-1].split(" ")[0].lower())
        plain = row["weight_quant"] in ("bf16", "fp16") and row["tp"] == "1"
        if not record or not plain or row["engine"] != "vllm" or not row["weights_gib_per_gpu"]:
            continue
        logged = float(row["weights_gib_per_gpu"])
        count = record["parameters"] + record.get("vision_parameters", 0)
        if logged > 2:
            own = (2 * count + rotary_table_bytes(record["config"])) / GIB
            errors[row["id"]] = own / logged - 1
    assert len(errors) > 20
    assert sum(abs(e) < 0.003 for e in errors.values()) / len(errors) > 0.8
    assert max(abs(e) for e in errors.values()) < 0.016, errors


# --- GPUs ---


def test_gpu_keys_are_those_promised() -> None:
    assert sorted(GPUS) == sorted(GPU_KEYS)


@pytest.mark.parametrize("key", GPUS)
def test_gpu_record_is_complete(key: str) -> None:
    record = GPUS[key]
    nominal = int(re.findall(r"(\d+)gb", key)[0])
    assert 0.83 * nominal * 1e9 < record["memory_bytes"] <= nominal * GIB
    assert record["memory_source"] in ("logged", "derived")
    assert 0 < record["memory_relative_uncertainty"] < 0.01
    assert 0.2e12 < record["memory_bandwidth_bytes_per_s"] < 10e12
    rates = record["dense_flops_per_s"]
    assert {"bf16", "fp8", "int8", "fp4"} <= set(rates)
    assert all(rate is None or isinstance(rate, float) for rate in rates.values())
    assert rates["bf16"] or rates["fp16"]
    if rates["fp8"]:
        assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.02)
    assert record["link"]["bytes_per_s_per_direction"] >= 16e9
    assert 16e9 <= record["pcie_bytes_per_s"] <= 450e9
    assert 50 < record["power_w"] <= 1400
    assert record["compute_capability"] is None or isinstance(record["compute_capability"], str)
    assert {"memory", "bandwidth", "flops", "power"} <= set(record["source"])
    assert re.fullmatch(r"20\d\d-\d\d", record["date"])


NVML_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-sxm-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H100 NVL": "h100-nvl-94gb",
    "NVIDIA H200": "h200-sxm-141gb",
    "NVIDIA H200 NVL": None,
    "NVIDIA B200": "b200-sxm-180gb",
    "NVIDIA B300 SXM6 AC": "b300-sxm-288gb",
    "NVIDIA GB200": "gb200-186gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A100-PCIE-40GB": None,
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40": None,
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA A10": None,
    "NVIDIA A10G": "a10g-24gb",
    "Tesla T4": "t4-16gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb",
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 5090": "rtx-5090-32gb",
    "NVIDIA GeForce RTX 5090 D": None,
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada-48gb",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000-96gb",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000-96gb",
}


@pytest.mark.parametrize(("device", "key"), NVML_NAMES.items())
def test_nvml_name_recognises_one_gpu(device: str, key: str | None) -> None:
    matches = [
        name
        for name, record in GPUS.items()
        if any(re.match(pattern, device, re.IGNORECASE) for pattern in record["nvml_names"])
    ]
    assert matches == ([key] if key else [])


@pytest.mark.parametrize(
    ("label", "key"),
    {
        "H100-80GB-HBM3": "h100-sxm-80gb",
        "L40S-48GB": "l40s-48gb",
        "Tesla T4-16GB": "t4-16gb",
        "RTX 3090-24GB": "rtx-3090-24gb",
        "RTX 4090-24GB": "rtx-4090-24gb",
    }.items(),
)
def test_memory_agrees_with_logged_totals(label: str, key: str) -> None:
    totals = [
        float(row["total_gpu_mem_gib_logged"])
        for row in shared_rows("kv_cache_logs.csv")
        if row["gpu"] == label and row["total_gpu_mem_gib_logged"]
    ]
    assert totals
    for total in totals:
        assert GPUS[key]["memory_bytes"] / GIB == pytest.approx(total, rel=0.001)


# --- scenarios ---

SCENARIO_KEYS = [
    "burst-10000",
    "cron-burst",
    "single-agent",
    "multi-agent",
    "api-cluster",
    "reasoning",
    "simple-qa",
    "customer-service",
    "complex-reasoning",
    "orchestrator",
    "customer-service-daily",
    "voice-agent",
    "coding-agent",
    "deep-research",
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Steady(Strict):
    kind: Literal["steady"]


class Poisson(Strict):
    kind: Literal["poisson"]
    sessions_per_s: PositiveFloat


class Step(Strict):
    kind: Literal["step"]
    count: PositiveInt
    counts: Literal["calls", "sessions"]


class SilentBurst(Strict):
    kind: Literal["silent-burst"]
    silent_s: PositiveInt
    burst_s: PositiveInt
    count: PositiveInt
    counts: Literal["calls", "sessions"]


class Daily(Strict):
    kind: Literal["daily"]
    peak_to_mean: PositiveFloat


class Slo(Strict):
    ttft_s: PositiveFloat
    tpot_s: PositiveFloat
    e2el_s: PositiveFloat | None


class Role(Strict):
    role: str
    model: str
    sessions: PositiveInt
    context_tokens: PositiveInt


class Scenario(Strict):
    key: str
    title: str
    question: str
    source: str
    date: str
    model: str
    models: list[Role] | None = None
    quantization: Literal["bf16", "fp8", "int8", "int4-awq", "int4-gptq", "mxfp4", "nvfp4"] | None
    gpus: list[str]
    gpu_count: PositiveInt
    sessions: PositiveInt
    paused_sessions: NonNegativeInt
    context_tokens: PositiveInt
    turns: PositiveInt
    input_tokens_first_turn: PositiveInt
    tokens_added_per_turn: NonNegativeInt
    output_tokens_per_turn: PositiveInt
    arrivals: Annotated[Steady | Poisson | Step | SilentBurst | Daily, Field(discriminator="kind")]
    slo: Slo
    conversations_per_day: PositiveInt | None
    workload: str
    assumed: list[str]
    notes: str


def test_scenarios_are_those_promised() -> None:
    assert sorted(path.stem for path in SCENARIO_FILES) == sorted(SCENARIO_KEYS)


@pytest.mark.parametrize("path", SCENARIO_FILES, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    scenario = Scenario.model_validate(values)
    assert scenario.key == path.stem
    assert scenario.question.endswith("?")
    assert set(scenario.gpus) <= set(GPUS)
    assert {scenario.model, *(role.model for role in scenario.models or ())} <= set(MODELS)
    per_turn = scenario.tokens_added_per_turn + scenario.output_tokens_per_turn
    last = scenario.input_tokens_first_turn + (scenario.turns - 1) * per_turn
    assert last + scenario.output_tokens_per_turn <= scenario.context_tokens
    config = MODELS[scenario.model]["config"]
    longest = config.get("text_config", config)["max_position_embeddings"]
    assert scenario.context_tokens <= longest
    if scenario.models:
        assert sum(role.sessions for role in scenario.models) == scenario.sessions
    daily = scenario.arrivals.kind == "daily"
    assert daily == (scenario.conversations_per_day is not None)
    for name in scenario.assumed:  # each names a field of the scenario
        assert name.split(".")[0] in values


def test_daily_volume_is_the_articles() -> None:
    """10,000 conversations of 5 turns of 200 tokens: 116 tokens/s, 1,157 at ten times that."""
    scenario = yaml.safe_load((DATA / "scenarios" / "customer-service-daily.yaml").read_text(encoding="utf-8"))
    tokens = scenario["conversations_per_day"] * scenario["turns"]
    mean_per_s = tokens * scenario["output_tokens_per_turn"] / 86_400
    assert mean_per_s == pytest.approx(115.74, abs=0.01)
    assert mean_per_s * scenario["arrivals"]["peak_to_mean"] == pytest.approx(1157.4, abs=0.1)


def test_readme_lists_every_catalogue_folder() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name in ("gpus.yaml", "models/", "scenarios/"):
        assert f"`{name}" in text
    for count, noun in ((len(GPUS), "GPUs"), (len(MODELS), "models"), (len(SCENARIO_FILES), "sce")):
        assert f"| {count} {noun}" in text
    missing = [field for field in Scenario.model_fields if f"`{field}`" not in text]
    assert not missing
