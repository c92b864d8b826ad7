"""What a request says about its session, without its content: messages counted, compared and sized."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import Any

from kit.record.sessions import Sessions

SESSION, PARENT = b"x-session-id", b"x-parent-session-id"
BYTES_PER_TOKEN = 4  # where no usage says better


def chain(parts: Sequence[Any]) -> list[bytes]:
    """A hash for each part that also covers all before it: equal hashes, equal beginnings."""
    hashes, digest = [], b""
    for part in parts:
        digest = blake2b(digest + json.dumps(part, sort_keys=True).encode(), digest_size=6).digest()
        hashes.append(digest)
    return hashes


class Asked:
    """A model call's request: its session, the prefix that sessions share, what it waited for."""

    def __init__(self, body: bytes, headers: Sequence[tuple[bytes, bytes]], sessions: Sessions) -> None:
        try:
            self.body: Any = json.loads(body)
            messages = self.body.get("messages") or [{"role": "user", "content": self.body.get("prompt")}]
            roles = [message["role"] for message in messages]
        except (ValueError, AttributeError, KeyError, TypeError):
            self.body, messages, roles = None, [], []  # the upstream refuses it
        given = {name: value.decode(errors="replace") for name, value in headers if name in (SESSION, PARENT)}
        tools = (self.body or {}).get("tools") or []
        hashes = chain([tools, *messages])
        session, parent = sessions.identify(given.get(SESSION, ""), given.get(PARENT, ""), hashes)
        systems = len(list(takewhile(lambda role: role in ("system", "developer"), roles)))
        shared, self.size = (len(json.dumps([tools, part])) for part in (messages[:systems], messages))
        self.share = shared / self.size
        latest = roles[-1 - list(reversed(["", *roles])).index("assistant") :] if "assistant" in roles else []
        self.told = {
            "session": session,
            "parent": parent,
            "prefix": hashes[systems].hex(),
            "model": (self.body or {}).get("model"),
        }
        self.told |= {"tool_results": latest.count("tool"), "stream": bool((self.body or {}).get("stream"))}

    def counted(self, usage: dict[str, Any], output_tokens: int) -> dict[str, Any]:
        """Tokens of prompt, shared prefix and answer; estimated from bytes where the server gave no usage."""
        given = usage.get("prompt_tokens")
        tokens = given if isinstance(given, int) else max(1, self.size // BYTES_PER_TOKEN)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        told = {"input_tokens": tokens, "output_tokens": output_tokens, "cached_tokens": cached}
        return told | {"prefix_tokens": min(tokens - 1, round(self.share * tokens)), "estimated": given is None}
