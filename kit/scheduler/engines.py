"""How each engine admits and batches, as data, and the scheduler of one replica of it."""

from typing import Any

from kit.engine_config import ResolvedConfig, engine_data
from kit.scheduler.request import SchedulerConfig

LIMITS = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
# SGLang keeps its own output and a part of the running ones' free when it admits: its
# new_token_ratio starts at 0.7 and decays to 0.098; the decayed value stands for all times here.
# TensorRT-LLM (GUARANTEED_NO_EVICT), TGI and Ollama reserve prompt and output whole.
WHOLE = {"reserve_own_output_fraction": 1.0, "reserve_running_output_fraction": 1.0}
POLICIES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "sglang": {"mixed_steps": False, "reserve_own_output_fraction": 1.0, "reserve_running_output_fraction": 0.098},
    **dict.fromkeys(("tensorrt-llm", "tgi", "ollama"), WHOLE),
}


def scheduler_config(config: ResolvedConfig, kv_cache_tokens: int) -> SchedulerConfig:
    """Limits and policy of a replica whose KV cache holds `kv_cache_tokens`."""
    limits = {name: getattr(config, name) for name in LIMITS}
    queue = engine_data(config.engine).get("admission", {}).get("max_num_queued_reqs", {})
    limits["queued_reqs_include_running"] = queue.get("counts") != "waiting"
    return SchedulerConfig(kv_cache_tokens // config.block_size, **limits, **POLICIES[config.engine])
