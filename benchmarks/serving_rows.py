"""Published serving measurements as one table that `kit predict` can be asked about.

The files lie outside the project (KIT_SHARED, or shared/ beside the repository); nothing of them is
copied. What is left out, and why, is counted by `load` under its reason.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kit import catalog
from kit.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"  # names outside the catalogue are left out, not looked up
SHARED = Path(os.environ.get("KIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FILES = ("serving_measurements.csv", "serving_measurements_bulk.csv")
ENGINES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt-llm", "tensorrt-llm": "tensorrt-llm"}
GPUS = {
    "h100_sxm": "h100-sxm-80gb", "H100 SXM": "h100-sxm-80gb", "NVIDIA H100 80GB HBM3": "h100-sxm-80gb",
    "H100 SXM (p5.48xl)": "h100-sxm-80gb", "NVIDIA-H100-PCIe": "h100-pcie-80gb", "H100 PCIe": "h100-pcie-80gb",
    "h200_sxm": "h200-sxm-141gb", "H200 SXM": "h200-sxm-141gb",
    "b200_sxm": "b200-sxm-180gb", "B200": "b200-sxm-180gb", "b300_sxm": "b300-sxm-288gb", "B300": "b300-sxm-288gb",
    "gb200": "gb200-186gb", "A100 SXM 80GB": "a100-sxm-80gb", "NVIDIA A800-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb", "A100 PCIe 80GB": "a100-pcie-80gb", "L40S": "l40s-48gb",
    "A10G": "a10g-24gb", "RTX 4090": "rtx-4090-24gb", "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA-GeForce-RTX-4090": "rtx-4090-24gb", "RTX 3090": "rtx-3090-24gb", "NVIDIA GeForce RTX 3090": "rtx-3090-24gb",
    "RTX 5090": "rtx-5090-32gb", "NVIDIA GeForce RTX 5090": "rtx-5090-32gb", "RTX 6000 Ada": "rtx-6000-ada-48gb",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada-48gb", "RTX PRO 6000 Blackwell": "rtx-pro-6000-96gb",
    "RTX PRO 6000 Blackwell Server": "rtx-pro-6000-96gb", "MI300X": "mi300x-192gb",
}  # fmt: skip
QUANTIZATIONS = {
    "FP8": "fp8", "fp8": "fp8", "FP8 (as released)": "fp8", "FP8 static": "fp8",
    "BF16": "bf16", "bf16": "bf16", "FP16": "bf16", "fp16": "bf16", "MXFP4": "mxfp4", "mxfp4": "mxfp4",
    "NVFP4": "nvfp4", "fp4": "nvfp4", "FP4": "nvfp4", "W4A16": "int4-gptq", "AWQ INT4": "int4-awq",
    "W8A8": "int8", "W8A16": "int8", "GPTQ INT8": "int8",
}  # fmt: skip
FAMILIES = (
    ("gpt-oss", "gpt-oss"), ("deepseek-v3", "deepseek"), ("deepseek-r1-distill-qwen", "qwen2"),
    ("deepseek", "deepseek"), ("qwen3.5", "qwen3.5"), ("qwen3", "qwen3"), ("qwen", "qwen2"),
    ("llama", "llama"), ("glm", "glm"), ("minimax", "minimax"), ("gemma", "gemma"), ("mi", "mistral"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; seconds, None where it was not published."""

    engine: str
    version: str | None
    model: str
    family: str
    gpu: str
    quantization: str
    tp: int
    ep: int
    isl: int
    osl: int
    concurrency: int | None
    request_rate: float | None
    ttft_s: float | None
    tpot_s: float | None
    median: bool  # the published figures are medians
    source: str
    ref: str

    @property
    def group(self) -> tuple[str, str, str]:
        """What is left out together: engine, model family, GPU."""
        return self.engine, self.family, self.gpu


def load() -> tuple[list[Row], Counter[str]]:
    """Comparable rows, and how many were left out for which reason."""
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for name in FILES:
        for record in pd.read_csv(SHARED / "ground_truth" / name).to_dict("records"):
            made = _row(record, bulk=name == FILES[1])
            if isinstance(made, Row):
                rows.append(made)
            else:
                dropped[made] += 1
    return rows, dropped


def _row(r: dict, *, bulk: bool) -> Row | str:
    get = lambda name: None if pd.isna(r.get(name)) else r[name]  # noqa: E731
    engine = ENGINES.get(str(r["engine"]).lower())
    if engine is None:
        return "engine or engine build without a version" if bulk else f"engine {r['engine']}"
    reason = _not_comparable(r, get, bulk=bulk)
    if reason:
        return reason
    gpu = GPUS.get(r["gpu"])
    if gpu is None:
        return "GPU outside the catalogue or form factor not stated"
    try:
        model = catalog.model(r["model"])
    except UserError:
        return "model outside the catalogue"
    quantization = QUANTIZATIONS.get(get("weight_quant"))
    if quantization is None:
        return "quantisation not stated"
    if quantization == "nvfp4" and model.key.startswith("gpt-oss"):
        quantization = "mxfp4"  # the only 4-bit weights published
    if quantization == "fp8" and model.key.startswith("gpt-oss"):
        return "gpt-oss with 8-bit weights, which nobody publishes"
    if get("isl") is None or get("osl") is None:
        return "lengths not stated"
    return _made(r, get, engine, model.key, gpu, quantization)


def _not_comparable(r: dict, get, *, bulk: bool) -> str | None:
    source = str(get("source") or "")
    if not bulk and "silicon_sample" in source:
        return "in both files"
    if not bulk and get("load_type") not in ("closed_loop", "single_stream", "open_loop"):
        return f"load type {get('load_type')}"
    if re.search(r"MTP|EAGLE|specul", str(get("notes")) + str(get("quote"))):
        return "speculative decoding"
    if get("attn_dp") == 0:  # the same load at one stream is listed with TPOT of 8 and of 42 ms
        return "parallelism recorded as 0, rows contradict each other"
    if (get("attn_dp") or 1) > 1:
        return "data-parallel attention, which the command line cannot ask for"
    if (get("pp") or 1) > 1 or (get("replicas") or 1) > 1:
        return "pipeline stages or several replicas"
    if get("request_rate") == float("inf"):
        return "all requests at once, their number not stated"
    if get("osl") is not None and get("osl") < 16:
        return "fewer than 16 output tokens"
    return None


def _made(r: dict, get, engine: str, model: str, gpu: str, quantization: str) -> Row | str:
    trust = str(get("trust") or "ttft;tpot")
    concurrency, rate = get("concurrency"), get("request_rate")
    if get("load_type") == "single_stream":
        concurrency = 1
    if concurrency == 1:
        rate = None
    if concurrency is None and rate is None:
        return "load not stated"
    ttft = next((get(f"ttft_{kind}_ms") for kind in ("mean", "unspec", "median") if get(f"ttft_{kind}_ms")), None)
    tpot = next((get(f"tpot_{kind}_ms") for kind in ("mean", "unspec", "median") if get(f"tpot_{kind}_ms")), None)
    if rate is not None and (ttft or 0) > 1000:
        return "open loop beyond capacity: the figures depend on the number of requests"
    version = str(get("engine_version") or "")
    version = version if re.match(r"v?\d+\.\d+", version) else None
    return Row(
        engine, version, model, next((family for start, family in FAMILIES if model.startswith(start)), model),
        gpu, quantization, int(get("tp") or 1), int(get("moe_ep") or 1) or 1, int(get("isl")), int(get("osl")),
        int(concurrency) if concurrency else None, rate,
        ttft / 1e3 if ttft and "ttft" in trust else None, tpot / 1e3 if tpot and "tpot" in trust else None,
        not (get("ttft_mean_ms") or get("ttft_unspec_ms") or get("tpot_unspec_ms")),
        str(get("source_set") or get("source")), str(get("ref") or get("row_id")),
    )  # fmt: skip


if __name__ == "__main__":
    table, left_out = load()
    print(len(table), "rows")
    print(Counter(row.group for row in table).most_common())
    print(left_out.most_common())
