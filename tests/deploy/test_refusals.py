"""What the edge keeps out, tried on a real nginx before a server that writes down what reaches it."""

import http.client
import json
from contextlib import contextmanager

import pytest
from behind_nginx import MODEL, ask, bundle, many, needs_nginx
from sse_server import paced, serving

from kit.deploy.stage import stage

pytestmark = needs_nginx


@contextmanager
def guarded(folder, handler, **edge):
    with serving(handler) as server:
        server.metrics = "the engine's own page"
        port = server.base_url.rsplit(":", 1)[1].partition("/")[0]
        with stage(
            bundle(folder / "bundle", 1, **edge), {"engine-0:8000": f"127.0.0.1:{port}"}, folder / "stage"
        ) as made:
            yield made, server


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with guarded(tmp_path_factory.mktemp("door"), paced(0.01, 0.001), max_body="64k") as both:
        yield both


def send(made, method: str, path: str, headers: dict | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    link = http.client.HTTPConnection(made.base_url.removeprefix("http://"), timeout=30)
    link.request(method, path, b"{}" * (method == "POST"), {"Authorization": f"Bearer {made.key}"} | (headers or {}))
    answer = link.getresponse()
    text = answer.read()
    link.close()
    return answer, text


ADMIN = """
    /metrics /sleep /wake_up /is_sleeping /docs /openapi.json /redoc /tokenize /detokenize /load /version
    /v1/load_lora_adapter /v1/unload_lora_adapter /reset_prefix_cache /collective_rpc /server_info /start_profile
    /pause /resume /scale_elastic_ep /generate /flush_cache /update_weights_from_disk /get_server_info
    /abort_request /stub_status /v1/chat/completions/../../../metrics //metrics /v1/../metrics /v1/%2e%2e/metrics
    /v1/models/../../sleep
""".split()  # noqa: SIM905


@pytest.mark.parametrize("path", ADMIN)
def test_admin_and_debug_paths_are_not_served(door, path):
    made, server = door
    before = len(server.heads)
    for method in ("GET", "POST"):
        answer, text = send(made, method, path)
        assert answer.status in (400, 404, 405)
        assert b"engine's own page" not in text
    assert len(server.heads) == before  # the engine never saw it


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Basic dXNlcjpwYXNz", "Bearer ", "KEY"])
def test_without_a_key_nothing_passes(door, given):
    made, server = door
    before = len(server.heads)
    answer, _ = send(made, "POST", "/v1/chat/completions", {"Authorization": given.replace("KEY", made.key)})
    assert answer.status == 401
    assert len(server.heads) == before


def test_the_key_stays_at_the_edge(door):
    made, server = door
    answer = ask(made, session="s", tokens=2)
    assert answer.status == 200
    head = server.heads[-1]
    assert made.key not in head
    assert "authorization" not in head.lower()
    assert made.key not in (made.folder / "edge.log").read_text()


def test_an_oversized_body_is_refused(door):
    made, server = door
    before = len(server.heads)
    assert ask(made, text="x" * 100_000).status == 413
    assert len(server.heads) == before
    assert ask(made, text="x" * 40_000, tokens=2).status == 200


def test_what_the_edge_refuses_is_json_without_a_version(door):
    made, _ = door
    for path in ("/metrics", "/v1/nothing"):
        answer, _ = send(made, "GET", path)
        assert answer.getheader("Server") == "nginx"
        assert "json" in (answer.getheader("Content-Type") or "")


def test_models_are_listed_for_those_with_a_key(door):
    made, _ = door
    answer, text = send(made, "GET", "/v1/models")
    assert (answer.status, text) == (200, b"the engine's own page")
    assert send(made, "GET", "/v1/models", {"Authorization": ""})[0].status == 401


def test_one_runaway_key_is_slowed_down_alone(tmp_path):
    with guarded(tmp_path, paced(0.5, 0.01), connections_per_key=4, requests_per_s_per_key=1) as (made, _):
        answers = many(made, [f"s{n}" for n in range(12)], tokens=3)
        statuses = sorted(one.status for one in answers)
        assert statuses.count(200) >= 4
        assert statuses.count(429) == 12 - statuses.count(200) >= 6
        refused = next(one for one in answers if one.status == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"


def test_the_model_is_what_was_asked_for(door):
    made, server = door
    ask(made, tokens=2)
    assert server.requests[-1]["model"] == MODEL
