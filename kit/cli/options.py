"""The options that every engine-facing command shares, with one help line each."""

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", help="model key, Hugging Face id, or path to a config.json")
]
Gpu = Annotated[str, typer.Option("--gpu", help="GPU key of data/gpus.yaml")]
Engine = Annotated[str, typer.Option("--engine", help="vllm, sglang, tensorrt-llm, tgi or ollama")]
EngineVersion = Annotated[
    str | None, typer.Option("--engine-version", help="default: newest known")
]
GpuCount = Annotated[int, typer.Option("--gpu-count", help="GPUs of one replica")]
TensorParallelSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", help="default: --gpu-count")
]
PipelineParallelSize = Annotated[int, typer.Option("--pipeline-parallel-size")]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization", help="bf16, fp8, int8, int4-awq, int4-gptq, int4-bnb, mxfp4, nvfp4"
    ),
]
KvCacheDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="auto or fp8")]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option("--gpu-memory-utilization", help="SGLang: its mem-fraction-static"),
]
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len")]
MaxNumSeqs = Annotated[int | None, typer.Option("--max-num-seqs")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option("--max-num-batched-tokens")]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager")]
SloTtft = Annotated[
    float | None, typer.Option("--slo-ttft-s", help="time to first token limit, seconds")
]
SloTpot = Annotated[
    float | None, typer.Option("--slo-tpot-s", help="time per output token limit, seconds")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")]
