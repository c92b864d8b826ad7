"""kit run: strict parameters, evidence kept, reports that stand alone."""

import http.server
import json
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from kit import cli, live, notebook, report, run
from kit.errors import UserError

PARAMETERS = """gpu: str = "h100-sxm-80gb"  # key
model: str = "llama-3.1-8b"  # key
levels: int = 3  # how many
share: float = 0.5  # of one
fast: bool = True  # or slow
output_dir: str = ""  # empty for none"""


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    book = nbformat.v4.new_notebook()
    book.metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "P"}}
    book.cells = [
        nbformat.v4.new_markdown_cell(f"# Title of {name}"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    path = folder / f"{name}.ipynb"
    nbformat.write(book, path)
    return path


def kit(*arguments: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["kit", "run", *arguments])
    cli.main()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "contxt_tokens=1"], "unknown parameter 'contxt_tokens'"),
        (["--set", "gpu=l4-24gb"], "use --gpu"),
        (["--set", "levels"], "not name=value"),
        (["--gpu", "h100-sxm-81gb"], "h100-sxm-80gb"),
        (["--notebooks", "77"], "unknown notebook '77'"),
        (["--scenario", "absent.yaml"], "'absent.yaml': no such file; bundled: "),
        (["--base-url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--base-url", "localhost:8000"], "--base-url localhost:8000"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, told, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        kit(*arguments, "--out", str(tmp_path / "runs"), monkeypatch=monkeypatch)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert told in err
    assert len(err.strip().splitlines()) <= 3
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_a_broken_scenario_is_bad_input(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: [unclosed\n")
    with pytest.raises(SystemExit) as stop:
        kit("--scenario", str(tmp_path / "mine.yaml"), monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert "mine.yaml line 2: not valid YAML" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_bad_input(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        kit("--out", str(tmp_path / "file"), monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert f"kit: {tmp_path}/file/h100-sxm-80gb: Not a directory" in capsys.readouterr().err


def test_values_take_the_type_of_their_default(tmp_path):
    path = write_notebook(tmp_path, "01_types")
    asked = {"model": "8", "levels": "4", "share": "1", "fast": "false"}
    filled = run.fill([path], {"gpu": "l4-24gb"}, asked)["01_types"]
    assert filled == {"gpu": "l4-24gb", "model": "8", "levels": 4, "share": 1.0, "fast": False}


@pytest.mark.parametrize(("name", "text"), [("levels", "four"), ("levels", "4.5"), ("fast", "1"), ("share", "[")])
def test_a_value_of_another_type_is_refused(tmp_path, name, text):
    path = write_notebook(tmp_path, "01_types")
    with pytest.raises(UserError, match=f"parameter {name} is"):
        run.fill([path], {}, {name: text})


@pytest.mark.parametrize(
    "line",
    ['extra: str | None = ""  # papermill cannot read this', "extra: int = 2  # a second = sign"],
)
def test_a_parameter_that_papermill_would_drop_is_refused(tmp_path, line):
    path = write_notebook(tmp_path, "01_lost", parameters=PARAMETERS + "\n" + line)
    with pytest.raises(UserError, match="unknown parameter 'extra'"):
        run.fill([path], {}, {"extra": "7"})


def test_an_unknown_name_in_a_parameter_file_is_refused(tmp_path):
    write_notebook(tmp_path, "01_types")
    (tmp_path / "parameters").mkdir()
    (tmp_path / "parameters" / "l4-24gb.yaml").write_text("gpu: l4-24gb\nlevel: 3\n")
    with pytest.raises(UserError, match=r"l4-24gb.yaml: unknown parameter 'level'; near"):
        run.preset("l4-24gb", tmp_path)
    assert run.preset("a10g-24gb", tmp_path) == {"gpu": "a10g-24gb"}


def test_the_gpu_of_the_host_decides():
    assert run.choose_gpu(None, None) == "h100-sxm-80gb"
    assert run.choose_gpu("l4-24gb", None) == "l4-24gb"
    assert run.choose_gpu(None, "NVIDIA L4") == "l4-24gb"
    assert run.choose_gpu(None, "NVIDIA H100 80GB HBM3") == "h100-sxm-80gb"
    assert run.choose_gpu("l40s-48gb", "NVIDIA L40S") == "l40s-48gb"
    with pytest.raises(UserError, match=r"h100-sxm-80gb.*NVIDIA L4.*l4-24gb.*CUDA_VISIBLE_DEVICES"):
        run.choose_gpu("h100-sxm-80gb", "NVIDIA L4")
    with pytest.raises(UserError, match=r"NVIDIA T1000.*no key"):
        run.choose_gpu(None, "NVIDIA T1000")


def test_hidden_gpus_are_not_looked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run.visible_gpu() is None


def test_a_server_that_answers_is_reachable():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert run.reachable(address + "/v1/") == address  # it answers 501, which is an answer
    thread.join(10)
    server.server_close()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Three notebooks: one that decides, one that fails, one that reads the first."""
    folder = tmp_path_factory.mktemp("notebooks")
    begin = "from kit import notebook\nrun = notebook.begin('{}', gpu=gpu, model=model, "
    begin += "output_dir=output_dir)"
    paths = [
        write_notebook(
            folder,
            "00_decides",
            begin.format("00_decides"),
            "from matplotlib import pyplot as plt\nplt.plot([1, 2])\nplt.show()",
            "run.finish({'levels': levels}, [f'take {levels} <levels>'])",
        ),
        write_notebook(folder, "01_fails", "print('kept')", "1 / 0", "print('never')"),
        write_notebook(
            folder,
            "02_reads",
            begin.format("02_reads"),
            "found = run.earlier('00_decides')['results']",
            "run.finish({}, [f'read {found[\"levels\"]}'])",
        ),
    ]
    root = tmp_path_factory.mktemp("runs") / "l4-24gb"
    rows, index = run.walkthrough(paths, root, {"gpu": "l4-24gb"}, {"levels": "5"})
    return root, rows, index


def test_a_failing_cell_is_told_and_its_evidence_kept(walk):
    root, rows, _ = walk
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[1]["error"] == "cell In [4]: ZeroDivisionError: division by zero"
    cells = json.loads((root / "01_fails" / "notebook.ipynb").read_text())["cells"]
    assert any("kept" in json.dumps(cell.get("outputs", "")) for cell in cells)
    assert "ZeroDivisionError" in (root / "01_fails" / "report.html").read_text()
    assert not (root / "01_fails" / "results.json").exists()


def test_results_chain_from_one_notebook_to_the_next(walk):
    root, rows, _ = walk
    assert rows[2]["decision"] == ["read 5"]
    written = json.loads((root / "00_decides" / "results.json").read_text())
    assert written["results"] == {"levels": 5}
    assert written["decision"] == ["take 5 <levels>"]
    assert written["gpu"] == "l4-24gb"
    assert written["source"] == "emulator"
    keys = {"notebook", "model", "created_utc", "kit_version"}
    assert keys <= written.keys()


class Addresses(HTMLParser):
    """Everything a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "link", "iframe"):
            self.loaded.append(tag)
        if tag == "img":
            self.loaded.append(values["src"][:10])


def test_reports_stand_alone(walk):
    root, _, index = walk
    for page in [index, *root.glob("*/report.html")]:
        parser = Addresses()
        text = page.read_text(encoding="utf-8")
        parser.feed(text)
        assert set(parser.loaded) <= {"data:image"}
        assert not re.search(r"url\(|@import", text)
    assert "data:image/png;base64" in (root / "00_decides" / "report.html").read_text()


def test_the_index_shows_decisions_status_and_parameters(walk):
    _, _, index = walk
    text = index.read_text(encoding="utf-8")
    assert "take 5 &lt;levels&gt;" in text
    assert "ZeroDivisionError" in text
    assert "Title of 00_decides" in text
    assert text.count("report.html") >= 3
    assert "<th>levels</th><td><code>5</code>" in text


def test_an_earlier_runs_results_are_kept_apart(walk, tmp_path):
    folder = tmp_path / "l4-24gb" / "01_fails"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"decision": ["old"]}')
    path = write_notebook(tmp_path, "01_fails", "1 / 0")
    row = run.execute(path, folder, {"gpu": "l4-24gb"})
    assert row["decision"] == []
    assert json.loads((folder / "results.previous.json").read_text())["decision"] == ["old"]


def test_a_mistake_that_only_the_notebook_finds_is_bad_input(tmp_path):
    begin = "from kit import notebook\nrun = notebook.begin('00_x', gpu=gpu, model=model)"
    path = write_notebook(tmp_path, "00_x", begin)
    with pytest.raises(UserError, match=r"00_x, cell In \[3\]: unknown model 'lama-9'"):
        run.walkthrough([path], tmp_path / "runs" / "l4-24gb", {}, {"model": "lama-9"})
    assert (tmp_path / "runs" / "l4-24gb" / "index.html").exists()


def test_a_kernel_that_dies_is_a_failure(tmp_path):
    path = write_notebook(tmp_path, "00_dies", "import os\nos._exit(1)")
    row = run.execute(path, tmp_path / "runs" / "00_dies", {})
    assert row["status"] == "failed"
    assert "DeadKernelError" in row["error"]


def test_command_prints_the_index_and_fails_with_the_notebook(tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path, "00_fails", "raise RuntimeError('first line\\nlast line')")
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    with pytest.raises(SystemExit) as stop:
        kit("--gpu", "l4-24gb", "--out", str(tmp_path / "r"), "--json", monkeypatch=monkeypatch)
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["gpu"] == "l4-24gb"
    assert Path(shown["index"]).exists()
    assert shown["notebooks"][0]["status"] == "failed"
    assert re.match(r"\[1/1\] 00_fails \.\.\. failed, \d+\.\d s\n", err)
    assert "kit: 00_fails failed: cell In [3]: RuntimeError: last line" in err


def test_results_of_another_model_are_left_aside(tmp_path, capsys):
    def begin(name: str, gpu: str = "l4-24gb") -> notebook.Run:
        return notebook.begin(name, gpu=gpu, model="llama-3.1-8b", output_dir=str(tmp_path / name))

    begin("00_a").finish({"n": 1}, ["one"])
    same, other = begin("02_b"), begin("02_b", "a10g-24gb")
    assert same.earlier("00_a")["results"] == {"n": 1}
    assert same.earlier("01_absent") is None
    assert other.earlier("00_a") is None
    assert "left aside" in capsys.readouterr().out


def test_without_output_dir_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = notebook.begin("00_a", gpu="l4-24gb", model="llama-3.1-8b")
    mine.finish({"n": 1}, ["one", "two"])
    assert capsys.readouterr().out.endswith("one\ntwo\n")
    assert list(tmp_path.iterdir()) == []
    assert mine.earlier("00_a") is None


def test_begin_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="unknown source 'replay'"):
        notebook.begin("00_a", gpu="l4-24gb", model="llama-3.1-8b", source="replay")


def test_progress_tells_the_quarters(capsys):
    assert list(notebook.progress(range(8), "levels")) == list(range(8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "levels: 0 of 8"
    assert [re.search(r"\d+ %", line)[0] for line in lines[1:]] == ["25 %", "50 %", "75 %", "100 %"]


def test_tables_align_and_name_the_unknown():
    rows = [
        {"gpu": "l4-24gb", "sessions": 1234, "hours": None, "provenance": "measured"},
        {"gpu": "b200-sxm-180gb", "sessions": None, "hours": 0.51234, "provenance": "quoted"},
    ]
    lines = notebook.table(rows, {"gpu": "GPU", "sessions": "sessions", "hours": "h"}).splitlines()
    assert lines[0].split() == ["GPU", "sessions", "h"]
    assert lines[2].split() == ["l4-24gb", "1,234", "unknown"]
    assert lines[3].split() == ["b200-sxm-180gb", "unknown", "0.512"]
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(UserError, match="unknown provenance 'guessed'"):
        notebook.table([{"n": 1, "provenance": "guessed"}])


def test_reports_honour_tags(tmp_path):
    folder = tmp_path / "l4-24gb" / "00_tags"
    folder.mkdir(parents=True)
    book = nbformat.v4.new_notebook()
    for tag in ("remove-cell", "exercise", "hide-input", "lesson", "plain"):
        cell = nbformat.v4.new_code_cell(f"{tag!r}", metadata={"tags": [tag]})
        cell.outputs = [nbformat.v4.new_output("stream", text=f"out of {tag}")]
        book.cells.append(cell)
    nbformat.write(book, folder / "notebook.ipynb")
    report.write_page(folder, {"title": "Tags", "notebook": "00_tags", "error": None})
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = {tag: f"out of {tag}" in page for tag in ("remove-cell", "exercise", "hide-input")}
    assert shown == {"remove-cell": False, "exercise": False, "hide-input": True}
    assert len(re.findall("<details", page)) == 1  # plain alone is folded; lesson stands open
    assert page.count('<div class="shown">') == 1


SERVER = """import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "tiny"}]}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""
LIVE = (
    PARAMETERS
    + """
scenario: str = "customer-service"  # key
engine: str = "vllm"  # or sglang
source: str = "emulator"  # or live
base_url: str = ""  # live only"""
)
ASK = """import urllib.request
from kit import notebook
run = notebook.begin("{}", gpu=gpu, model=model, source=source, output_dir=output_dir)
def get(base_url): return urllib.request.urlopen(base_url + "/v1/models").status
run.finish({{"status": get(base_url=base_url)}}, [base_url])"""


@pytest.fixture
def live_folder(tmp_path, monkeypatch):
    """Two notebooks that ask the server, the second only where the file `go` is; a stand-in for an engine."""
    book = tmp_path / "notebooks"
    book.mkdir()
    write_notebook(book, "00_first", ASK.format("00_first"), parameters=LIVE)
    wait = f"assert __import__('pathlib').Path({str(tmp_path / 'go')!r}).exists(), 'not yet'"
    write_notebook(book, "01_second", wait, ASK.format("01_second"), parameters=LIVE)
    monkeypatch.setattr(run, "NOTEBOOKS", book)
    (tmp_path / "server.py").write_text(SERVER)
    return tmp_path


def live_run(folder: Path, *more: str, monkeypatch, capsys) -> tuple[int, dict, str]:
    command = f"{sys.executable} {folder / 'server.py'} {{port}} {{flags}}"
    arguments = ["--live", "--engine-command", command, "--out", str(folder / "runs"), "--json", *more]
    code = 0
    try:
        kit(*arguments, monkeypatch=monkeypatch)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_a_live_run_goes_on_where_it_was_stopped(live_folder, monkeypatch, capsys):
    tools = {"monkeypatch": monkeypatch, "capsys": capsys}
    code, first, err = live_run(live_folder, **tools)
    assert (code, [row["status"] for row in first["notebooks"]]) == (1, ["done", "failed"])
    assert "without a GPU: this shows its behaviour, never a speed" in err
    root = live_folder / "runs" / "h100-sxm-80gb"
    written = (root / "00_first" / "results.json").stat().st_mtime_ns
    results = json.loads((root / "00_first" / "results.json").read_text())
    assert results["source"] == "live"
    assert "never a speed" in results["note"]
    assert "behaviour, never a speed" in (root / "index.html").read_text()
    assert "behaviour, never a speed" in (root / "00_first" / "report.html").read_text()
    (live_folder / "go").touch()
    (root / "01_second" / "load").mkdir()
    (root / "01_second" / "load" / "kept").touch()
    code, second, _ = live_run(live_folder, **tools)
    assert (code, [row["status"] for row in second["notebooks"]]) == (0, ["done", "done"])
    assert (root / "00_first" / "results.json").stat().st_mtime_ns == written  # kept
    assert second["notebooks"][0] == first["notebooks"][0]
    address = second["notebooks"][1]["parameters"]["base_url"]
    assert address == first["notebooks"][1]["parameters"]["base_url"]  # measured levels name the server
    assert (root / "01_second" / "load" / "kept").exists()
    with pytest.raises(UserError, match="cannot be reached"):  # it was stopped
        run.reachable(address)
    live_run(live_folder, "--notebooks", "01", **tools)  # that run was over: this one starts anew
    assert not (root / "01_second" / "load").exists()
    assert len(list((root / "01_second").glob("load.until-*/kept"))) == 1
    assert len(list(root.glob("engine.until-*.log"))) == 2


STARTS = """import shlex, subprocess, time, urllib.request
from kit import notebook
from kit.engines.launch import free_port
run = notebook.begin("02_third", gpu=gpu, model=model, source=source, output_dir=output_dir)
def start(engine_command=engine_command):
    port = free_port()
    return subprocess.Popen(shlex.split(engine_command.format(port=port, flags="--max-num-seqs 7"))), port
one, port = start()
while one.poll() is None:
    try:
        status = urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").status
        break
    except OSError:
        time.sleep(0.05)
one.kill()
run.finish({"command": engine_command}, [f"{source} {status}"])"""


def test_a_notebook_may_start_the_engine_itself(live_folder, monkeypatch, capsys):
    (live_folder / "go").touch()
    parameters = LIVE + '\nengine_command: str = ""  # live only'
    write_notebook(live_folder / "notebooks", "02_third", STARTS, parameters=parameters)
    code, told, _ = live_run(live_folder, monkeypatch=monkeypatch, capsys=capsys)
    first, _, third = told["notebooks"]
    assert (code, third["decision"]) == (0, ["live 200"])
    command = third["parameters"]["engine_command"]
    assert command.endswith(" {flags}") or "{flags} " in command
    assert "{port}" in command
    assert "--max-num-seqs" not in command  # that is what the notebook tries
    assert "--max-model-len" in command
    with pytest.raises(UserError, match="cannot be reached"):  # the engine of the others was stopped before
        run.reachable(first["parameters"]["base_url"])


def test_other_parameters_run_again(live_folder, monkeypatch, capsys):
    tools = {"monkeypatch": monkeypatch, "capsys": capsys}
    live_run(live_folder, **tools)
    _, second, _ = live_run(live_folder, "--set", "levels=9", **tools)
    assert second["notebooks"][0]["parameters"]["levels"] == 9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--live", "--engine", "vlm"], "unknown --engine 'vlm'"),
        (["--live", "--base-url", "http://127.0.0.1:9"], "give one of them"),
        (["--engine-command", "serve {flags}"], "--engine-command needs --live"),
        (["--live", "--engine", "sglang"], "make engine ENGINE=sglang"),
        (["--live", "--engine-command", "no-such-program {flags}"], "no program 'no-such-program'"),
        (["--live", "--engine-command", "serve {flag}"], "'serve {flag}'"),
    ],
)
def test_a_live_run_refuses_in_one_line(arguments, told, live_folder, monkeypatch, capsys):
    monkeypatch.setattr(live, "ENVIRONMENTS", live_folder / "none")
    with pytest.raises(SystemExit) as stop:
        kit(*arguments, "--out", str(live_folder / "runs"), monkeypatch=monkeypatch)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert told in err.splitlines()[-1]
    assert out == ""
