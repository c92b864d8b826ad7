"""Notebooks 00 and 02 through the runner: decisions for any card, chained, with the scenario asked for once."""

import json
from pathlib import Path

import pytest

from kit import run
from kit.catalog.paths import DATA


def results(tmp_path: Path, gpu: str, **asked: str) -> tuple[dict, dict]:
    rows, index = run.walkthrough(run.select(["00", "02"]), tmp_path / gpu, run.preset(gpu), asked)
    assert [row["error"] for row in rows] == [None, None]
    assert all(line in index.read_text(encoding="utf-8") for line in rows[1]["decision"][:1])
    first, second = (json.loads(Path(row["results"]).read_text(encoding="utf-8")) for row in rows)
    return first, second


def test_a_card_that_cannot_hold_the_model_gets_an_answer_and_the_chain_holds(tmp_path):
    first, second = results(tmp_path, "rtx-4090-24gb")
    assert first["results"]["asked"] == second["results"]["asked"]
    assert second["results"]["asked"]["limited_by"] == "weights"
    assert second["results"]["recommended"]["gpu_count"] > 1
    assert any("h200" in change for change in second["results"]["would_fit"])
    assert "03" in first["decision"][-1]
    assert len(first["results"]["to_find_out"]) == 10
    told = (tmp_path / "rtx-4090-24gb/02_size_vram/notebook.ipynb").read_text(encoding="utf-8")
    assert "00 said: " + first["decision"][1] in told


def test_a_scenario_of_several_engines_is_packed(tmp_path):
    path = str(DATA / "scenarios" / "multi-agent.yaml")
    _, second = results(tmp_path, "h200-sxm-141gb", scenario=path, headroom_fraction="0.1")
    assert len(second["results"]["separate_engines"]) == 3
    assert second["scenario"] == path
    assert "3 engines on 1x h200-sxm-141gb fit" in second["decision"][1]


@pytest.mark.parametrize("name", ["headroom_fractoin", "kv_cache_type"])
def test_a_misspelt_parameter_is_refused(tmp_path, name):
    with pytest.raises(run.UserError, match=f"unknown parameter '{name}'"):
        results(tmp_path, "l40s-48gb", **{name: "1"})
