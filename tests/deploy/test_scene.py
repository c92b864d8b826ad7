"""Where nginx and Prometheus are missing, one emulator is loaded and its page read."""

from kit.deploy import Source, scene, stage
from kit.engine_config import EngineConfig
from kit.loadgen import Options, fixed_sessions, level, measure
from kit.scenario import load


def test_a_scene_without_nginx_and_prometheus_says_so_and_still_sees_the_queue(monkeypatch):
    monkeypatch.setattr(stage.shutil, "which", lambda name: None if name in stage.PROGRAMS.values() else "/bin/sh")
    config = EngineConfig(max_model_len=1024, max_num_seqs=4)
    made = scene.scene(Source(load("burst-10000"), "h100-sxm-80gb"), config, 2, faster=120)
    try:
        assert "no nginx" in made.how
        assert "no prometheus" in made.how
        crowd = level("concurrency", 16, fixed_sessions(200, 100), duration_s=2)
        measure(made.target, [crowd], Options(log=lambda line: None))
        curves = made.panel({"waiting": "model:requests_waiting:per_replica", "p95": "model:ttft_seconds:p95"})
        assert set(curves) == {"waiting"}
        assert max(curves["waiting"][1]) > 5
        assert [one["alert"] for one in made.alerts()] == ["QueueBacklog"]
    finally:
        made.stop()


def test_durations_of_rules_are_divided_and_names_are_not():
    text = "scrape_interval: 5s\nrecord: a:ratio5m\nexpr: rate(b[1h]) offset 5m\nfor: 2m\n"
    assert stage.sped_up(text, 60) == (
        "scrape_interval: 250ms\nrecord: a:ratio5m\nexpr: rate(b[60000ms]) offset 5000ms\nfor: 2000ms\n"
    )
