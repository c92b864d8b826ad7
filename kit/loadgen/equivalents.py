"""The same load as other tools' command lines, to check these numbers against theirs."""

import shlex

from kit.loadgen.plan import Level, Target


def equivalents(
    target: Target, level: Level, input_len: int, output_len: int, burstiness: float
) -> dict[str, str]:
    """Commands of aiperf, guidellm and vllm bench serve for fixed lengths.

    vllm's --burstiness is the gamma shape, 1 / CV squared; guidellm has no burst at once and no
    gamma arrivals, so a closed loop and Poisson stand in.
    """
    n, root = len(level.sessions), target.base_url.rstrip("/").removesuffix("/v1")
    value = f"{level.value:g}"
    closed, rate = level.kind == "concurrency", level.kind == "request_rate"
    vllm = [
        *("vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", root),
        *("--endpoint", "/v1/chat/completions", "--model", target.model),
        *("--dataset-name", "random", "--random-input-len", input_len),
        *("--random-output-len", output_len, "--num-prompts", n, "--ignore-eos"),
        *(("--max-concurrency", value) if closed else ()),
        *(("--request-rate", value, "--burstiness", f"{burstiness**-2:g}") if rate else ()),
    ]
    aiperf = [
        *("aiperf", "profile", "--url", root, "--model", target.model, "--endpoint-type", "chat"),
        *("--streaming", "--synthetic-input-tokens-mean", input_len),
        *("--output-tokens-mean", output_len, "--extra-inputs", "ignore_eos:true"),
        *("--request-count", n, *(("--request-rate", value) if rate else ())),
        *(() if rate else ("--concurrency", value)),
    ]
    guidellm = [
        *("guidellm", "benchmark", "--target", root, "--model", target.model),
        *("--profile", "poisson" if rate else "concurrent", "--rate", value),
        *("--data", f"prompt_tokens={input_len},output_tokens={output_len}", "--max-requests", n),
    ]
    named = {"vllm": vllm, "aiperf": aiperf, "guidellm": guidellm}
    return {name: shlex.join(map(str, words)) for name, words in named.items()}
