"""A bundle as a drawing: who calls whom, and what stands in a private network."""

from collections.abc import Mapping
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BETWEEN = {"tiered": "LiteLLM\nby complexity", "sticky-least-loaded": "vllm-router\nfewest sessions"}
SHOWN = 3  # engines of a pool that are drawn
STYLE = {"boxstyle": "round,pad=0.5", "facecolor": "#e3e6ea", "edgecolor": "0.4"}


def draw(record: Mapping[str, Any]) -> Axes:
    """The containers of a bundle from left to right, as its bundle.json tells them."""
    pools, values = record["pools"], record["values"]
    middle = BETWEEN.get(record["architecture"]) or BETWEEN.get(values["edge"]["balance"])
    chain = ["agents", "NGINX\nkeys, limits, TLS", *([middle] if middle else [])]
    boxes = [(name, number) for name, one in values["pools"].items() for number in range(min(SHOWN, one["replicas"]))]
    _, axes = plt.subplots(figsize=(9, 0.9 + 0.75 * len(boxes)))
    centre, right = (len(boxes) - 1) / 2, len(chain) + 0.35
    for place, text in enumerate(chain):
        axes.text(place, centre, text, ha="center", va="center", bbox=STYLE)
    for place in range(len(chain) - 1):
        _arrow(axes, (place + 0.33, centre), (place + 0.62, centre))
    for row, (name, number) in enumerate(boxes):
        one, more = values["pools"][name], values["pools"][name]["replicas"] - SHOWN
        text = f"{name} {number}: {one['engine']}, {one['gpu_count']} x {one['gpu']}, weight {pools[name]['weight']}"
        text += f"  (+ {more} more)" if more > 0 and number == SHOWN - 1 else ""
        height = len(boxes) - 1 - row
        colour = "#ffe3b3" if name == "spot" else "#cfe6cf"
        axes.text(right, height, text, va="center", bbox=STYLE | {"facecolor": colour})
        _arrow(axes, (len(chain) - 1 + 0.36, centre), (right - 0.1, height))
    axes.axvline(0.42, color="0.6", linestyle=":")
    axes.text(0.46, len(boxes) - 0.35, "private network", color="0.4", va="bottom")
    axes.set(xlim=(-0.4, right + 2.4), ylim=(-0.7, len(boxes)))
    axes.axis("off")
    return axes


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.4"})
