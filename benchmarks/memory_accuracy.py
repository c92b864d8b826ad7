"""Predicted KV pool against published start-up logs; writes docs/accuracy.md.

    .venv/bin/python benchmarks/memory_accuracy.py [--csv FILE] [--write]

Rows without a stated version are taken by the date or engine generation that their notes give.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kit.catalog import GpuSpec, ModelSpec, gpu, model
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.memory import MemoryPlan, plan
from kit.units import GIB

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("KIT_SHARED", ROOT.parent / "shared"))
LOGS = SHARED / "ground_truth" / "kv_cache_logs.csv"
CAMPAIGN = "llm-d-planner accuracy campa"

GPU_PATTERNS = (
    (r"H100-NVL|~95GB", "h100-nvl-94gb"),
    (r"H100.*PCIe", "h100-pcie-80gb"),
    (r"H100", "h100-sxm-80gb"),
    (r"H200", "h200-sxm-141gb"),
    (r"B200", "b200-sxm-180gb"),
    (r"A100-40", "a100-sxm-40gb"),
    (r"A100", "a100-sxm-80gb"),
    (r"RTX PRO 6000|96GB", "rtx-pro-6000-96gb"),
    (r"5090", "rtx-5090-32gb"),
    (r"4090", "rtx-4090-24gb"),
    (r"3090", "rtx-3090-24gb"),
    (r"L40S|L40", "l40s-48gb"),
    (r"\bL4\b", "l4-24gb"),
    (r"A10", "a10g-24gb"),
    (r"T4", "t4-16gb"),
    (r"MI300X", "mi300x-192gb"),
    (r"RTX 2000 Ada", "rtx-4090-24gb"),
    (r"80 ?G(i)?B", "a100-sxm-80gb"),
)
QUANT_PATTERNS = (
    (r"^(bf16|fp16)", "bf16"),
    (r"mxfp4", "mxfp4"),
    (r"nvfp4", "nvfp4"),
    (r"^fp8", "fp8"),
    (r"w8a8|int8", "int8"),
    (r"bnb", "int4-bnb"),
    (r"gptq|w4a16", "int4-gptq"),
    (r"awq|int4", "int4-awq"),
)


@dataclass(frozen=True)
class Row:
    """One start-up with its prediction."""

    key: str
    cluster: str
    engine: str
    era: str
    gpu: str
    attention: str
    model: str
    measured: float
    predicted: float
    low: float
    high: float
    notes: str
    plan: MemoryPlan

    @property
    def error(self) -> float:
        """Relative error of the pool, positive when predicted too large."""
        return self.predicted / self.measured - 1


def first_match(patterns: tuple[tuple[str, str], ...], text: str) -> str | None:
    """The value of the first pattern found in the text."""
    return next((value for pattern, value in patterns if re.search(pattern, text, re.I)), None)


def version_of(row: dict[str, str]) -> str | None:
    """Engine version, None for V0 or where nothing tells."""
    text = row["engine_version"]
    if "V0" in text:
        return None
    if match := re.search(r"(\d+\.\d+(?:\.\d+)?)", text):
        return match[1]
    if "2026" in text:
        return "0.26.0"
    # collections of the summer and autumn of 2025 without a stated version
    return "0.11.0" if row["engine"] == "vllm" else None


def number(text: str) -> float | None:
    """A float, None for an empty cell."""
    return float(text) if text.strip() else None


def card(row: dict[str, str]) -> GpuSpec | None:
    """The GPU with the memory that the row itself logged, where it did."""
    key = first_match(GPU_PATTERNS, row["gpu"])
    if key is None:
        return None
    spec = gpu(key)
    logged = number(row["total_gpu_mem_gib_logged"])
    if logged and abs(logged * GIB / spec.memory_bytes - 1) > 0.003:
        return replace(spec, memory_bytes=int(logged * GIB), memory_relative_uncertainty=0.0005)
    if "RTX 2000 Ada" in row["gpu"]:
        return replace(spec, memory_bytes=int(15.6 * GIB), memory_relative_uncertainty=0.005)
    return spec


def predicted_rows(path: Path) -> Iterator[Row]:
    """Every usable row with its prediction; V0 engines, unknown models and cards are left out."""
    for row in csv.DictReader(path.open(encoding="utf-8")):
        version = (
            version_of(row)
            if row["engine"] == "vllm"
            else re.sub(r"[^\d.].*", "", row["engine_version"])
        )
        spec_gpu = card(row)
        if not version or spec_gpu is None or row["engine"] not in ("vllm", "sglang"):
            continue
        try:
            spec = model(row["model"].split(" ")[0])
            yield from one_row(row, spec, spec_gpu, version)
        except UserError as error:
            sys.stderr.write(f"{row['id']} left out: {error}\n")


def config_of(row: dict[str, str], version: str, spec: ModelSpec) -> EngineConfig:
    """The row's flags as an EngineConfig."""

    def flag(name: str) -> int | None:
        value = number(row[name])
        return int(value) if value else None

    offline = "offline" in row["notes"] or "LLM class" in row["notes"]
    return EngineConfig(
        engine=row["engine"],
        engine_version=version,
        gpu_count=int(row["tp"] or 1) * int(row["pp"] or 1),
        tensor_parallel_size=int(row["tp"] or 1),
        pipeline_parallel_size=int(row["pp"] or 1),
        quantization=spec.quantization or first_match(QUANT_PATTERNS, row["weight_quant"]),
        kv_cache_dtype="fp8" if row["kv_cache_dtype"].startswith("fp8") else "auto",
        gpu_memory_utilization=number(row["gpu_memory_utilization"]),
        max_model_len=flag("max_model_len"),
        max_num_seqs=flag("max_num_seqs"),
        max_num_batched_tokens=flag("max_num_batched_tokens") or (8192 if offline else None),
        enforce_eager=row["enforce_eager"] == "True",
    )


def one_row(row: dict[str, str], spec: ModelSpec, card_: GpuSpec, version: str) -> Iterator[Row]:
    """The row in bytes where the pool was logged in bytes, else in tokens."""
    result = plan(spec, card_, config_of(row, version, spec))
    pool, tokens = number(row["available_kv_gib_per_gpu"]), number(row["kv_tokens"])
    if pool:
        measured, predicted = pool * GIB, result.kv_cache_bytes
        low, high = result.kv_cache_bytes_interval
    elif tokens:
        measured, predicted = tokens, float(result.kv_cache_tokens())
        low, high = (float(result.kv_cache_tokens(x)) for x in result.kv_cache_bytes_interval)
    else:
        return
    kinds = "+".join(
        sorted({g.kind for g in spec.attention} | ({"state"} if spec.state else set()))
    )
    yield Row(
        row["id"], row["source_cluster"], row["engine"], version, card_.key, kinds, row["model"],
        measured, predicted, low, high, row["notes"], result,
    )  # fmt: skip


def main() -> None:
    """Prints the errors; --write renews docs/accuracy.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, default=LOGS)
    options = parser.parse_args()
    rows = list(predicted_rows(options.csv))
    for r in sorted(rows, key=lambda r: -abs(r.error)):
        inside = "in " if r.low <= r.measured <= r.high else "OUT"
        print(
            f"{r.key} {100 * r.error:+7.2f}% {inside} ±{100 * (r.high - r.low) / 2 / r.predicted if r.predicted else 0:5.2f}% {r.engine} {r.era} {r.gpu} {r.model[:40]} {r.attention} meas {r.measured / GIB:.2f} pred {r.predicted / GIB:.2f} {r.cluster[:14]}"
        )
    v = [r for r in rows if r.engine == "vllm"]
    for name, sel in (
        ("vllm", v),
        ("vllm not campaign", [r for r in v if not r.cluster.startswith(CAMPAIGN)]),
        ("campaign", [r for r in v if r.cluster.startswith(CAMPAIGN)]),
        ("sglang", [r for r in rows if r.engine != "vllm"]),
    ):
        e = np.abs([r.error for r in sel])
        print(
            name,
            len(e),
            "median %.3f%%" % (100 * np.median(e)),
            "<3%%: %.0f%%" % (100 * np.mean(e < 0.03)),
            "<5%%: %.0f%%" % (100 * np.mean(e < 0.05)),
            "cover %.0f%%" % (100 * np.mean([r.low <= r.measured <= r.high for r in sel])),
        )


if __name__ == "__main__":
    main()
