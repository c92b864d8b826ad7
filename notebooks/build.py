"""Build notebooks/NN_name.ipynb and solutions/NN_name.ipynb from notebooks/src/NN_name.py.

The source is what people edit: jupytext py:percent, exercises with their solutions. In the
learner's copy a cell tagged `solution` vanishes and the text after a line `# solution` becomes a
blank. Both copies are executed with their defaults and stored with outputs.

    python notebooks/build.py [NAME ..]    build all, or those named by number or name
    python notebooks/build.py --check      say whether the stored notebooks are in step with src

The README's table of notebooks comes from their headers, here too.
"""

import argparse
import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent
SOURCES = NOTEBOOKS / "src"
SOLUTIONS = NOTEBOOKS / "solutions"
BLANK = "# Write your code here"
README, BEGIN, END = NOTEBOOKS.parent / "README.md", "<!-- notebooks -->\n", "<!-- /notebooks -->"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def compose(source: Path, *, solutions: bool) -> nbformat.NotebookNode:
    """The notebook of one source without outputs; ids depend on the text alone."""
    book = jupytext.read(source, fmt="py:percent")
    book.metadata = nbformat.from_dict(METADATA)
    cells = [c for c in book.cells if solutions or "solution" not in c.metadata.get("tags", [])]
    seen: dict[str, int] = {}
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code" and not solutions:
            cell.source = re.sub(r"(?ms)^# solution\b.*", BLANK, cell.source)
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    book.cells = cells
    book.nbformat, book.nbformat_minor = 4, 5
    return book


def execute(book: nbformat.NotebookNode) -> None:
    """Run in the environment's kernel from an empty folder, so that no relative path can matter."""
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            book,
            kernel_name="python3",
            timeout=300,
            record_timing=False,
            config=Config(KernelManager={"transport_encryption": "auto"}),
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    book.metadata = nbformat.from_dict(METADATA)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Neighbouring pieces of one stream as one output: how it was chopped up is chance."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def differences(source: Path) -> Iterator[str]:
    """What is out of step between a source and its two stored notebooks, one line each."""
    for folder, solutions in ((NOTEBOOKS, False), (SOLUTIONS, True)):
        path = folder / f"{source.stem}.ipynb"
        if not path.exists():
            yield f"{path.name} is missing in {folder.name}/"
            continue
        expected, stored = compose(source, solutions=solutions), nbformat.read(path, as_version=4)
        if [_identity(c) for c in expected.cells] != [_identity(c) for c in stored.cells]:
            yield f"{folder.name}/{path.name} is not what {source.name} says: make notebooks"


def _identity(cell: nbformat.NotebookNode) -> tuple[str, str, str, tuple[str, ...]]:
    return cell.id, cell.cell_type, cell.source, tuple(cell.metadata.get("tags", []))


def build(source: Path) -> None:
    """Compose, execute and store the learner's copy and the solutions."""
    for folder, solutions in ((NOTEBOOKS, False), (SOLUTIONS, True)):
        begun = time.monotonic()
        book = compose(source, solutions=solutions)
        execute(book)
        folder.mkdir(exist_ok=True)
        path = folder / f"{source.stem}.ipynb"
        nbformat.write(book, path)
        print(f"{path.relative_to(NOTEBOOKS.parent)}: {time.monotonic() - begun:.1f} s")


def main() -> int:
    """Command line; 1 where --check finds a notebook out of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="numbers or names, default all")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    sources = sorted(SOURCES.glob("[0-9][0-9]_*.py"))
    if unknown := [n for n in options.names if not any(_named(s, n) for s in sources)]:
        parser.error(f"no source {', '.join(unknown)}; there are {', '.join(s.stem for s in sources)}")
    chosen = [s for s in sources if not options.names or any(_named(s, n) for n in options.names)]
    if options.check:
        lines = [line for source in chosen for line in differences(source)]
        if README.read_text(encoding="utf-8") != readme():
            lines.append("README.md: its table is not what the notebooks' headers say: make notebooks")
        print("\n".join(lines) or f"{len(chosen)} notebooks in step with src/")
        return int(bool(lines))
    for source in chosen:
        build(source)
    README.write_text(readme(), encoding="utf-8")
    return 0


def readme() -> str:
    """README.md with the table of notebooks as the sources' headers say it."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    rows = ["| notebook | question | decision in `results.json` |", "|---|---|---|"]
    for source in sorted(SOURCES.glob("[0-9][0-9]_*.py")):
        first, glance = (cell.source for cell in jupytext.read(source, fmt="py:percent").cells[:2])
        title, question = first.removeprefix("# ").split("\n\n")
        output = re.search(r"- Output: (.+?)\n- ", glance, re.DOTALL)
        written = re.sub(r"\s+", " ", output[1]).removeprefix("`results.json` with ").rstrip(".") if output else ""
        rows.append(f"| [{title}](notebooks/{source.stem}.ipynb) | {question} | {written} |")
    return before + BEGIN + "\n".join(rows) + "\n" + END + rest.partition(END)[2]


def _named(source: Path, name: str) -> bool:
    return name in (source.stem, source.stem[:2])


if __name__ == "__main__":
    sys.exit(main())
