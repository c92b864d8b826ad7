"""Synthetic prompts of an asked token length, with prefixes that are shared only where asked.

A text is a slice of one pool of common words, so making a prompt costs a copy. It starts with a
label of words drawn from the run's salt: no run finds the prefix cache of an earlier one warm.
"""

import json
import os
import random
from dataclasses import dataclass
from functools import cache
from zlib import crc32

from kit.loadgen.plan import Target
from kit.workload import Session

# Short common words: one token each, with their leading space, in the usual vocabularies.
WORDS = tuple(
    """time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government
    number night point home water room mother area money story fact month lot right study book
    eye job word business issue side kind head house service friend father power hour game line
    end member law car city community name president team minute idea body information back
    """.split()  # noqa: SIM905
)
POOL_WORDS = 1 << 16
LABEL_WORDS = 8  # 75 words to the 8th power: labels of one run and of two runs do not meet


@dataclass(frozen=True)
class PromptModel:
    """What prompt words cost here: tokens = overhead + tokens_per_word * words."""

    salt: int
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def text(self, key: str, tokens: float) -> bytes:
        """About `tokens` tokens of text (needs no JSON escaping), the same for the same key."""
        words = max(1, round(tokens / self.tokens_per_word))
        draw = random.Random(f"{self.salt}/{key}")
        label = b" ".join(_words()[draw.randrange(len(WORDS))] for _ in range(min(LABEL_WORDS, words)))
        return label + _pool_slice(crc32(key.encode()), words - LABEL_WORDS)


@cache
def _words() -> list[bytes]:
    return [word.encode() for word in WORDS]


@cache
def _pool() -> tuple[bytes, list[int]]:
    draw = random.Random(0)
    words = [b" " + draw.choice(_words()) for _ in range(POOL_WORDS)]
    ends = [0]
    for word in words:
        ends.append(ends[-1] + len(word))
    return b"".join(words), ends


def _pool_slice(start: int, words: int) -> bytes:
    pool, ends = _pool()
    start %= POOL_WORDS
    parts = []
    while words > 0:
        taken = min(words, POOL_WORDS - start)
        parts.append(pool[ends[start] : ends[start + taken]])
        words, start = words - taken, 0
    return b"".join(parts)


class Conversation:
    """One session on its way: the transcript so far and the request that the next turn sends."""

    def __init__(self, session: Session, prompts: PromptModel, parent: "Conversation | None" = None) -> None:
        self.session, self.prompts, self.parent = session, prompts, parent
        self.turn = self.children_left = 0
        self.over = False
        self.input_lens = session.input_lens()
        self.key: str = f"{parent.key}.{session.key}" if parent else str(session.key)
        self.prefix: list[tuple[str, bytes]] = []
        if session.shared_prefix_tokens:
            text = prompts.text(f"prefix {session.prefix_id}", session.shared_prefix_tokens)
            self.prefix = [("system", text)]
        self.messages = list(self.prefix)

    @property
    def last(self) -> bool:
        return self.turn + 1 >= len(self.session.turns)

    def ask(self) -> None:
        """Add the new text of this turn to the transcript."""
        turn = self.session.turns[self.turn]
        if turn.compact_to is not None:
            summary = self.prompts.text(f"{self.key} summary {self.turn}", turn.compact_to)
            self.messages = [*self.prefix, ("user", summary)]
        tokens, parts = float(turn.new_tokens), []
        if self.turn == 0:
            tokens -= self.prompts.overhead_tokens
            done = 0
            for extent, end in self.session.path:  # text that other sessions of a trace share
                parts.append(self.prompts.text(f"extent {extent}", end - done))
                tokens, done = tokens - (end - done), end
        if tokens > 0 or not parts:
            parts.append(self.prompts.text(f"{self.key} turn {self.turn}", tokens))
        self.messages.append(("user", b" ".join(parts)))

    def answered(self, text: str) -> None:
        """Add the server's answer, and move to the next turn."""
        self.messages.append(("assistant", json.dumps(text or " ")[1:-1].encode()))
        self.turn += 1


def request_bytes(target: Target, messages: list[tuple[str, bytes]], output_len: int) -> bytes:
    """The whole HTTP request, head and JSON body, ready to be sent."""
    fields: dict[str, object] = {"model": target.model, "max_tokens": output_len}
    if target.engine_fields:
        fields |= {"min_tokens": output_len, "ignore_eos": True}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if target.endpoint == "chat":
        turns = [b'{"role":"%s","content":"%s"}' % (role.encode(), text) for role, text in messages]
        prompt = b'"messages":[' + b",".join(turns) + b"]"
    else:
        prompt = b'"prompt":"' + b" ".join(text for _, text in messages) + b'"'
    body = json.dumps(fields)[:-1].encode() + b", " + prompt + b"}"
    return _head(target) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@cache
def _head(target: Target) -> bytes:
    host, port = target.address
    lines = [f"POST {target.path} HTTP/1.1", f"Host: {host}:{port}", "Accept: text/event-stream"]
    lines.append("Content-Type: application/json")
    if target.api_key_env:
        lines.append(f"Authorization: Bearer {os.environ[target.api_key_env]}")
    return "".join(line + "\r\n" for line in lines).encode()
