"""Files here that run in an engine's own environment are no tests."""

collect_ignore = ["sglang_cpu", "tiny_model.py"]
