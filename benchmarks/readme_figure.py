"""Draws the README's figure: `python benchmarks/readme_figure.py` renews docs/figures/memory.png."""

from pathlib import Path

from matplotlib import pyplot as plt

from kit import catalog, plots, scenario

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("rtx-5090-32gb", "l40s-48gb", "h100-pcie-80gb", "h100-sxm-80gb", "h200-sxm-141gb", "b200-sxm-180gb")


def main() -> None:
    """Where the memory of six cards goes for the customer service agent."""
    plt.style.use(ROOT / "kit" / "kit.mplstyle")
    case = scenario.load("customer-service")
    model = catalog.model(case.model)
    held = [scenario.hold(model, catalog.gpu(key), case.config(model), case.demand()) for key in CARDS]
    plots.memory_by_gpu(held)
    plt.savefig(ROOT / "docs" / "figures" / "memory.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
