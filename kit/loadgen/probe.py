"""Before the clock starts: is the server there, and how many tokens does a word of prompt cost."""

import socket
import ssl
from dataclasses import replace
from time import monotonic

from kit.errors import UserError
from kit.loadgen.plan import Target
from kit.loadgen.prompts import PromptModel, request_bytes
from kit.loadgen.stream import StreamParser

PROBE_TIMEOUT_S = 30.0
PROBE_WORDS = (40, 296)
# What a word may plausibly cost, and a chat template add; else the server's count is not believed.
TOKENS_PER_WORD = (0.5, 8.0)  # above 6: a tokenizer of single characters
OVERHEAD_TOKENS = (-2.0, 1000.0)


def calibrate(target: Target, salt: int) -> tuple[Target, PromptModel, list[str]]:
    """Two one-token requests: prompt tokens = overhead + tokens_per_word * words.

    Also finds a server that refuses ignore_eos. Raises UserError where nothing listens, or where
    the server refuses the key, the model or the request as such.
    """
    plain = PromptModel(salt)
    counts = []
    for words in PROBE_WORDS:
        answer = _ask(target, plain, words)
        if answer.status in (400, 422) and target.engine_fields:
            target = replace(target, engine_fields=False)
            answer = _ask(target, plain, words)
        if answer.status in (400, 401, 403, 404, 405, 422):
            detail = f": {answer.detail}" if answer.detail else ""
            raise UserError(
                f"{target.base_url}{detail} (HTTP {answer.status}, model {target.model!r})"
            )
        if answer.outcome() is not None:
            warning = f"the probe failed ({answer.outcome()}); prompt lengths are not corrected"
            return target, plain, [warning]
        counts.append(answer.usage.get("prompt_tokens"))
    return target, *_fit(plain, counts, target)


def _fit(
    plain: PromptModel, counts: list[int | None], target: Target
) -> tuple[PromptModel, list[str]]:
    warnings = []
    if not target.engine_fields:
        warnings.append("the server refuses ignore_eos and min_tokens: answers may end early")
    low, high = counts
    if low is None or high is None:
        warnings.append("the server gives no usage; a prompt word is taken for one token")
        return plain, warnings
    per_word = (high - low) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    overhead = low - per_word * PROBE_WORDS[0]
    plausible = (
        TOKENS_PER_WORD[0] <= per_word <= TOKENS_PER_WORD[1]
        and OVERHEAD_TOKENS[0] <= overhead <= OVERHEAD_TOKENS[1]
    )
    if not plausible:
        warnings.append(f"usage.prompt_tokens of the probes ({low}, {high}) is not plausible")
        return plain, warnings
    return replace(plain, tokens_per_word=per_word, overhead_tokens=overhead), warnings


def _ask(target: Target, prompts: PromptModel, words: int) -> StreamParser:
    """One blocking request for one token."""
    parser = StreamParser()
    messages = [("user", prompts.text(f"probe {words}", words))]
    data = request_bytes(target, messages, 1)
    until = monotonic() + min(PROBE_TIMEOUT_S, target.timeout_s)
    try:
        sock = socket.create_connection(target.address, timeout=PROBE_TIMEOUT_S)
        if target.tls:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.address[0])
    except OSError as error:
        raise UserError(f"cannot reach {target.base_url}: {error}") from None
    with sock:
        try:
            sock.sendall(data)
            while not parser.complete and parser.reason is None and monotonic() < until:
                sock.settimeout(max(0.01, until - monotonic()))
                answer = sock.recv(1 << 16)
                if not answer:
                    parser.close()
                    break
                parser.feed(answer, monotonic())
        except OSError:
            parser.reason = parser.reason or "no answer"
    return parser
