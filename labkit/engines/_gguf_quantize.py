"""llama.cpp's own quantizer, called through its library: every file type it has, as llama-quantize makes it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit import host
from labkit.engines import _ggml
from labkit.engines._gguf import tensors
from labkit.types import LabkitError


@dataclass(frozen=True)
class FileType:
    """One of llama.cpp's mixes: its number, the type of most tensors, the larger type of some, that of the output."""

    number: int  # enum llama_ftype
    most: str
    some: str
    output: str = "q6_k"
    needs_imatrix: bool = False


FILE_TYPES = {
    "f32": FileType(0, "f32", "f32", "f32"),
    "f16": FileType(1, "f16", "f16", "f16"),
    "bf16": FileType(32, "bf16", "bf16", "bf16"),
    "q8_0": FileType(7, "q8_0", "q8_0", "q8_0"),
    "q6_k": FileType(18, "q6_k", "q6_k"),
    "q5_k_m": FileType(17, "q5_k", "q6_k"),
    "q5_k_s": FileType(16, "q5_k", "q5_k"),
    "q5_1": FileType(9, "q5_1", "q5_1"),
    "q5_0": FileType(8, "q5_0", "q5_1"),
    "q4_k_m": FileType(15, "q4_k", "q6_k"),
    "q4_k_s": FileType(14, "q4_k", "q5_k"),
    "q4_1": FileType(3, "q4_1", "q4_1"),
    "q4_0": FileType(2, "q4_0", "q4_1"),
    "iq4_nl": FileType(25, "iq4_nl", "q5_k"),
    "iq4_xs": FileType(30, "iq4_xs", "q5_k"),
    "q3_k_l": FileType(13, "q3_k", "q5_k"),
    "q3_k_m": FileType(12, "q3_k", "q5_k"),
    "q3_k_s": FileType(11, "q3_k", "q3_k"),
    "iq3_m": FileType(27, "iq3_s", "q4_k"),
    "iq3_s": FileType(26, "iq3_s", "q4_k"),
    "iq3_xs": FileType(22, "iq3_xxs", "q4_k", needs_imatrix=True),
    "iq3_xxs": FileType(23, "iq2_s", "q4_k", "q5_k", needs_imatrix=True),
    "q2_k": FileType(10, "q2_k", "q4_k"),
    "q2_k_s": FileType(21, "q2_k", "q4_k", needs_imatrix=True),
    "iq2_m": FileType(29, "iq2_s", "q4_k", "q5_k", needs_imatrix=True),
    "iq2_s": FileType(28, "iq2_xs", "q4_k", "q5_k", needs_imatrix=True),
    "iq2_xs": FileType(20, "iq2_xs", "q4_k", "q5_k", needs_imatrix=True),
    "iq2_xxs": FileType(19, "iq2_xxs", "q4_k", "q5_k", needs_imatrix=True),
    "iq1_m": FileType(31, "iq1_m", "q4_k", "q5_k", needs_imatrix=True),
    "iq1_s": FileType(24, "iq1_s", "q4_k", "q5_k", needs_imatrix=True),
    "tq2_0": FileType(37, "tq2_0", "q4_k"),
    "tq1_0": FileType(36, "tq1_0", "q4_k"),
}

# Bits a weight of every block type: 8 * bytes / values of the block (ggml-common.h).
BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q5_1": 6.0, "q5_0": 5.5,
    "q4_k": 4.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.25, "q3_k": 3.4375, "iq3_s": 3.4375,
    "iq3_xxs": 3.0625, "q2_k": 2.625, "iq2_s": 2.5625, "iq2_xs": 2.3125, "iq2_xxs": 2.0625, "iq1_m": 1.75,
    "iq1_s": 1.5625, "tq2_0": 2.0625, "tq1_0": 1.6875,
}  # fmt: skip


def bounds(kind: FileType) -> tuple[float, float]:
    """Lowest and highest bits a weight of a file whose rows divide: all of `most`, or half `some` and 40 % output.

    The 40 % is a small model with a large tied vocabulary; 2 % more covers vectors kept in float32.
    """
    body = (BITS[kind.most] + max(BITS[kind.most], BITS[kind.some])) / 2
    return BITS[kind.most], round(1.02 * (0.6 * body + 0.4 * max(body, BITS[kind.output])), 3)


def quantize_gguf(
    src: str | Path,
    dst: str | Path,
    precision: str,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    tensor_types: Mapping[str, str] | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Quantize a float GGUF file to one of llama.cpp's file types ("q4_k_m", "iq2_xs", "tq2_0" ...).

    `tensor_types` maps a regular expression on tensor names to a block type; the first that matches wins.
    `pure` gives every matrix the same type. `imatrix`: from collect_imatrix; some types cannot do without.
    Returns {"weight_bytes", "types": {block type: tensors}, "fallbacks": [...], "notes": [...], "log": str}.
    Raises LabkitError, and leaves no file, when llama.cpp refuses.
    """
    options = dict(tensor_types=tensor_types, pure=pure, output_type=output_type, embedding_type=embedding_type)
    lines = _run(src, dst, precision, imatrix=imatrix, threads=threads, **options)
    table = tensors(dst)
    fell, notes = fallbacks(lines, table)
    missing = [name for name in re.findall(r"did not find weights for (\S+)", lines) if name != "token_embd.weight"]
    if imatrix and missing:
        notes.append(f"The importance matrix has nothing on {len(missing)} tensors (for one, {missing[0]}).")
    types = dict(Counter(tensor["type"] for tensor in table))
    size = sum(tensor["bytes"] for tensor in table)
    return {"weight_bytes": size, "types": types, "fallbacks": fell, "notes": notes, "log": lines}


def planned_types(outline: str | Path, precision: str, **options: Any) -> tuple[dict[str, str], str]:
    """The block type llama.cpp would give every tensor it converts, and its log; nothing is read or written.

    `outline`: a GGUF with the float model's metadata and tensor table; its data may be a hole. Options as above.
    """
    log = _run(outline, outline, precision, dry_run=True, **options)
    # "[ 3/57] NAME - [ 256, 512, 1, 1], type = bf16, size = 1.00 MiB -> 0.28 MiB (q4_K)"
    found = re.findall(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = .*-> .*\((\w+)\)$", log, re.MULTILINE)
    return {name: kind.lower() for name, kind in found}, log


def _run(
    src: str | Path,
    dst: str | Path,
    precision: str,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    tensor_types: Mapping[str, str] | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
) -> str:
    """Call llama_model_quantize; returns its log."""
    kind = FILE_TYPES.get(precision)
    if kind is None:
        raise LabkitError(f"llama.cpp has no precision {precision!r}; expected one of {', '.join(FILE_TYPES)}.")
    if kind.needs_imatrix and not imatrix:
        raise LabkitError(f"{precision} needs an importance matrix; give one from collect_imatrix as imatrix=.")
    llama = _ggml.library()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure, params.dry_run = kind.number, threads or host.cpus(), pure, dry_run
    params.max_buf_size = 64_000_000  # rows kept in memory at once
    for field, value in (("output_tensor_type", output_type), ("token_embedding_type", embedding_type)):
        if value is not None:
            setattr(params, field, _type(value))
    keep = [_set_overrides(llama, params, tensor_types or {}), _set_imatrix(llama, params, imatrix or {})]
    with _ggml.logged() as lines:
        failed = llama.llama_model_quantize(str(src).encode(), str(dst).encode(), ctypes.byref(params))
    del keep
    if failed:
        free = host.free_disk(Path(dst).parent)
        Path(dst).unlink(missing_ok=True)
        if free < 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dst))
        raise LabkitError(f"llama.cpp could not quantize {src} to {precision}: {_ggml.reason(lines)}")
    return "".join(lines)


def _type(name: str) -> int:
    if name not in _ggml.TYPES:
        raise LabkitError(f"llama.cpp has no block type {name!r}; expected one of {', '.join(_ggml.TYPES)}.")
    return _ggml.TYPES[name]


def _set_overrides(llama: Any, params: Any, tensor_types: Mapping[str, str]) -> Any:
    """Fill the C array of tensor overrides; what is returned must live until the call is over."""
    for pattern in tensor_types:
        try:
            re.compile(pattern)
        except re.error as error:  # std::regex would throw inside the library
            raise LabkitError(f"tensor_types: {pattern!r} is not a regular expression ({error}).") from None
    rows = (llama.llama_model_tensor_override * (len(tensor_types) + 1))()
    for row, (pattern, name) in zip(rows, tensor_types.items(), strict=False):  # the last row stays empty: the end
        row.pattern, row.type = pattern.encode(), _type(name)
    if tensor_types:
        params.tt_overrides = rows
    return rows


def _set_imatrix(llama: Any, params: Any, imatrix: Mapping[str, np.ndarray]) -> Any:
    values = [np.ascontiguousarray(v, dtype=np.float32) for v in imatrix.values()]
    rows = (llama.llama_model_imatrix_data * (len(values) + 1))()
    for row, name, value in zip(rows, imatrix, values, strict=False):
        row.name, row.size = name.encode(), value.size
        row.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if values:
        params.imatrix = rows
    return rows, values


def fallbacks(log: str, table: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Tensors whose rows did not divide, read from llama.cpp's log, and a sentence on them."""
    # "warning: NAME - ncols N not divisible by B (required for type T) -> falling back to F"
    found = re.findall(r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+\d+ \(required for type\s+(\S+?)\)", log)
    actual = {tensor["name"]: tensor["type"] for tensor in table}
    fell = [
        {"tensor": name, "columns": int(columns), "wanted": wanted.lower(), "got": actual[name]}
        for name, columns, wanted in found
    ]
    if not fell:
        return [], []
    first = fell[0]
    return fell, [
        f"{len(fell)} of {len(table)} tensors fell back to another type because their rows do not divide into "
        f"{first['wanted']} blocks (for one, {first['tensor']}: rows of {first['columns']}, stored as {first['got']})."
    ]
