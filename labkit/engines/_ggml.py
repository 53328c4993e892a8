"""The C functions of llama.cpp's own library that llama-cpp-python does not wrap, through ctypes.

Sources: ggml.h, ggml-quants.h and llama.h of the llama.cpp release inside llama-cpp-python. ctypes releases the
interpreter lock during a call, so slabs of a tensor can be converted by several Python threads at once.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from labkit.types import LabkitError, NotInstalled

# Numbers of `enum ggml_type`, by the names the library itself prints.
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12,
    "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21,
    "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29, "bf16": 30, "tq1_0": 34, "tq2_0": 35,
}  # fmt: skip

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
    "ggml_quantize_init": (None, [ctypes.c_int]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_cpu_fp32_to_fp16": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]),
    "ggml_get_name": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_get_data": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_op_desc": (ctypes.c_char_p, [ctypes.c_void_p]),
}


def library() -> Any:
    """The llama_cpp low-level module, its log silenced; one sentence when the package is absent or broken."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
        raise NotInstalled(
            f'llama.cpp cannot be used here ({error}). Try:  pip install "labkit[llamacpp]"  (it needs a C++ compiler)'
        ) from None
    if _log.installed is not llama_cpp:
        _log.install(llama_cpp)
    return llama_cpp


@cache
def symbol(name: str) -> Any:
    """A function of ggml with its argument types set."""
    llama = library()
    try:  # the loader looks through what libllama itself links to ...
        function = getattr(llama._lib, name)
    except AttributeError:  # ... except on Windows
        function = getattr(ctypes.CDLL(str(Path(llama._base_path) / "ggml-base.dll")), name)
    function.restype, function.argtypes = _SIGNATURES[name]
    return function


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` values stored as `kind`."""
    return symbol("ggml_row_size")(TYPES[kind], columns)


def block(kind: str) -> int:
    """Values in one block of `kind`: rows must be a multiple of it."""
    return symbol("ggml_blck_size")(TYPES[kind])


def quantize(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 rows (n, columns) as the bytes ggml stores for `kind`, (n, row_bytes) uint8.

    `importance`: weight of each column in the search, (columns,) float32; required by the IQ2 and IQ1 types.
    Source: ggml_quantize_chunk in ggml.c, the function llama-quantize calls.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    if columns % block(kind):
        raise LabkitError(f"Rows of {columns} values cannot be {kind}; expected a multiple of {block(kind)}.")
    if importance is None and symbol("ggml_quantize_requires_imatrix")(TYPES[kind]):
        raise LabkitError(f"{kind} needs an importance vector of {columns} values; see collect_imatrix.")
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if weights is not None and weights.shape != (columns,):
        raise LabkitError(f"The importance vector has shape {weights.shape}; expected ({columns},).")
    out = np.empty((count, row_bytes(kind, columns)), dtype=np.uint8)
    symbol("ggml_quantize_init")(TYPES[kind])
    pointer = None if weights is None else weights.ctypes.data
    symbol("ggml_quantize_chunk")(TYPES[kind], rows.ctypes.data, out.ctypes.data, 0, count, columns, pointer)
    return out


def half(rows: np.ndarray) -> np.ndarray:
    """float32 as float16, rounded to nearest, ties to even; what does not fit becomes infinite.

    ggml has the processor's instructions for it, thirty times as fast as numpy's cast, which does it bit by bit.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    try:
        convert = symbol("ggml_cpu_fp32_to_fp16")
    except AttributeError:  # a build whose CPU backend is loaded apart
        with np.errstate(over="ignore"):
            return rows.astype(np.float16)
    out = np.empty(rows.shape, dtype=np.float16)
    convert(rows.ctypes.data, out.ctypes.data, rows.size)
    return out


class _Log:
    """llama.cpp's log, kept instead of printed. The library has one log for the whole process."""

    def __init__(self) -> None:
        self.lines: list[str] | None = None
        self.installed: Any = None  # the module whose library has our callback
        self.lock = threading.RLock()

    def install(self, llama: Any) -> None:
        """Once: of two threads that each set a callback, the library could be left with the one that Python frees."""
        with self.lock:
            if self.installed is llama:
                return

            @llama.llama_log_callback
            def keep(level: int, text: bytes, _: Any) -> None:
                if self.lines is not None:
                    self.lines.append(text.decode("utf-8", "replace"))

            self._keep = keep  # the library holds the pointer: it must outlive every call
            llama.llama_log_set(keep, ctypes.c_void_p(0))
            self.installed = llama


_log = _Log()


def reason(lines: list[str]) -> str:
    """The last thing llama.cpp complained about, in one line."""
    text = [line.strip() for line in "".join(lines).splitlines() if line.strip()]
    errors = [line for line in text if "error" in line.lower() or "failed to quantize" in line]
    others = [line for line in text if re.search("fail|invalid|unknown|missing|unable", line, re.IGNORECASE)]
    return (errors[:1] or others[-1:] or text[-1:] or ["it gave no reason"])[0]


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what llama.cpp logs meanwhile; one collector at a time."""
    library()
    with _log.lock:
        outer, _log.lines = _log.lines, []
        try:
            yield _log.lines
        finally:
            if outer is not None:
                outer.extend(_log.lines)
            _log.lines = outer
