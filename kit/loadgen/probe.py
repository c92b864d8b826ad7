"""Before the clock starts: is the server there, and how many tokens does a word of prompt cost."""

import http.client
import re
import socket
import ssl
from dataclasses import replace

from kit.errors import UserError
from kit.loadgen.plan import Target
from kit.loadgen.prompts import PromptModel, request_bytes

PROBE_TIMEOUT_S = 30.0
PROBE_WORDS = (40, 296)
PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
# What a word may plausibly cost, and a chat template add; else the server's count is not believed.
TOKENS_PER_WORD = (0.5, 8.0)  # 5.4 with one token per character
OVERHEAD_TOKENS = (-2.0, 1000.0)


def calibrate(target: Target, salt: int, system: bool = False) -> tuple[Target, PromptModel, list[str]]:
    """Two one-token requests: prompt tokens = overhead + tokens_per_word * words; one more with a `system` message.

    Also finds a server that refuses ignore_eos. Raises UserError where nothing listens, or where
    the server refuses the key, the model or the request as such.
    """
    plain, warnings, counts = PromptModel(salt), list[str](), list[int]()
    for words in PROBE_WORDS:
        status, body = _ask(target, plain, words)
        if status in (400, 422) and target.engine_fields:
            target = replace(target, engine_fields=False)
            warnings.append("the server refuses ignore_eos and min_tokens: answers may end early")
            status, body = _ask(target, plain, words)
        if status in (400, 401, 403, 404, 405, 422):
            said = " ".join(body[:300].decode(errors="replace").split())
            raise UserError(f"{target.base_url}, model {target.model!r}: HTTP {status} {said}")
        if status != 200:
            return target, plain, [*warnings, f"the probe failed ({status}); prompt lengths are not corrected"]
        counts += map(int, PROMPT_TOKENS.findall(body)[-1:])
    if len(counts) < len(PROBE_WORDS):
        return target, plain, [*warnings, "the server gives no usage; a prompt word is taken for one token"]
    per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    overhead = counts[0] - per_word * PROBE_WORDS[0]
    if not (
        TOKENS_PER_WORD[0] <= per_word <= TOKENS_PER_WORD[1] and OVERHEAD_TOKENS[0] <= overhead <= OVERHEAD_TOKENS[1]
    ):
        return target, plain, [*warnings, f"usage.prompt_tokens of the probes {counts} is not plausible"]
    prompts = PromptModel(salt, per_word, overhead)
    if system:
        _, body = _ask(target, plain, PROBE_WORDS[0], system=True)
        more = sum(map(int, PROMPT_TOKENS.findall(body)[-1:])) - counts[0] - per_word * PROBE_WORDS[0]
        if -1 <= more <= OVERHEAD_TOKENS[1]:  # a model without such a message refuses it
            prompts = replace(prompts, system_tokens=more)
    return target, prompts, warnings


def _ask(target: Target, prompts: PromptModel, words: int, system: bool = False) -> tuple[int | str, bytes]:
    """One blocking request for one token: status and body, or why there is none."""
    texts = [(role, prompts.text(f"probe {role} {words}", words)) for role in ("system", "user")]
    data = request_bytes(target, texts[0 if system else 1 :], 1)
    try:
        sock = socket.create_connection(target.address, min(PROBE_TIMEOUT_S, target.timeout_s))
        if target.tls:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=target.address[0])
    except OSError as error:
        raise UserError(f"cannot reach {target.base_url}: {error}") from None
    with sock:
        try:
            sock.sendall(data)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, b""
