"""kit calibrate: a hidden machine is found again, what stops goes on, what does not belong is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from kit import catalog
from kit.calibrate import VirtualServer, calibrate, load
from kit.calibrate.fit import GROUPS, OWN, play
from kit.calibrate.probes import plan
from kit.cli import main
from kit.emulator import hide
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.loadgen import Level
from kit.predict import Ask, predict
from kit.simulator import replica
from kit.simulator.answers import answers
from kit.simulator.loop import Simulation, SimulationConfig
from kit.steptime import StepTime
from kit.workload import Session, Turn

SEED = 5
CASE = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb"), EngineConfig(max_num_seqs=16)


def hidden() -> VirtualServer:
    limits, steps, _ = replica(*CASE)
    return VirtualServer(*hide(SEED, limits, steps))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "found.json"
    calibrate(*CASE, hidden(), out=out, log=lambda text: None)
    return out


def test_a_hidden_machine_is_predicted_on_loads_that_were_not_probed(found) -> None:
    config, basis = load(found).apply(*CASE)
    truth, plain, ours = hidden(), replica(*CASE), replica(*CASE[:2], config, basis)
    sessions = [Session(key, 0.0, [Turn(1500, 200, 0.01, compact_to=0)] * 10) for key in range(12)]
    each = []
    for limits, steps in ((truth.limits, truth.step_time), plain[:2], ours[:2]):
        sim = Simulation(SimulationConfig(limits, request_s=steps.request_s), steps).run(sessions)
        told = answers(sim, None, None, set())
        each.append((told["tpot_s"]["mean"], told["ttft_s"]["p50"]))
    true, before, after = np.array(each)
    assert abs(before / true - 1)[0] > 0.1  # the machine is another one
    assert np.all(abs(after / true - 1) < (0.03, 0.08))


def test_what_probes_cannot_tell_stays_at_the_prior(found) -> None:
    told, prior = load(found).coefficients, replica(*CASE)[1].coefficients
    assert all(told[name] == pytest.approx(prior[name]) for name in GROUPS["links"][1])  # one GPU
    assert told["chunk"] == pytest.approx(hidden().step_time.truth.request_s, rel=0.2)
    assert load(found).kv_cache_factor == pytest.approx(hidden().limits.kv_blocks / replica(*CASE)[0].kv_blocks)


def test_intervals_are_those_of_the_calibration(found) -> None:
    config, basis = load(found).apply(*CASE)
    done = predict(*CASE[:2], config, Ask(1024, 128, concurrency=8), basis)
    low, high = done["intervals"]["tpot_s_mean"]
    assert high / low == pytest.approx(load(found).tpot_factor_90 ** 2)
    assert high / low < 1.1
    assert done["basis"] == "calibrated"
    assert any("emulator" in text for text in done["warnings"])


def test_every_probe_is_told_before_and_after(found) -> None:
    rows = load(found).probes
    assert {row["probe"] for row in rows} >= {
        "one",
        "prefill",
        "streams-4",
        "streams-16",
        "contexts",
        "burst",
        "return",
    }
    before, after = (
        np.array([abs(row[f"{when}_s"] / row["measured_s"] - 1) for row in rows]) for when in ("before", "after")
    )
    assert np.median(after) < 0.1 * np.median(before)
    assert load(found).probe_s < 600


@pytest.mark.parametrize(
    ("case", "flags", "named"),
    [
        ({0: catalog.model("qwen3-8b")}, {}, "qwen3-8b"),
        ({1: catalog.gpu("h200-sxm-141gb")}, {}, "h200-sxm-141gb"),
        ({}, {"engine": "sglang"}, "sglang"),
        ({}, {"quantization": "fp8"}, "--quantization"),
        ({}, {"engine_version": "0.11.0"}, "--engine-version"),
        ({}, {"enforce_eager": True}, "--enforce-eager"),
    ],
)  # fmt: skip
def test_another_case_is_refused_by_name(found, case, flags, named) -> None:
    asked = [case.get(index, part) for index, part in enumerate(CASE)]
    with pytest.raises(UserError, match=named):
        load(found).apply(asked[0], asked[1], replace(CASE[2], **flags))


def test_limits_may_differ_and_open_options_are_the_servers(found) -> None:
    assert load(found).apply(*CASE[:2], EngineConfig())[0].max_num_seqs == 16
    assert load(found).apply(*CASE[:2], EngineConfig(max_num_seqs=64))[0].max_num_seqs == 64


def test_an_engine_without_a_gpu_is_found_from_a_gpus_datasheet() -> None:
    limits, steps, _ = replica(*CASE)
    slow = {"gemm_bf16": 2500, "attn": 1500, "read": 15, "kv": 40, "layer": 3, "fixed": 3, "row": 5, "api": 0.5}
    truth = StepTime(steps.work, {name: value * slow.get(name, 1) for name, value in steps.coefficients.items()})
    done = calibrate(*CASE, VirtualServer(limits, truth), budget_s=30_000, on_cpu=True, log=lambda text: None)
    assert done.told()["provenance"].startswith("calibrated on an emulator")
    alone = [row for row in done.probes if row["probe"] in ("one", "prefill") and row["requests"] > 1]
    assert max(row["measured_s"] / row["before_s"] for row in alone) > 500
    assert np.median([abs(row["after_s"] / row["measured_s"] - 1) for row in alone]) < 0.02


class Failing(VirtualServer):
    """Goes away at its fourth probe."""

    left = 3

    def measure(self, level: Level):
        self.left -= 1
        if self.left < 0:
            raise UserError("gone")
        return super().measure(level)


def test_a_stopped_calibration_goes_on_where_it_was(tmp_path) -> None:
    out, (limits, steps, _) = tmp_path / "found.json", replica(*CASE)
    failing = Failing(limits, steps)
    with pytest.raises(UserError, match="gone"):
        calibrate(*CASE, failing, out=out, budget_s=60, log=lambda text: None)
    probes = tmp_path / "found.json.probes.jsonl"
    kept = probes.read_text()
    assert [json.loads(line).get("name") for line in kept.splitlines()] == [None, "one", "prefill", "streams-4"]
    probes.write_text(kept + '{"name": "cut o')  # killed while it wrote
    failing.left = 99
    calibrate(*CASE, failing, out=out, budget_s=60, log=lambda text: None)
    assert 99 - failing.left == 4  # streams-16, contexts, burst, return
    assert probes.read_text().startswith(kept)
    failing.left = 1  # complete: the next one measures anew, and loses nothing
    with pytest.raises(UserError, match="gone"):
        calibrate(*CASE, failing, out=out, budget_s=60, log=lambda text: None)
    assert len(list(tmp_path.glob("*.until-*.jsonl"))) == 1


def test_the_parts_of_a_latency_are_its_sum() -> None:
    limits, steps, _ = replica(*CASE)
    steps = StepTime(steps.work, OWN | dict(steps.coefficients))
    for level in plan(limits, 60.0, lambda *size: 0.1):
        probe = VirtualServer(limits, steps).measure(level)
        sums = [name != "gemm_row" for name in GROUPS]  # its derivative alone
        for seconds, parts in play(probe, probe.chains(), limits, steps).values():
            known = np.isfinite(seconds)
            assert np.allclose(parts[known][:, sums].sum(axis=1), seconds[known], rtol=1e-6)


def test_a_probe_played_with_what_it_was_measured_on_gives_it_again() -> None:
    limits, steps, _ = replica(*CASE)
    level = Level("streams-4", [Session(n, 0.0, [Turn(300 + 40 * n, 50 + n)]) for n in range(20)], "concurrency", 4, 4)
    probe = VirtualServer(limits, steps).measure(level)
    assert sorted(map(len, probe.chains())) == [5, 5, 5, 5]
    ttft_s, _ = play(
        probe, probe.chains(), limits, StepTime(steps.work, OWN | dict(steps.coefficients) | {"chunk": 0})
    )["ttft_s"]
    assert np.allclose(ttft_s, probe.frame["ttft_s"], rtol=1e-6)


@pytest.fixture
def kit(monkeypatch, capsys):
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kit", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--base-url", "http://127.0.0.1:9", "--out", "x.json"], "127.0.0.1:9"),
        (["--base-url", "http://127.0.0.1:9", "--out", "nowhere/x.json"], "nowhere"),
        (["--base-url", "http://127.0.0.1:9", "--out", "x.json", "--budget-s", "0"], "--budget-s"),
        (["--base-url", "http://127.0.0.1:9", "--out", "x.json", "--api-key-env", "KIT_NO_KEY"], "KIT_NO_KEY"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(kit, options, named) -> None:
    code, _, told = kit("calibrate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb", *options)
    assert (code, len(told.splitlines())) == (2, 1)
    assert named in told


def test_a_server_that_lists_no_models_is_refused_in_one_line(kit, tmp_path) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url, out = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "x.json")
        code, _, told = kit("calibrate", "--model", "llama-3.1-8b", "--gpu", "l4-24gb", "--base-url", url, "--out", out)
        server.shutdown()
    assert (code, len(told.splitlines())) == (2, 1)
    assert f"{url}/v1/models" in told


def test_a_file_that_is_no_calibration_is_refused(kit, tmp_path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    ask = ["--input-tokens", "9", "--output-tokens", "9", "--concurrency", "1", "--calibration"]
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        code, _, told = kit("predict", "--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb", *ask, str(path))
        assert (code, len(told.splitlines())) == (2, 1)
        assert str(path) in told


def test_a_server_over_http_from_probes_to_prediction(kit, tmp_path) -> None:
    """The commands against `kit emulate --pace`: every call has its first token after 80 ms, then one each 20 ms."""
    case = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb", "--max-num-seqs", "1", "--json"]
    emulate = [sys.executable, "-c", "from kit.cli import main; main()", "emulate", *case, "--port", "0"]
    process = subprocess.Popen([*emulate, "--pace", "80,20"], stdout=subprocess.PIPE, text=True)
    try:
        url, out = json.loads(process.stdout.readline())["base_url"], str(tmp_path / "found.json")
        probed = kit("calibrate", *case, "--base-url", url, "--out", out, "--budget-s", "6")
        other = kit("calibrate", "--model", "qwen3-8b", *case[2:], "--base-url", url, "--out", out)
    finally:
        process.terminate()
        process.wait()
    assert json.loads(probed[1])["measured_on"] == "emulator"
    assert (probed[0], other[0], len(other[2].splitlines())) == (0, 2, 1)
    assert "serves 'llama-3.1-8b', not 'qwen3-8b'" in other[2]
    for command, load_ in (
        ("predict", ["--input-tokens", "500", "--output-tokens", "50", "--concurrency", "1"]),
        ("simulate", ["--workload", "simple-chat", "--sessions", "5"]),
    ):
        told = json.loads(kit(command, *case, "--calibration", out, *load_)[1])
        assert 0.015 < told["tpot_s"]["p50"] < 0.025  # 7 ms without the calibration
