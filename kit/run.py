"""The walkthrough: notebooks through papermill, strictly, into one folder with a report per GPU."""

import ast
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from kit import catalog, report
from kit.catalog.paths import load_yaml, write_json
from kit.errors import UserError, unknown

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DEFAULT_GPU = "h100-sxm-80gb"
Walk = tuple[list[dict[str, Any]], Path]  # the rows, and the index's path
Execute = Callable[[Path, Path, Mapping[str, Any]], dict[str, Any]]


def visible_gpu() -> str | None:
    """NVML's name of this host's first visible GPU, None where there is none.

    CUDA_VISIBLE_DEVICES="" hides them, as it does for engines.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
        if visible.isdigit():
            return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(int(visible))))
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(visible)))
    except pynvml.NVMLError:
        return None


def choose_gpu(asked: str | None, found: str | None) -> str:
    """The GPU key to run for: the one asked for, which must be the one found on a GPU host."""
    key = catalog.gpu(asked).key if asked else None
    if found is None:
        return key or DEFAULT_GPU
    keys = [k for k in catalog.gpu_keys() if re.match("|".join(catalog.gpu(k).nvml_names), found, re.IGNORECASE)]
    if (key in keys) if key else len(keys) == 1:
        return key or keys[0]
    told = f"this host has {found!r} ({' or '.join(keys) or 'no key'} in data/gpus.yaml)"
    raise UserError(f'--gpu {asked or "(not given)"}: {told}; CUDA_VISIBLE_DEVICES="" hides it')


def reachable(base_url: str) -> str:
    """The server's address without /v1, once it has answered at all."""
    root = base_url.rstrip("/").removesuffix("/v1")
    try:
        urllib.request.urlopen(root + "/v1/models", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer: it may want a key
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"--base-url {base_url}: cannot be reached ({reason})") from None
    return root


def select(wanted: Sequence[str], folder: Path | None = None) -> list[Path]:
    """The notebooks in order, all of them or those named by number or name."""
    paths = sorted((folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise UserError(f"no notebooks in {folder or NOTEBOOKS}; kit run works from a clone of the project")
    if wrong := set(wanted) - {name for path in paths for name in (path.stem, path.stem[:2])}:
        raise unknown("notebook", min(wrong), [path.stem for path in paths])
    return [path for path in paths if not wanted or {path.stem, path.stem[:2]} & set(wanted)]


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and defaults of the cell tagged `parameters`, as papermill reads and injects them."""
    import papermill

    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}


def preset(gpu: str, folder: Path | None = None) -> dict[str, Any]:
    """The parameters that notebooks/parameters gives this GPU; each must be some notebook's."""
    path = (folder or NOTEBOOKS) / "parameters" / f"{gpu}.yaml"
    values = {**(load_yaml(path) if path.exists() else {}), "gpu": gpu}
    names = {name for notebook in select((), folder) for name in parameters_of(notebook)}
    if wrong := values.keys() - names:
        raise UserError(f"{path}: {unknown('parameter', min(wrong), names)}")
    return values


def fill(notebooks: Sequence[Path], given: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Parameters by notebook from the preset and the text of --set; an unknown name is refused."""
    known, values = {path.stem: parameters_of(path) for path in notebooks}, {**given, **asked}
    names = {name for defaults in known.values() for name in defaults}
    if wrong := asked.keys() - names:
        raise unknown("parameter", min(wrong), names, shown=len(names))
    return {
        notebook: {name: _typed(name, values[name], default) for name, default in defaults.items() if name in values}
        for notebook, defaults in known.items()
    }


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value, or what its text says, as its default's type; a whole number serves as a float, nothing else does."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if kind is float and type(value) is int:
        return float(value)
    if default is not None and type(value) is not kind:
        raise UserError(f"parameter {name} is {kind.__name__}, like {default!r}; got {value!r}")
    return value


def execute(notebook: Path, folder: Path, parameters: Mapping[str, Any], note: str | None = None) -> dict[str, Any]:
    """Run one notebook into its folder; a failing one leaves there what it got to.

    Returns notebook, title, status, duration_s, error, model, decision, parameters, note and paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    if results.exists():  # kept, but not mistaken for this run's
        results.replace(folder / "results.previous.json")
    parameters = {**parameters, "output_dir": str(folder)}
    begun = time.monotonic()
    error = _papermill(notebook, folder / "notebook.ipynb", parameters)
    written = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    if note and written:  # its readers must not take a CPU's seconds for that GPU's
        write_json(results, {**written, "note": note})
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
    title = "".join(first).splitlines()[0].lstrip("# ")
    seconds = round(time.monotonic() - begun, 1)
    row: dict[str, Any] = {"notebook": notebook.stem, "title": title, "parameters": parameters, "note": note}
    row |= {"status": "failed" if error else "done", "error": error, "duration_s": seconds}
    row |= {"model": written.get("model"), "decision": written.get("decision", [])}
    row |= {"report": str(folder / "report.html"), "results": str(results) if written else None}
    report.write_page(folder, row)
    return row


def _papermill(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> str | None:
    """Execute and store; the cell and the last line of the error that stopped it, None without."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    options["config"] = Config(KernelManager={"transport_encryption": "auto"})
    try:
        papermill.execute_notebook(notebook, output, parameters, **options)
    except papermill.PapermillExecutionError as failure:
        last = (failure.evalue.strip().splitlines() or [""])[-1]
        return f"cell In [{failure.exec_count}]: {failure.ename}: {last}"
    except (DeadKernelError, CellTimeoutError) as failure:
        return f"{type(failure).__name__}: {failure}"
    return None


def walkthrough(
    notebooks: Sequence[Path], root: Path, given: Mapping[str, Any], asked: Mapping[str, str], *, one: Execute = execute
) -> Walk:
    """Run the notebooks one after the other into root; returns their rows and the index's path.

    A user's mistake that only a notebook finds (an unknown model, say) ends the run as UserError.
    """
    filled = fill(notebooks, given, asked)
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(notebooks, start=1):
        sys.stderr.write(f"[{number}/{len(notebooks)}] {path.stem} ... ")
        sys.stderr.flush()
        row = one(path, root / path.stem, filled[path.stem])
        rows.append(row)
        index = report.write_index(root, row)
        sys.stderr.write(f"{row['status']}, {row['duration_s']} s\n")
        if ": UserError: " in (row["error"] or ""):
            raise UserError(f"{path.stem}, {row['error'].replace('UserError: ', '')}")
    return rows, index
