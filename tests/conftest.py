"""Every test runs without a GPU in sight, also on a host that has one."""

import os

collect_ignore = ["agents/taught_model.py"]  # runs in an engine's own environment, and is no test

os.environ["CUDA_VISIBLE_DEVICES"] = ""
