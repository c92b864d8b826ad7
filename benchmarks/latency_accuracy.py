"""TTFT and TPOT against published runs that the fit did not see: the latency part of docs/accuracy.md.

    .venv/bin/python benchmarks/fit_steptime.py && .venv/bin/python benchmarks/latency_accuracy.py [--write]

The fit leaves its errors in runs/steptime_errors.npz; this reads them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fit_steptime import BASES, COVERAGE, ERAS, ERRORS, ROWS_PER_GROUP, cases
from serving_rows import Row

from kit import catalog

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- latency -->", "<!-- /latency -->")
MEANING = {
    "measured": "same model family and GPU measured; this TP size and weight format left out",
    "transfer": "family and GPU both measured, not together",
    "new_gpu": "family measured, GPU not",
    "new_family": "GPU measured, family not",
    "new": "neither",
}
KINDS = ("TPOT", "TTFT")


class Table:
    """Rows with their errors, by basis: TPOT first, then TTFT, in log space."""

    def __init__(self, rows: list[Row], errors: dict[str, np.ndarray]) -> None:
        self.rows, self.errors = rows, errors
        self.groups = np.array([" ".join(row.group) for row in rows])
        size = {group: (self.groups == group).sum() for group in set(self.groups)}
        self.weight = np.array([min(1.0, ROWS_PER_GROUP / size[group]) for group in self.groups])

    def mask(self, chosen: Callable[[Row], bool]) -> np.ndarray:
        """Rows that the function chooses."""
        return np.array([chosen(row) for row in self.rows])

    def factor(self, errors: np.ndarray, use: np.ndarray) -> float:
        """x/÷ factor that holds 90 % of the used rows, large groups weighted down."""
        use = use & np.isfinite(errors)
        order = np.argsort(np.abs(errors[use]))
        total = np.cumsum(self.weight[use][order])
        return float(np.exp(np.abs(errors[use][order][np.searchsorted(total, COVERAGE * total[-1])])))

    def coverage(self, errors: np.ndarray, use: np.ndarray) -> tuple[float, float] | None:
        """Share of rows inside intervals made from the other groups alone, by rows and by groups."""
        use = use & np.isfinite(errors)
        inside = np.full(len(errors), np.nan)
        for group in set(self.groups[use]):
            mine = use & (self.groups == group)
            others = use & ~mine
            if others.sum() < 10:
                return None
            inside[mine] = np.abs(errors[mine]) <= np.log(self.factor(errors, others))
        share = np.average(inside[use], weights=self.weight[use])
        return float(np.nanmean(inside[use])), float(share)


def by_basis(table: Table) -> list[str]:
    """Error, interval and its coverage, by how much data is near."""
    lines = ["| engine | data near the case | rows | TPOT error | interval x/÷ | covered | "
        "TTFT error | interval x/÷ | covered |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for engine in ERAS:
        mine = table.mask(lambda row, engine=engine: row.engine == engine)
        for basis in BASES:
            cells = []
            for kind in (0, 1):
                errors = table.errors[basis][kind]
                if (mine & np.isfinite(errors)).sum() < 10:
                    cells += ["-", "-", "-"]
                    continue
                covered = table.coverage(errors, mine)
                cells += [_median(errors[mine]), f"{table.factor(errors, mine):.2f}",
                          "-" if covered is None else f"{covered[0]:.0%}"]  # fmt: skip
            count = int((mine & np.isfinite(table.errors[basis][0])).sum())
            lines.append(f"| {engine} | {basis} | {count} | " + " | ".join(cells) + " |")
    return lines


def by(table: Table, title: str, key: Callable[[Row], str], least: int = 8) -> list[str]:
    """Errors of left-out family x GPU groups, by a property of the rows."""
    lines = [f"| {title} | rows | TPOT error | TPOT bias | TTFT error | TTFT bias |", "|---|---|---|---|---|---|"]
    keys = np.array([key(row) for row in table.rows])
    errors = table.errors["group"]
    for one in sorted(set(keys)):
        mine = keys == one
        if mine.sum() >= least:
            cells = [f"{_median(e[mine])} | {_bias(e[mine])}" for e in errors]
            lines.append(f"| {one} | {mine.sum()} | " + " | ".join(cells) + " |")
    return lines


def _median(errors: np.ndarray) -> str:
    errors = errors[np.isfinite(errors)]
    return f"{100 * np.median(np.abs(np.expm1(errors))):.1f} %" if len(errors) else "-"


def _bias(errors: np.ndarray) -> str:
    errors = errors[np.isfinite(errors)]
    return f"{100 * np.expm1(np.median(errors)):+.0f} %" if len(errors) else "-"


def _band(row: Row) -> str:
    count = row.concurrency or 0
    bands = ((0, "open loop"), (8, "1 to 8"), (32, "9 to 32"), (128, "33 to 128"))
    return f"{row.engine}, " + next((name for most, name in bands if count <= most), "above 128")


def _class(row: Row) -> str:
    model = catalog.model(row.model)
    kind = "mixture of experts" if model.moe else "dense"
    return f"{row.engine}, {kind}, {row.quantization}"


def section(table: Table) -> str:
    """The latency part of docs/accuracy.md."""
    parts = [
        [f"- {basis}: {text}" for basis, text in MEANING.items()],
        by_basis(table),
        ["Every engine x family x GPU group left out in turn:"],
        by(table, "engine, family, GPU", lambda row: " ".join(row.group), 5),
        by(table, "GPU", lambda row: row.gpu),
        by(table, "model class", _class),
        by(table, "requests at once", _band),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    """Prints the section; --write puts it between its marks."""
    rows = [case.row for case in cases()[0]]
    text = section(Table(rows, dict(np.load(ERRORS))))
    print(text)
    if "--write" in sys.argv:
        path = ROOT / "docs" / "accuracy.md"
        page = path.read_text(encoding="utf-8")
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
