"""A walkthrough's reports: a page per notebook and an index, from the folder's files alone."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kit import __version__

TEMPLATES = Path(__file__).with_name("templates")


def describe(folder: Path) -> dict[str, Any]:
    """What a notebook's folder says of its run: status, time, error, decision, parameters."""
    book = json.loads((folder / "notebook.ipynb").read_text(encoding="utf-8"))
    ran = book["metadata"]["papermill"]
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failed = ran["exception"] or ran["end_time"] is None
    return {
        "notebook": folder.name,
        "title": _title(book, folder.name),
        "status": "failed" if failed else "done",
        "duration_s": ran["duration"],
        "error": (_error(book) or ran.get("stopped") or "cut off") if failed else None,
        "model": results.get("model"),
        "decision": results.get("decision", []),
        "parameters": ran["parameters"],
        "report": str(folder / "report.html"),
        "results": str(path) if results else None,
    }


def mark_stopped(folder: Path, reason: str) -> None:
    """Note in the stored notebook what ended it without an error output, such as a dead kernel."""
    path = folder / "notebook.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    book["metadata"]["papermill"] |= {"exception": True, "stopped": reason}
    path.write_text(json.dumps(book, indent=1), encoding="utf-8")


def _title(book: Mapping[str, Any], otherwise: str) -> str:
    text = "\n".join("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "markdown")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return heading[1] if heading else otherwise


def _error(book: Mapping[str, Any]) -> str | None:
    for cell in book["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                last = (output["evalue"].strip().splitlines() or [""])[-1]
                return f"cell In [{cell['execution_count']}]: {output['ename']}: {last}"
    return None


def write(folder: Path) -> None:
    """report.html of a notebook's folder: one page, no script, no address outside it."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    from traitlets.config import Config

    tags = ["remove-cell", "exercise", "papermill-error-cell-tag"]
    remover = {"enabled": True, "remove_cell_tags": tags}
    exporter = HTMLExporter(
        config=Config({"TagRemovePreprocessor": remover}),
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="report",
    )
    css = (TEMPLATES / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
    page = {**describe(folder), "css": css, "gpu": folder.parent.name}
    html, _ = exporter.from_filename(str(folder / "notebook.ipynb"), resources={"report": page})
    (folder / "report.html").write_text(html, encoding="utf-8")


def write_index(root: Path) -> Path:
    """index.html over every notebook that ran in this folder, from its files alone."""
    import jinja2

    folders = sorted(path.parent for path in root.glob("*/notebook.ipynb"))
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True).get_template("index.html.j2")
    html = page.render(
        gpu=root.name,
        rows=[describe(folder) for folder in folders],
        css=(TEMPLATES / "style.css").read_text(),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    (root / "index.html").write_text(html, encoding="utf-8")
    return root / "index.html"
