"""The project as a whole: locks, conda door, import direction, size, CI files."""

import ast
import json
import re
import tomllib
from pathlib import Path

import code_lines
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "kit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A module imports only modules of a lower rank, or of its own package.
RANKS = {
    0: ["errors", "units"],
    1: ["catalog", "metrics"],
    2: ["engine_config", "prices"],
    3: ["memory", "telemetry"],
    4: ["scheduler", "steptime"],
    5: ["workload"],
    6: ["scenario", "simulator", "emulator"],
    7: ["decision", "loadgen", "predict"],
    8: ["budget", "engines", "record"],
    9: ["calibrate", "measure"],
    10: ["tune"],
    11: ["fleet"],
    12: ["deploy"],
    13: ["plots", "accuracy", "article"],
    14: ["notebook", "plots_fleet", "plots_load", "report"],
    15: ["compare", "run"],
    16: ["live"],
    17: ["cli"],
}
# Traces become sessions and a workload may replay a trace: two modules, one unit.
UNITS = {"traces": "workload"}
RANK = {name: rank for rank, names in RANKS.items() for name in names}


def pinned(lock: str) -> dict[str, set[str]]:
    """Versions by package of a lock; markers may give a package several."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / lock).read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^ ;\\]+)", line):
            versions.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return versions


def test_dev_lock_is_a_superset_of_the_notebooks_lock():
    notebooks, dev = pinned("notebooks.lock"), pinned("dev.lock")
    assert len(notebooks) > 50
    assert {n: dev.get(n) for n in notebooks} == notebooks


@pytest.mark.parametrize("lock", sorted(p.name for p in (ROOT / "requirements").glob("*.lock")))
def test_locks_are_hashed_and_name_no_host(lock):
    text = (ROOT / "requirements" / lock).read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|\bfile:|@ ", text)
    blocks = re.split(r"\n(?=\S)", text)
    unhashed = [b.split()[0] for b in blocks if "==" in b and "--hash=sha256:" not in b]
    assert not unhashed


def test_locks_serve_windows_without_uvloop():
    text = (ROOT / "requirements" / "notebooks.lock").read_text()
    assert re.search(r"^uvloop==\S+ ; sys_platform != 'win32'", text, re.MULTILINE)
    assert re.search(r"^pywinpty==\S+ ; .*os_name == 'nt'", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("notebooks.lock", ["notebooks", "build"]), ("dev.lock", ["notebooks", "build", "dev"])],
)
def test_locks_hold_every_declared_dependency(lock, extras):
    declared = list(PROJECT["dependencies"])
    for extra in extras:
        declared += PROJECT["optional-dependencies"][extra]
    missing = {Requirement(line).name for line in declared} - pinned(lock).keys()
    assert {canonicalize_name(name) for name in missing} - pinned(lock).keys() == set()


def test_conda_door_leads_to_the_notebooks_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == PROJECT["name"]
    packages = [line for line in conda["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in conda["dependencies"] if isinstance(line, dict)]
    assert [re.split(r"[=>]", line)[0] for line in packages] == ["python", "pip"]
    python = packages[0].removeprefix("python=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    lines = [line for line in pip if line.startswith("-r ")]
    assert lines == ["-r requirements/notebooks.lock"]
    assert "--require-hashes" in pip
    # Any version written here beside the lock must be the lock's.
    for line in pip:
        if not line.startswith("-"):
            wanted = Requirement(line)
            assert all(
                wanted.specifier.contains(version)
                for version in pinned("notebooks.lock")[canonicalize_name(wanted.name)]
            )


def test_conda_door_says_who_uses_each_line():
    text = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [line for line in lines if " # " not in line]
    assert bare == ["- pip:", "- --require-hashes"]
    assert len(lines) >= 5


def kit_files() -> list[Path]:
    return sorted(KIT.rglob("*.py"))


def owner_of(path: Path) -> str:
    top = path.relative_to(KIT).with_suffix("").parts[0]
    return UNITS.get(top, top)


def imports_of(tree: ast.AST) -> set[str]:
    """Top modules of kit that a file imports, also those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "kit":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("kit.")}
    return {UNITS.get(name, name) for name in found}


def against_the_grain(owner: str, tree: ast.AST) -> set[str]:
    """Modules that `owner` may not import."""
    return {n for n in imports_of(tree) if n != owner and RANK[n] >= RANK[owner]}


def test_every_module_has_a_rank():
    owners = {owner_of(path) for path in kit_files()} - {"__init__"}
    assert owners - RANK.keys() == set()


@pytest.mark.parametrize("path", kit_files(), ids=lambda p: p.relative_to(KIT).as_posix())
def test_imports_point_one_way(path):
    owner = owner_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if owner == "__init__":
        assert not imports_of(tree)
    else:
        assert against_the_grain(owner, tree) == set()


def test_the_import_check_sees_a_wrong_import():
    tree = ast.parse("def f():\n    from kit.simulator import x\n    from kit import run\n")
    assert against_the_grain("memory", tree) == {"simulator", "run"}


def test_kit_does_not_grow():
    texts = {str(path): path.read_text(encoding="utf-8") for path in kit_files()}
    assert sum(map(code_lines.code_lines, texts.values())) <= code_lines.ACCEPTED
    assert {name: n for name, text in texts.items() if (n := len(text.splitlines())) > 300} == {}


def functions_of(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{path.name}:{n.name}", n.end_lineno - n.body[0].lineno + 1) for n in nodes]


def test_functions_stay_short():
    lengths = dict(pair for path in kit_files() for pair in functions_of(path))
    assert {name: length for name, length in lengths.items() if length > 45} == {}


def test_ci_runs_every_parameter_file():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["walkthrough"]["strategy"]["matrix"]["gpu"].startswith("${{ fromJSON(")
    assert "notebooks/parameters" in json.dumps(jobs["parameters"])
    assert jobs["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert "workflow_dispatch" in jobs["gpu"]["if"]
    assert "make test" in (ROOT / ".ci/run").read_text()
