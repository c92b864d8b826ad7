"""Runs a SGLang module on a CPU: `launch.py MODULE ARGS...`, with site/ beside this file on PYTHONPATH.

The only torchvision that the package index has for this torch is a CUDA build. Its extension does not load beside a
CPU torch, and torchvision then stops at two operators that nobody declared; declared here, they are
never called by text serving. Worker processes import this file anew, so they find them too.

This is no install that SGLang supports: kernels are its torch-native fallbacks. It shows what the
server does (scheduling, radix cache, streaming, metrics), never how fast it is.
"""

import runpy
import sys

from torch.library import Library

OPERATORS = Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__")
