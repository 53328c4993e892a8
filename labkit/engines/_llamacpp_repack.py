"""Rearranged weights on processors with Intel's AMX, without the AMX code that stops the process.

llama.cpp's CPU backend offers two buffer types for weights: CPU_REPACK, whose rows are interleaved for vector
instructions, and AMX, whose tiles the release inside llama-cpp-python 0.3.36 configures wrongly: the compiler drops most
of the configuration, and the next tile instruction is illegal (https://github.com/ggml-org/llama.cpp/pull/26954). Where
both are compiled in, AMX is taken first. Naming the buffer type of each tensor takes the other one. Whether that holds
is tried in a process of its own first, once for a machine and a version: a wrong guess would end this one.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit import host
from labkit._files import read_json, write_json
from labkit.engines import _ggml
from labkit.types import LabkitError

# Types with interleaved rows on x86, and the instructions they ask for (ggml_repack_get_optimal_repack_type in ggml's
# repack.cpp). Rows are taken eight at a time.
REPACKED = {"q4_0": "AVX2", "iq4_nl": "AVX2", "q4_k": "AVX2", "q2_k": "AVX512"}
ROWS = 8
WITHOUT_AMX = "tensor by tensor: this build's AMX code would stop the process"
OFF = "off: this build's AMX code would stop the process"
TRIAL, SECONDS = "LABKIT_REPACK_TRIAL", 120  # set in the process that tries; how long it may take
LOOKED_UP = re.compile(r"token_embd|position_embd")  # rows of these are also read one by one, which needs them as they are


class Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override of llama.h."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def broken_amx() -> bool:
    """Whether this build would use AMX for rearranged weights, which kills the process."""
    return bool(os.environ.get(TRIAL)) or b"AMX_INT8 = 1" in _ggml.library().llama_print_system_info()


def way(path: Path, tensors: Sequence[Mapping[str, Any]]) -> tuple[bool | str, Any]:
    """How a file's weights are rearranged, as its settings say it, and the overrides that does it, if any."""
    if not any(tensor["type"] in REPACKED for tensor in tensors):
        return False, None
    if not broken_amx():
        return True, None
    chosen = overrides(tensors) if holds(path) else None
    return (WITHOUT_AMX if chosen else OFF), chosen


def holds(path: Path) -> bool:
    """Whether a process that opens this file tensor by tensor and reads a prompt lives; remembered in labkit's home."""
    if os.environ.get(TRIAL):
        return True
    key = f"llama-cpp-python {host.versions().get('llama-cpp-python')}, {host.cpu_model()}"
    notes = host.home() / "repack.json"
    try:
        known = read_json(notes, "Record") if notes.exists() else {}
    except LabkitError:  # damaged: try again
        known = {}
    if key not in known:
        known[key] = _tried(path)
        write_json(notes, known)
    return known[key]


def _tried(path: Path) -> bool:
    code = "import sys; from labkit.engines._llamacpp_repack import trial; trial(sys.argv[1])"
    package = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], env={**os.environ, TRIAL: "1", "PYTHONPATH": package},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def trial(path: str) -> None:
    """What the trying process does: a prompt of several tokens, which multiplies matrices, and one token more."""
    from labkit.engines._llamacpp_runner import LlamaRunner

    with LlamaRunner(path, exact=False, threads=1, repack=True) as runner:
        list(runner.generate([1, 2, 3, 4, 5, 6, 7, 8], 2))


def overrides(tensors: Iterable[Mapping[str, Any]]) -> Any:
    """Each tensor that can be rearranged, with the buffer type that does it, as llama.h wants it; None when there is none.

    `tensors`: as `_gguf.tensors` gives them, shapes with rows first.
    """
    buffer_type = _buffer_type()
    if buffer_type is None:
        return None
    chosen = [tensor["name"] for tensor in tensors if _fits(tensor)]
    rows = [Override(f"^{re.escape(name)}$".encode(), buffer_type) for name in chosen]
    return (Override * (len(rows) + 1))(*rows, Override(None, None)) if rows else None


def _fits(tensor: Mapping[str, Any]) -> bool:
    kind, shape = tensor["type"], tensor["shape"]
    if kind not in REPACKED or len(shape) != 2 or shape[0] % ROWS or LOOKED_UP.search(tensor["name"]):
        return False
    return f"{REPACKED[kind]} = 1".encode() in _ggml.library().llama_print_system_info()


def _buffer_type() -> int | None:
    """The address of the buffer type CPU_REPACK, by the way ggml-backend.h gives to a backend's extra buffer types."""
    backend, base = _libraries()
    pointer = ctypes.c_void_p

    def call(library: ctypes.CDLL, name: str, result: Any, *given: Any) -> Any:
        function = getattr(library, name)
        function.restype, function.argtypes = result, [kind for kind, _ in given]
        return function(*[value for _, value in given])

    registry = call(backend, "ggml_backend_cpu_reg", pointer)
    device = call(base, "ggml_backend_reg_dev_get", pointer, (pointer, registry), (ctypes.c_size_t, 0))
    name = b"ggml_backend_dev_get_extra_bufts"
    address = call(base, "ggml_backend_reg_get_proc_address", pointer, (pointer, registry), (ctypes.c_char_p, name))
    if not address:
        return None
    found = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
    index = 0
    while found and found[index]:
        if call(base, "ggml_backend_buft_name", ctypes.c_char_p, (pointer, found[index])) == b"CPU_REPACK":
            return found[index]
        index += 1
    return None


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The CPU backend and ggml itself; what libllama is linked to can be reached through it, except on Windows."""
    llama = _ggml.library()
    folder = Path(llama._base_path)
    if (folder / "ggml-cpu.dll").exists():
        return ctypes.CDLL(str(folder / "ggml-cpu.dll")), ctypes.CDLL(str(folder / "ggml-base.dll"))
    return llama._lib, llama._lib
