"""The stored notebooks keep the rules that make them readable, runnable and checkable."""

import ast
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kit import run
from kit.catalog.paths import load_yaml

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
ALL = PATHS + sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
SOURCES = sorted((NOTEBOOKS / "src").glob("*.py"))
PARAMETERS = sorted((NOTEBOOKS / "parameters").glob("*.yaml"))
ABSOLUTE = re.compile(r"/(home|root|Users|tmp|work|mnt)/|[A-Z]:\\")
EVERYWHERE = {"gpu", "model", "output_dir"}

spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

each = pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}/{p.stem}")


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(path: Path) -> list[dict]:
    return [cell for cell in cells_of(path) if cell["cell_type"] == "code"]


def texts(cell: dict) -> str:
    """All text that a cell's outputs show."""
    shown = []
    for output in cell["outputs"]:
        shown += ["".join(output.get("text", ""))]
        shown += ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(shown)


def test_there_are_notebooks():
    assert len(PATHS) >= 1
    assert [p.stem for p in PATHS] == [p.stem for p in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_stored_notebooks_are_what_the_source_says(path):
    assert list(build.differences(path)) == []


@each
def test_one_parameters_cell_before_any_import(path):
    cells = code(path)
    (index,) = [i for i, cell in enumerate(cells) if "parameters" in tags(cell)]
    before = "\n".join(source(cell) for cell in cells[:index])
    assert "import" not in before
    # papermill drops a line with a second "=" and cuts a default at "#"
    for line in source(cells[index]).splitlines():
        assert line.count("=") == 1
        assert line.count("#") == 1, "each parameter says what it is"


@each
def test_papermill_reads_every_parameter(path):
    (cell,) = [cell for cell in code(path) if "parameters" in tags(cell)]
    written = {
        node.target.id: ast.literal_eval(node.value)
        for node in ast.parse(source(cell)).body
        if isinstance(node, ast.AnnAssign)
    }
    assert len(written) == len(source(cell).splitlines())
    assert run.parameters_of(path) == written
    assert written.keys() >= EVERYWHERE


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_parameter_files_hold_known_names_and_types(path):
    assert load_yaml(path)["gpu"] == path.stem
    filled = run.fill(PATHS, run.preset(path.stem), {})
    assert {values["gpu"] for values in filled.values()} == {path.stem}


@each
def test_cells_are_short(path):
    plain = [c for c in code(path) if "parameters" not in tags(c)]
    lengths = [len(source(cell).splitlines()) for cell in plain]
    assert statistics.median(lengths) <= 6
    assert max(lengths) <= 18
    assert len(cells_of(path)) <= 50


@each
def test_definitions_only_where_they_are_the_lesson(path):
    for cell in code(path):
        tree = ast.parse(source(cell))  # also refuses %magic and !shell
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if any(isinstance(node, kinds) for node in ast.walk(tree)):
            assert "lesson" in tags(cell)


@each
def test_checked_cells_can_be_checked(path):
    checked = [cell for cell in code(path) if "nbval-check-output" in tags(cell)]
    assert checked
    for cell in checked:
        assert cell["execution_count"], "nbval compares nothing without a count"
        assert texts(cell).strip()
        assert all(o.get("name") != "stderr" for o in cell["outputs"])


@each
def test_cells_ran_from_first_to_last(path):
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))


@each
def test_no_paths_tracebacks_widgets_or_odd_tags(path):
    for cell in cells_of(path):
        assert not {"raises-exception", "nbval-skip"} & set(tags(cell))
        assert set(cell["metadata"]) <= {"tags"}
        assert not re.search(r"sys\.path|filterwarnings|ipywidgets|open\(", source(cell))
    for cell in code(path):
        assert not re.search(r"/(home|root|Users|tmp|work|mnt)/|[A-Z]:\\\\", source(cell) + texts(cell))
        assert "Traceback" not in texts(cell)
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        assert not any("widget" in kind or "javascript" in kind for kind in kinds)
        assert all(output["output_type"] != "error" for output in cell["outputs"])


@each
def test_first_cell_is_the_title(path):
    first = cells_of(path)[0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# " + path.stem[:2])


@each
def test_stored_size(path):
    assert path.stat().st_size < 1_000_000


def test_learners_copies_hide_what_solutions_show(tmp_path):
    text = '# %% tags=["exercise"]\nanswer = None\n# solution\nanswer = 6 * 7\n\n'
    text += '# %% tags=["solution"]\nprint("because")\n'
    path = tmp_path / "77_exercise.py"
    path.write_text(text)
    learner = [cell.source for cell in build.compose(path, solutions=False).cells]
    solved = [cell.source for cell in build.compose(path, solutions=True).cells]
    assert learner == ["answer = None\n# Write your code here"]
    assert solved == ["answer = None\n# solution\nanswer = 6 * 7", 'print("because")']


def test_a_changed_source_is_noticed(tmp_path, monkeypatch):
    original = SOURCES[0]
    changed = tmp_path / original.name
    changed.write_text(original.read_text() + "\n# %%\nprint(1)\n")
    lines = list(build.differences(changed))
    assert len(lines) == 2
    assert "make notebooks" in lines[0]


def nbval(path: Path) -> subprocess.CompletedProcess[str]:
    flags = "--nbval-lax --nbval-current-env --nbval-cell-timeout=120 -p no:cacheprovider -p no:xdist"
    command = [sys.executable, "-m", "pytest", *flags.split(), f"--rootdir={path.parent}"]
    return subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=path.parent)


def test_nbval_fails_on_a_changed_decision(tmp_path):
    path = Path(shutil.copy(PATHS[0], tmp_path))
    book = json.loads(path.read_text(encoding="utf-8"))
    checked = next(c for c in book["cells"] if "nbval-check-output" in tags(c))
    (stream,) = checked["outputs"]
    first, *rest = "".join(stream["text"]).splitlines(keepends=True)
    stream["text"] = ["Another decision.\n", *rest]
    path.write_text(json.dumps(book))
    outcome = nbval(path)
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "Another decision." in outcome.stdout
    assert first.strip() in outcome.stdout
    assert re.search(r"\b1 failed", outcome.stdout)


def test_readme_lists_the_notebooks_as_their_headers_say():
    assert build.README.read_text(encoding="utf-8") == build.readme()
    linked = re.findall(r"\(notebooks/(\w+)\.ipynb\)", build.readme())
    assert linked == sorted(path.stem for path in build.SOURCES.glob("[0-9][0-9]_*.py"))
