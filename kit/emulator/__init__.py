"""The scheduler in real time behind an OpenAI-compatible server; its speed is the model's, never a GPU's."""

from kit.emulator.hidden import Truth, hide, truth
from kit.emulator.server import Api, listen

__all__ = ["Api", "Truth", "hide", "listen", "truth"]
