"""A walkthrough's pages: a report per notebook and an index, without an address outside them."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kit import __version__

TEMPLATES = Path(__file__).with_name("templates")
REMOVED = ["remove-cell", "exercise", "papermill-error-cell-tag"]  # tags of cells not in reports


def write_page(folder: Path, row: Mapping[str, Any]) -> None:
    """report.html beside the notebook that ran; `row` says how it went."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    from traitlets.config import Config

    tags = Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": REMOVED}})
    exporter = HTMLExporter(config=tags, extra_template_basedirs=[str(TEMPLATES)], template_name="report")
    css = (TEMPLATES / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
    page = {**row, "css": css, "gpu": folder.parent.name}
    html, _ = exporter.from_filename(str(folder / "notebook.ipynb"), resources={"report": page})
    (folder / "report.html").write_text(html, encoding="utf-8")


def write_index(root: Path, row: Mapping[str, Any]) -> Path:
    """index.html over every notebook that ran in this folder, the newest row replacing its last."""
    import jinja2

    path = root / "index.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows[row["notebook"]] = row
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    about = {"gpu": root.name, "version": __version__, "css": (TEMPLATES / "style.css").read_text()}
    about["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    html = environment.get_template("index.html.j2").render(about, rows=[rows[name] for name in sorted(rows)])
    (root / "index.html").write_text(html, encoding="utf-8")
    return root / "index.html"
