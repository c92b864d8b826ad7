"""Weight formats: what a name's suffix or a config.json's quantization_config says."""

import re
from collections.abc import Mapping
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError, unknown

_DATA: dict[str, Any] = load_yaml(DATA / "quantizations.yaml")
BYTES_PER_PARAMETER: dict[str, float] = _DATA["formats"]
QUANTIZATIONS = tuple(BYTES_PER_PARAMETER)


def split_suffix(name: str) -> tuple[str, str | None]:
    """The name without its quantisation suffix, and the quantisation that it stands for.

    >>> split_suffix("Meta-Llama-3.1-8B-Instruct-FP8-dynamic")
    ('Meta-Llama-3.1-8B-Instruct', 'fp8')
    >>> split_suffix("Qwen3-8B")
    ('Qwen3-8B', None)
    """
    for pattern, quantization in _DATA["suffixes"]:
        if match := re.search(pattern + r"$", name, re.IGNORECASE):
            return name[: match.start()], quantization
    return name, None


def check_quantization(value: str) -> str:
    """The value itself; refuses one that no engine adapter knows."""
    if value not in QUANTIZATIONS:
        raise unknown("quantization", value, QUANTIZATIONS)
    return value


def quantization_of(config: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """Quantisation of a checkpoint and the module patterns that it leaves in 16 bits."""
    block = config.get("quantization_config")
    if not block:
        return None, ()
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: quantization_config must be an object, got {block!r}")
    kept = block.get("modules_to_not_convert") or block.get("ignore") or ()
    return _method(block, where), tuple(str(name) for name in kept)


def kv_cache_dtype_of(config: Mapping[str, Any]) -> str:
    """The KV cache dtype that vLLM's `auto` takes from a checkpoint's quantization_config.

    >>> kv_cache_dtype_of({"quantization_config": {"kv_cache_scheme": {"type": "float", "num_bits": 8}}})
    'fp8'
    """
    block = config.get("quantization_config") or {}
    scheme = block.get("kv_cache_scheme")
    eight_bit = isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    return "fp8" if eight_bit or str(block.get("kv_cache_quant_algo")).upper() == "FP8" else "auto"


def _method(block: Mapping[str, Any], where: str) -> str:
    method = str(block.get("quant_method", "")).lower()
    bits = block.get("bits") or block.get("w_bit")
    if method in ("gptq", "auto-round"):
        return "int8" if bits == 8 else "int4-gptq"
    if method == "bitsandbytes":
        return "int8" if block.get("load_in_8bit") else "int4-bnb"
    if method == "compressed-tensors":
        return _compressed_tensors(block)
    if method == "modelopt":
        return "nvfp4" if "FP4" in str(block.get("quant_algo", block)).upper() else "fp8"
    names: dict[str, str] = _DATA["quant_methods"]
    if method not in names:
        choices = [*names, "gptq", "bitsandbytes", "compressed-tensors", "modelopt"]
        raise unknown(f"quant_method in {where}", method, choices)
    return names[method]


def _compressed_tensors(block: Mapping[str, Any]) -> str:
    for group in (block.get("config_groups") or {}).values():
        weights = (group or {}).get("weights") or {}
        if weights.get("num_bits") == 4:
            return "nvfp4" if weights.get("type") == "float" else "int4-gptq"
        return "fp8" if weights.get("type") == "float" else "int8"
    return "fp8"
