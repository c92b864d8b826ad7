"""The workshop's page, make lab, the dev container and Binder: they name what is there."""

import importlib
import inspect
import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/workshop.md").read_text()
COMMANDS = sorted(set(re.findall(r"\bkit (\w+) ([^`\n]*--[^`\n]*)", PAGE)))


@pytest.mark.parametrize(("name", "rest"), COMMANDS, ids=lambda value: value[:40])
def test_every_option_on_the_page_exists(name: str, rest: str) -> None:
    known = set(inspect.signature(importlib.import_module(f"kit.cli.{name}").command).parameters)
    known |= {"set"} if name == "run" else set()  # its parameter is called settings
    assert {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", rest)} <= known


def test_the_exercises_are_in_their_notebooks() -> None:
    named = re.findall(r"^\d\. Notebook (\d\d), \*(\w+)\*", PAGE, re.MULTILINE)
    assert len(named) == 5
    for number, kind in named:
        (source,) = (ROOT / "notebooks/src").glob(f"{number}_*.py")
        assert re.search(rf"^# \d\. {kind}: ", source.read_text(), re.MULTILINE)


def test_the_two_hours_add_up() -> None:
    spans = [tuple(map(int, span)) for span in re.findall(r"^\| (\d+)–(\d+) \|", PAGE, re.MULTILINE)]
    assert spans[0][0] == 0
    assert spans[-1][1] == 120
    assert all(one[1] == two[0] for one, two in pairwise(spans))


def test_make_lab_opens_the_first_notebook() -> None:
    told = subprocess.run(
        ["make", "-n", "lab", "PORT=8901"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--port 8901" in told
    (path,) = re.findall(r"default_url=/lab/tree/(\S+)", told)
    assert (ROOT / "notebooks" / path).is_file()


def test_the_dev_container_sets_up_and_hides_gpus() -> None:
    text = (ROOT / ".devcontainer/devcontainer.json").read_text()
    made = json.loads(re.sub(r"(?m)^\s*//.*$", "", text))
    assert (ROOT / ".devcontainer" / made["build"]["dockerfile"]).is_file()
    assert made["postCreateCommand"] == "make setup"
    assert made["containerEnv"] == {"CUDA_VISIBLE_DEVICES": ""}
    assert all((ROOT / path).is_file() for path in made["customizations"]["codespaces"]["openFiles"])


def test_binder_installs_the_notebooks_lock_by_hash() -> None:
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    (lock,) = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    assert (ROOT / "binder" / lock).resolve() == ROOT / "requirements/notebooks.lock"
    assert "--require-hashes" in lines
    assert os.access(ROOT / "binder/postBuild", os.X_OK)
    python = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert python in matrix["python"]  # one that CI tries
