"""Monitoring files alone, for tests that need no whole bundle."""

from pathlib import Path

import jinja2
import pytest

from kit.catalog.paths import DATA


@pytest.fixture(scope="session")
def render_monitoring():
    """Writes the monitoring files into a folder, as a bundle holds them."""
    root = DATA.parent / "docker" / "templates" / "monitoring"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        variable_start_string="[[", variable_end_string="]]", block_start_string="[%", block_end_string="%]",
    )  # fmt: skip

    def write(folder: Path, given: dict) -> None:
        for path in sorted(root.rglob("*.j2")):
            name = path.relative_to(root)
            target = folder / name.with_suffix("")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(environment.get_template(name.as_posix()).render(watch=given), encoding="utf-8")

    return write
