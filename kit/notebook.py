"""What every notebook opens and closes with: parameters checked, earlier results, a decision."""

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from kit import __version__, catalog
from kit.catalog.paths import DATA, load_yaml, write_json
from kit.errors import unknown

SOURCES = ("emulator", "live", "recorded")
PROVENANCE = ("measured", "modelled", "quoted")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One notebook's run: its checked parameters and where its results go."""

    notebook: str
    gpu: catalog.GpuSpec
    model: catalog.ModelSpec
    scenario: str
    source: str  # of its measurements: emulator, live or recorded
    output_dir: Path | None  # None: write no files

    def earlier(self, notebook: str) -> dict[str, Any] | None:
        """The results.json of an earlier notebook of this run, None where it has not run.

        Results of another model or scenario are left aside with a line that says so.
        """
        path = (self.output_dir or Path()).parent / notebook / "results.json"
        if self.output_dir is None or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, own in self._identity().items():
            if found.get(name) != own:
                _say(f"{notebook} ran with {name} {found.get(name)!r}, not {own!r}: left aside")
                return None
        return found

    def finish(self, results: Mapping[str, Any], decision: Sequence[str]) -> None:
        """Print the decision lines and, where there is an output_dir, write results.json."""
        _say("\n".join(decision))
        if self.output_dir is None:
            return
        record: dict[str, Any] = {"notebook": self.notebook, **self._identity(), "source": self.source}
        record |= {"created_utc": datetime.now(UTC).isoformat(timespec="seconds"), "kit_version": __version__}
        record |= {"decision": list(decision), "results": dict(results)}
        write_json(self.output_dir / "results.json", record, default=_plain, allow_nan=False)

    def _identity(self) -> dict[str, str]:
        return {"gpu": self.gpu.key, "model": self.model.key, "scenario": self.scenario}


def begin(
    notebook: str, *, gpu: str, model: str, scenario: str = "", source: str = "emulator", output_dir: str = ""
) -> Run:
    """Check the parameters, load the plot style, print the mode and the versions."""
    import matplotlib.style

    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    folder = Path(output_dir) if output_dir else None
    run = Run(notebook, catalog.gpu(gpu), catalog.model(model), scenario, source, folder)
    matplotlib.style.use(Path(__file__).with_name("kit.mplstyle"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "matplotlib"))
    _say(f"{run.model.key} on {run.gpu.key}, source {source}")
    _say(f"kit {__version__}, Python {platform.python_version()}, {packages}")
    return run


def chapters() -> list[dict[str, str]]:
    """The map: each notebook's question and decision, and whether this clone has it."""
    there = {path.stem for path in (DATA.parent / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    return [
        {**record, "status": "here" if record["notebook"] in there else "to come"}
        for record in load_yaml(DATA / "walkthrough.yaml")
    ]


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, with a line on stdout at the start and at 25, 50, 75 and 100 %."""
    total, told = len(items), 0
    _say(f"{label}: 0 of {total}")
    for done, item in enumerate(items, start=1):
        yield item
        if done * 4 // total > told:
            told = done * 4 // total
            _say(f"{label}: {done} of {total} ({told * 25} %)")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Rows as aligned plain text; `columns` maps keys to headings, by default every key as it is.

    A column `provenance` may hold measured, modelled or quoted and nothing else.

    >>> print(table([{"gpu": "l4-24gb", "sessions": 12, "provenance": "modelled"}]))
    gpu      sessions  provenance
    -------  --------  ----------
    l4-24gb        12  modelled
    """
    for row in rows:
        if row.get("provenance", PROVENANCE[0]) not in PROVENANCE:
            raise unknown("provenance", row["provenance"], PROVENANCE)
    lines = _texts(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    numeric = [all(_is_number(row.get(key)) for row in rows) for key in columns or rows[0]]
    forms = [f"{{:{'>' if right else '<'}{width}}}" for right, width in zip(numeric, widths, strict=True)]
    return "\n".join("  ".join(forms).format(*line).rstrip() for line in lines)


def prose_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> Any:
    """Rows as a Markdown table to end a cell with, for columns that hold sentences."""
    from IPython.display import Markdown

    heads, *cells = [[text.replace("|", "\\|") for text in line] for line in _texts(rows, columns)]
    lines = [heads, ["---"] * len(heads), *cells]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))  # type: ignore[no-untyped-call]


def check(answer: float | str | None, expected: float | str, *, tolerance: float = 0.02) -> str:
    """The verdict on an exercise's answer; numbers may be off by a fraction.

    >>> check(None, 12), check(12.1, 12), check(20, 12)
    ('not answered yet', 'right', 'not yet: 20 is off, try again')
    """
    if answer is None:
        return "not answered yet"
    right = answer == expected
    if not isinstance(answer, str) and not isinstance(expected, str):
        right = abs(answer - expected) <= tolerance * abs(expected)
    return "right" if right else f"not yet: {answer} is off, try again"


def _texts(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None) -> list[list[str]]:
    heads = columns or {key: key for key in rows[0]}
    return [list(heads.values()), *([_cell(row.get(key)) for key in heads] for row in rows)]


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    if not isinstance(value, Real):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, Integral) or abs(float(value)) >= 1000 else f"{value:.3g}"


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays as JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
