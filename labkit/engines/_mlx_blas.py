"""A fast BLAS under MLX on Linux: importing this, before MLX, gives its float32 products to the system's OpenBLAS where there is one.

The Linux wheel of MLX carries the reference BLAS, plain loops without SIMD. Its symbols are resolved when libmlx is loaded, and a
library loaded globally before that comes first. Debian and Ubuntu: apt-get install libopenblas0-pthread. Results differ in the last
bits only; without it everything works, slower.
"""

from __future__ import annotations

import ctypes
import sys

LIBRARY = "libopenblas.so.0"


def _preload() -> str:
    """The name of the BLAS MLX will use on a CPU: openblas, or the one it came with."""
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return "bundled"
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "bundled"
    return "openblas"


BLAS = _preload()
