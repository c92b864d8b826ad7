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

# Common words of four letters: one token each, with their leading space, in the usual vocabularies.
WORDS = """
    area army back base bill body book card care case cell city club cost data date deal door face fact farm film fire
    food form game girl goal hall hand head help home hope hour idea king land life line list loss love mind move name
    need news note page part past plan rate rest risk road role room rule side size star step task team term test time
    town tree type unit user view wall week wife wind word work year
""".split()  # noqa: SIM905
WORD_BYTES = 5
POOL_WORDS = 1 << 16
LABEL_WORDS = 8  # 87 words to the 8th power: labels of one run and of two runs do not meet


@dataclass(frozen=True)
class PromptModel:
    """What prompt words cost here: tokens = overhead (of a turn) + system's (if any) + tokens_per_word * words."""

    salt: int
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    system_tokens: float = 0.0

    def text(self, key: str, tokens: float) -> bytes:
        """About `tokens` tokens of text (needs no JSON escaping), the same for the same key."""
        words = max(1, round(tokens / self.tokens_per_word))
        label = random.Random(f"{self.salt}/{key}").choices(WORDS, k=min(LABEL_WORDS, words))
        return " ".join(label).encode() + _pool_slice(crc32(key.encode()) % POOL_WORDS, words - len(label))


@cache
def _pool() -> bytes:
    return "".join(" " + word for word in random.Random(0).choices(WORDS, k=POOL_WORDS)).encode()


def _pool_slice(start: int, words: int) -> bytes:
    first, size = WORD_BYTES * start, WORD_BYTES * words
    text = _pool()[first : first + size]
    return text if len(text) == size else (_pool()[first:] + _pool() * (words // POOL_WORDS + 1))[:size]


class Conversation:
    """One session on its way: the transcript so far and the request that the next turn sends."""

    def __init__(self, session: Session, prompts: PromptModel, parent: "Conversation | None" = None) -> None:
        self.session, self.prompts, self.parent = session, prompts, parent
        self.turn = self.children_left = 0
        self.over = False
        self.input_lens = session.input_lens()
        self.key: str = f"{parent.key}.{session.key}" if parent else str(session.key)
        self.messages: list[tuple[str, bytes]] = []
        self.held_tokens: int | None = None

    @property
    def name(self) -> str:
        """What a router knows the session by, another in every run."""
        return f"{self.prompts.salt:x}-{crc32(self.key.encode()):08x}"

    @property
    def last(self) -> bool:
        return self.turn + 1 >= len(self.session.turns)

    def ask(self) -> None:
        """Add the new text of this turn to the transcript, which a compaction begins again."""
        turn, shared = self.session.turns[self.turn], self.session.shared_prefix_tokens
        tokens, parts = turn.new_tokens - self.prompts.overhead_tokens, list[bytes]()
        if self.turn == 0 or turn.compact_to is not None:
            label = f"prefix {self.session.prefix_id}"
            tokens -= self.prompts.system_tokens if shared else 0.0
            fitting = shared + min(0.0, tokens - 1)  # where headers leave less than a word for the turn
            self.messages = [("system", self.prompts.text(label, fitting))] if shared else []
        elif self.held_tokens is not None:  # as the server counts, headers of messages included
            tokens += self.input_lens[self.turn] - turn.new_tokens - self.held_tokens
        if turn.compact_to:
            self.messages.append(("user", self.prompts.text(f"{self.key} summary {self.turn}", turn.compact_to)))
        if self.turn == 0:
            done = 0
            for extent, end in self.session.path:  # text that other sessions of a trace share
                parts.append(self.prompts.text(f"extent {extent}", end - done))
                tokens, done = tokens - (end - done), end
        if tokens > 0 or not parts:
            parts.append(self.prompts.text(f"{self.key} turn {self.turn}", tokens))
        self.messages.append(("user", b" ".join(parts)))

    def answered(self, text: str, held_tokens: int | None = None) -> None:
        """Add the server's answer, and move to the next turn; it counts that many tokens until here."""
        self.held_tokens = held_tokens
        self.messages.append(("assistant", json.dumps(text or " ")[1:-1].encode()))
        self.turn += 1


def request_bytes(target: Target, messages: list[tuple[str, bytes]], output_len: int, session: str = "") -> bytes:
    """The whole HTTP request, head and JSON body, ready to be sent; a session's name keeps it on one replica."""
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
    named = b"X-Session-Id: %s\r\n" % session.encode() if session else b""
    return _head(target) + named + b"Content-Length: %d\r\n\r\n" % len(body) + body


@cache
def _head(target: Target) -> bytes:
    host, port = target.address
    head = f"POST {target.path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n"
    if target.api_key_env:
        head += f"Authorization: Bearer {os.environ[target.api_key_env]}\r\n"
    return (head + "Content-Type: application/json\r\n").encode()
