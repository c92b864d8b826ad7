"""The edge's own scripts on a real nginx: its start, the watch over its engines, draining, TLS."""

import os
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from kit.deploy import Source, render
from kit.engines.launch import free_port
from kit.scenario import load

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("curl")), reason="nginx or curl is not installed"),
]
KEY = "a" * 64


class Peer(ThreadingHTTPServer):
    """A server that answers its own number, and is ill on demand."""

    daemon_threads = True

    def __init__(self, number: int) -> None:
        self.number, self.ill = number, False
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if self.server.ill else 200)
        self.end_headers()
        self.wfile.write(str(self.server.number).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def edge(folder: Path, peers: list[Peer], **values):
    """start.sh as its container runs it; yields the address and the run folder."""
    bundle, port, run = folder / "bundle", free_port(), folder / "run"
    bundle.mkdir()
    (bundle / "values.yaml").write_text(yaml.safe_dump({"edge": {"port": port, **values}}))
    render(Source(load("simple-qa"), "rtx-5090-32gb"), "single-node", bundle)
    lines = [f"server 127.0.0.1:{peer.server_port} weight=10 max_fails=3; # /health\n" for peer in peers]
    (bundle / "edge" / "servers-engines.conf").write_text("".join(lines))
    config = bundle / "edge" / "nginx.conf"
    config.write_text(re.sub(r"listen 8081", f"listen {free_port()}", config.read_text()))
    secrets = bundle / "secrets"
    secrets.mkdir()
    (secrets / "api_keys").write_text(f"agents {KEY}\n")
    if values.get("tls"):
        asked = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
        files = ["-keyout", secrets / "tls.key", "-out", secrets / "tls.crt"]
        subprocess.run(["openssl", *asked, *files], check=True, capture_output=True)
    where = {"EDGE_CONF": str(bundle / "edge"), "EDGE_RUN": str(run), "EDGE_SECRETS": str(secrets)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["sh", bundle / "edge" / "start.sh"], env=os.environ | where, stdout=log, stderr=log, start_new_session=True
        )
        try:
            address = f"http{'s' * bool(values.get('tls'))}://127.0.0.1:{port}"
            until(lambda: answers(address + "/health"))
            yield address, run
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


def answers(url: str, key: str = KEY, session: str = "s", **how) -> str | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}", "X-Session-Id": session})
    try:
        with urllib.request.urlopen(request, timeout=5, **how) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return str(error.code)
    except urllib.error.URLError as error:
        return "certificate" if "CERTIFICATE_VERIFY" in str(error) else None


def until(true, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)
    return found


def listed(run: Path) -> set[int]:
    return {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", (run / "servers-engines.conf").read_text())}


def test_engines_leave_and_return_by_their_health(tmp_path):
    peers = [Peer(number) for number in range(3)]
    ports = [peer.server_port for peer in peers]
    with edge(tmp_path, peers) as (address, run):
        assert listed(run) == set(ports)
        home = {f"s{n}": answers(f"{address}/v1/models", session=f"s{n}") for n in range(30)}
        assert set(home.values()) == {"0", "1", "2"}
        peers[1].ill = True
        until(lambda: listed(run) == {ports[0], ports[2]})
        until(lambda: "1" not in {answers(f"{address}/v1/models", session=name) for name in home})
        moved = {name: answers(f"{address}/v1/models", session=name) for name in home}
        assert {name for name in home if moved[name] != home[name]} == {n for n in home if home[n] == "1"}
        peers[1].ill = False
        until(lambda: listed(run) == set(ports))
        until(lambda: {name: answers(f"{address}/v1/models", session=name) for name in home} == home)
        script = tmp_path / "bundle" / "edge" / "drain.sh"
        subprocess.run(["sh", script, f"127.0.0.1:{ports[0]}"], env=os.environ | {"EDGE_RUN": str(run)}, check=True)
        until(lambda: listed(run) == {ports[1], ports[2]})
        subprocess.run(
            ["sh", script, f"127.0.0.1:{ports[0]}", "back"], env=os.environ | {"EDGE_RUN": str(run)}, check=True
        )
        until(lambda: listed(run) == set(ports))
        for peer in peers:
            peer.ill = True
        time.sleep(8)
        assert listed(run) == set(ports)  # when none answers, all stay: the first one up is found
        peers[2].ill = False
        until(lambda: listed(run) == {ports[2]})


def test_a_key_is_added_and_taken_back_without_a_restart(tmp_path):
    with edge(tmp_path, [Peer(7)]) as (address, run):
        keys = tmp_path / "bundle" / "secrets" / "api_keys"
        assert answers(f"{address}/v1/models", key="b" * 64) == "401"
        keys.write_text(f"new {'b' * 64}\n")
        where = {"EDGE_CONF": str(tmp_path / "bundle" / "edge"), "EDGE_RUN": str(run), "EDGE_SECRETS": str(keys.parent)}
        subprocess.run(["sh", tmp_path / "bundle/edge/start.sh", "reload"], env=os.environ | where, check=True)
        until(lambda: answers(f"{address}/v1/models", key="b" * 64) == "7")
        until(lambda: answers(f"{address}/v1/models") == "401")


def test_tls_is_spoken_from_1_2_on(tmp_path):
    with edge(tmp_path, [Peer(7)], tls=True) as (address, _):
        assert answers(address + "/health") == "certificate"  # self-signed here
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_1):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            expected = None if version == ssl.TLSVersion.TLSv1_1 else "7"
            assert answers(f"{address}/v1/models", context=context) == expected
