"""Bundles of configuration rendered from a scenario, and the checks that prove them."""

from kit.deploy.bundle import ARCHITECTURES, render
from kit.deploy.values import Source

__all__ = ["ARCHITECTURES", "Source", "render"]
