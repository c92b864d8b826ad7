"""Render the reference bundles in docker/ from docker/templates: `python docker/render.py` (make bundles)."""

from pathlib import Path

from kit.catalog.paths import DATA, load_yaml
from kit.deploy import Source, render
from kit.scenario import load

DOCKER = Path(__file__).resolve().parent


def main(root: Path = DOCKER) -> None:
    """Every bundle that data/deploy.yaml lists, into a folder of its name."""
    for name, how in load_yaml(DATA / "deploy.yaml")["references"].items():
        render(Source(load(how["scenario"]), how["gpu"]), how["architecture"], root / name, how.get("target"))


if __name__ == "__main__":
    main()
