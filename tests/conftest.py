"""Every test runs without a GPU in sight, also on a host that has one."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
