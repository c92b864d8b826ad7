"""Sizing, load-testing, tuning, pricing and deploying LLM inference for AI agents."""

__version__ = "0.1.0"
