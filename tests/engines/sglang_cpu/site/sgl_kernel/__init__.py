"""Names that SGLang's CPU path imports from its kernel wheel, which PyPI has for CUDA only.

Serving a dense model with torch-native attention calls none of them; a call raises.
"""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not name.endswith("_cpu"):
        raise AttributeError(f"no {name} in this stand-in for sgl_kernel")

    def kernel(*args: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs SGLang's CPU kernel build")

    return kernel
