"""Files here that run in an engine's own environment are no tests."""

collect_ignore = ["taught_model.py"]
