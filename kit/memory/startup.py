"""How long until a replica is ready: weights by storage speed, then compile and warm-up."""

from dataclasses import dataclass

from kit.catalog.paths import DATA, load_yaml
from kit.errors import unknown


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds to ready, modelled from quoted storage speeds and phase lengths."""

    storage: str
    weights_s: float
    phases_s: dict[str, tuple[float, float]]  # low and high of each phase

    def total_s(self, *, warm_host: bool = False) -> tuple[float, float]:
        """Low and high of the whole, seconds; a warm host has its machine and image already."""
        skipped = ("provisioning", "image_pull") if warm_host else ()
        spans = [span for name, span in self.phases_s.items() if name not in skipped]
        return (self.weights_s + sum(low for low, _ in spans), self.weights_s + sum(high for _, high in spans))


def storages() -> list[str]:
    """Names of data/startup.yaml's storage speeds."""
    return list(load_yaml(DATA / "startup.yaml")["storage"])


def start_up(weights_bytes: float, storage: str) -> StartUp:
    """Start-up of a replica whose weights, all ranks together, come from that storage.

    >>> start_up(26e9, "gp3-125").weights_s, start_up(26e9, "gp3-500").weights_s
    (208.0, 52.0)
    """
    data = load_yaml(DATA / "startup.yaml")
    if storage not in data["storage"]:
        raise unknown("storage", storage, data["storage"])
    phases = {name: tuple(phase["seconds"]) for name, phase in data["phases"].items()}
    return StartUp(storage, weights_bytes / data["storage"][storage]["bytes_per_s"], phases)
