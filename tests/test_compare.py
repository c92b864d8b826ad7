"""Runs of several GPUs side by side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import compare
from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError

KIT = [sys.executable, "-c", "from kit.cli import main; main()", "compare"]


def written(root: Path, gpu: str, notebook: str, results: Any, **more: Any) -> None:
    record = {"gpu": gpu, "model": "llama-3.1-8b", "scenario": "customer-service", "source": "emulator", **more}
    folder = root / gpu / notebook
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**record, "results": results}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    fits = {"gpu_count": 2, "sessions": 92, "kv_cache_tokens": 757_312}
    written(tmp_path, "h100-sxm-80gb", "02_size_vram", {"recommended": fits})
    written(tmp_path, "l40s-48gb", "02_size_vram", {"recommended": None})
    curve = [{"output_tokens_per_s": 70.0}, {"output_tokens_per_s": 189.0, "ttft_p90_s": None}]
    written(tmp_path, "l40s-48gb", "04_load_test", {"curve": curve}, source="live")
    return tmp_path


def test_values_are_side_by_side_with_where_they_come_from(runs: Path) -> None:
    found = compare.compare(compare.read(runs))
    one, two = found["runs"]
    assert (one["gpu"], two["gpu"]) == ("h100-sxm-80gb", "l40s-48gb")
    assert one["values"]["sessions that fit"] == 92
    assert two["values"]["sessions that fit"] is None  # unknown, not 0
    assert two["values"]["tokens per second at most streams"] == 189.0
    assert two["provenance"]["tokens per second at most streams"] == "measured"
    assert one["provenance"]["tokens per second at most streams"] is None
    assert "TTFT p90 at most streams (s)" not in found["quantities"]  # no run knows it
    assert not found["warnings"]


def test_an_emulator_is_never_called_measured(runs: Path) -> None:
    written(runs, "h100-pcie-80gb", "04_load_test", {"curve": [{"output_tokens_per_s": 50.0}]})
    found = compare.compare(compare.read(runs))
    name = "tokens per second at most streams"
    assert compare.told_how(found, name) == "h100-pcie-80gb modelled, l40s-48gb measured"


def test_own_entry_of_a_list(tmp_path: Path) -> None:
    rows = [{"gpu": "l4-24gb", "slo_attainment_fraction": 0.2}, {"gpu": "l40s-48gb", "slo_attainment_fraction": 0.9}]
    written(tmp_path, "l40s-48gb", "03_budget_latency", {"candidates": rows})
    (run,) = compare.compare(compare.read(tmp_path / "l40s-48gb"))["runs"]
    assert run["values"]["turns within the SLO"] == 0.9


def test_other_models_are_told(runs: Path) -> None:
    written(runs, "h200-sxm-141gb", "02_size_vram", {"recommended": None}, model="phi-4")
    assert compare.compare(compare.read(runs))["warnings"] == ["the runs differ in model: llama-3.1-8b; phi-4"]


def test_table_and_figure(runs: Path) -> None:
    done = subprocess.run([*KIT, str(runs), "--out", str(runs / "out")], capture_output=True, text=True, check=True)
    assert "2 l40s-48gb" in done.stdout
    assert "unknown" in done.stdout
    assert (runs / "out/compare.png").read_bytes()[:4] == b"\x89PNG"


def test_json_is_one_object(runs: Path) -> None:
    command = [*KIT, str(runs), "--json", "--out", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["figure"] == str(runs / "compare.png")


def test_bad_paths_are_named(runs: Path) -> None:
    (runs / "empty").mkdir()
    (runs / "l40s-48gb/02_size_vram/results.json").write_text("{")
    for path, why in (("gone", "no such folder"), ("empty", "kit run writes them"), ("l40s-48gb", "not a notebook's")):
        with pytest.raises(UserError, match=rf"{path}.*{why}"):
            compare.read(runs / path)


def test_every_column_names_a_notebook_of_the_walkthrough() -> None:
    there = {chapter["notebook"] for chapter in load_yaml(DATA / "walkthrough.yaml")}
    assert {row["notebook"] for row in load_yaml(DATA / "compare.yaml")} <= there
