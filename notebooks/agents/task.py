"""What the three agents share: two tools, the questions, the command line, and what is told at the end.

Nothing here belongs to a framework. An agent is told where its model is (`--base-url`, `--model`, the key from
OPENAI_API_KEY) and prints one JSON object: its answers, how often each tool ran, how many chunks were streamed.
"""

import argparse
import json
import os
import sys
import time
import uuid
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

# No framework reports home: this must stand before one is imported.
os.environ |= {"OTEL_SDK_DISABLED": "true", "CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}
os.environ |= {"CREWAI_TESTING": "true", "CREWAI_DISABLE_VERSION_CHECK": "true", "LANGSMITH_TRACING": "false"}

ROLE = "You answer customers of a shop. Look things up with your tools before you answer, and answer in one sentence."
QUESTION = "Where is order 1042, and how many days does a parcel take to postcode 10115?"
FOLLOW_UP = "And if it is returned, what happens then?"
SPECIALISTS = ("orders", "deliveries", "returns")
LEAD = "You lead three specialists. Ask each of them with your tools, all at once, then answer in one sentence."

Order = Annotated[Literal["1042", "1043"], "number of the order"]
Postcode = Annotated[Literal["10115", "80331"], "where it goes"]
ORDERS = {"1042": "left the warehouse this morning", "1043": "waits for payment"}
DAYS = {"10115": 2, "80331": 3}
ran: Counter[str] = Counter()  # tools that really ran


def find_order(order_id: Order) -> str:
    """Where an order is."""
    ran["find_order"] += 1
    time.sleep(0.12)  # a database
    return f"Order {order_id} {ORDERS[order_id]}."


def delivery_days(postcode: Postcode) -> str:
    """Days a parcel takes to a postcode."""
    ran["delivery_days"] += 1
    time.sleep(0.05)  # a service
    return f"{DAYS[postcode]} days to {postcode}."


def arguments() -> argparse.Namespace:
    """The command line; `key` from the environment, `session` new."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True, help="http://HOST:PORT/v1 of an OpenAI-compatible server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--orchestrate", action="store_true", help="three sub-agents at once instead of two tools")
    parser.add_argument("--max-tokens", type=int, default=160, help="of one answer")
    asked = parser.parse_args()
    asked.key = os.environ.get("OPENAI_API_KEY", "none")
    asked.base_url = asked.base_url.rstrip("/").removesuffix("/v1") + "/v1"
    asked.session = f"{Path(sys.argv[0]).stem.removesuffix('_agent')}-{uuid.uuid4().hex[:6]}"
    _only(urlsplit(asked.base_url).hostname)
    return asked


def headers(session: str, parent: str = "") -> dict[str, str]:
    """What tells a recording which session a call belongs to, and which session started that one."""
    return {"x-session-id": session} | ({"x-parent-session-id": parent} if parent else {})


def tell(framework: str, asked: argparse.Namespace, answers: list[str], chunks: int) -> None:
    """Print the outcome."""
    told = {"framework": framework, "version": version(framework), "session": asked.session}
    told |= {"tools_run": dict(ran), "streamed_chunks": chunks, "answers": answers}
    sys.stdout.write(json.dumps(told) + "\n")


def _only(host: str | None) -> None:
    """Connections to another host than the model's are refused, whoever wants one."""

    def audit(event: str, given: tuple[object, ...]) -> None:
        if event == "socket.getaddrinfo" and given[0] not in (host, None, "127.0.0.1", "localhost"):
            raise PermissionError(f"this agent talks to {host} alone, not to {given[0]}")

    sys.addaudithook(audit)
