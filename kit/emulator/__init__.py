"""The scheduler in real time behind an OpenAI-compatible server; its speed is the model's, never a GPU's."""

from kit.emulator.clock import Clock, Paced
from kit.emulator.hidden import hide
from kit.emulator.page import Page
from kit.emulator.server import Api, listen

__all__ = ["Api", "Clock", "Paced", "Page", "hide", "listen"]
