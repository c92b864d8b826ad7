"""A real Prometheus with the bundle's rules, and an Alertmanager whose message arrives."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml
from behind_nginx import many, names, needs_nginx, staged, until

from kit.catalog.paths import DATA, load_yaml
from kit.deploy.scene import SCALE
from kit.engine_config import EngineConfig

pytestmark = [*needs_nginx, pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")]
RULES = DATA.parent / "docker" / "single-node" / "monitoring" / "rules"


@pytest.fixture
def inbox():
    """A webhook that keeps what is sent to it."""
    messages: list[dict] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", messages
    server.shutdown()


def test_a_queue_becomes_an_alert_and_a_message_and_both_end(tmp_path, inbox):
    url, messages = inbox
    slow = {"config": EngineConfig(max_model_len=8192, max_num_seqs=2)}
    with staged(tmp_path, [slow, slow], faster=60, webhook=url) as (made, _):
        assert until(lambda: len(made.query("up == 1")) == 3)  # two engines and the edge's exporter
        assert not made.query('ALERTS{alertname="QueueBacklog"}')
        seen: list[bool] = []
        firing = 'ALERTS{alertname="QueueBacklog",alertstate="firing"}'
        answers = many(
            made,
            [next(names) for _ in range(40)],
            lambda: seen.append(until(lambda: bool(made.query(firing)))),
            tokens=150,
        )
        assert seen == [True]
        assert {one.status for one in answers} == {200}
        assert until(lambda: not made.query(firing))
        if shutil.which("prometheus-alertmanager"):
            assert until(
                lambda: any("QueueBacklog" in json.dumps(one) and "RESOLVED" in json.dumps(one) for one in messages)
            )
            first = next(one for one in messages if "QueueBacklog" in json.dumps(one))
            assert "requests wait per replica of llama-3.1-8b" in json.dumps(first)
        recorded = {one["metric"]["__name__"] for one in made.query('{__name__=~"(engine|model|price):.+"}')}
        assert {
            "engine:requests_running",
            "model:kv_cache_usage:avg",
            "model:ttft_seconds:p95",
            "price:usd_per_hour",
        } <= recorded


def test_the_notebook_judges_by_the_bundles_own_rules():
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    thresholds = load_yaml(DATA / "watch.yaml")["thresholds"]
    for name, (query, limit, for_s) in SCALE.items():
        assert alerts[name]["expr"] == f"{query} > {thresholds[limit]}"
        assert alerts[name]["for"] == f"{for_s // 60}m"
