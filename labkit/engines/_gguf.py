"""GGUF files: written from a checkpoint in one streaming pass, and read back as a table of tensors.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): header, key-value metadata, tensor table, then
each tensor's bytes on a multiple of 32. Only a slab of a few rows is ever in memory as float32.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from labkit import host
from labkit._files import need_space
from labkit._tensors import bits_are_finite
from labkit.engines import _ggml, _gguf_table
from labkit.engines._gguf_model import Stored, add_metadata, architecture, stored_tensors
from labkit.engines._gguf_tokenizer import add_tokenizer
from labkit.types import LabkitError

DIRECT = ("f32", "f16", "bf16", "q8_0")  # one type for every matrix: no mix to plan
ALIGNMENT = 32
SLAB = 2_000_000  # values converted at a time by one thread: 8 MB as float32


def write_gguf(
    checkpoint: Any,
    path: str | Path,
    dtype: str = "f16",
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    threads: int | None = None,
    **mix: Any,
) -> dict[str, Any]:
    """Write `checkpoint` as one GGUF file, straight from its safetensors.

    `dtype`: "f32", "f16", "bf16" or "q8_0" for all matrices (vectors stay float32), or any of llama.cpp's file types
    ("q4_k_m" ...), for which llama.cpp itself plans the mix; `mix` and `imatrix` are then those of quantize_gguf.
    Returns {"weight_bytes": bytes of all tensors, "types": {type: tensors}, "fallbacks": [...], "notes": [...], "log"}.
    Raises LabkitError for an unknown architecture or tokenizer, NaN weights or a full disk; no file is then left.
    """
    from labkit.engines._gguf_quantize import FILE_TYPES, fallbacks, planned_types

    path = Path(path)
    if dtype not in FILE_TYPES:
        raise LabkitError(f"write_gguf does not know {dtype!r}; expected one of {', '.join(FILE_TYPES)}.")
    plan, log = list(stored_tensors(checkpoint)), ""
    try:
        if dtype in DIRECT and not any(mix.values()):
            kinds = [_kind(tensor, dtype) for tensor in plan]
        else:
            base = [_kind(tensor, own_type(checkpoint)) for tensor in plan]
            _outline(checkpoint, path, 0, plan, base, tokenizer=False)  # the mix does not depend on it
            chosen, log = planned_types(path, dtype, imatrix=imatrix, **mix)
            kinds = [chosen.get(tensor.name, kind) for tensor, kind in zip(plan, base, strict=True)]
        need_space(path.parent, sum(map(_bytes, plan, kinds)), f"Writing {path.name}")
        notes, offsets = _outline(checkpoint, path, FILE_TYPES[dtype].number, plan, kinds)
        with open(path, "r+b") as file:
            _write_data(file, plan, kinds, offsets, imatrix or {}, threads or host.cpus())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    fell, more = fallbacks(log, tensors(path))
    short = [t.name for t, kind in zip(plan, kinds, strict=True) if len(t.shape) > 1 and not log and kind != dtype]
    if short:
        more.append(f"{len(short)} tensors have rows that {dtype} blocks do not divide; they are f16 ({short[0]}).")
    sizes = sum(map(_bytes, plan, kinds))
    return {"weight_bytes": sizes, "types": dict(Counter(kinds)), "fallbacks": fell, "notes": notes + more, "log": log}


def own_type(checkpoint: Any) -> str:
    """The float type most weights of the checkpoint are stored in."""
    weights: Counter[str] = Counter()
    for view in checkpoint.tensors().values():
        weights[view.dtype] += view.weights
    return weights.most_common(1)[0][0].lower()


def _kind(tensor: Stored, dtype: str) -> str:
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if tensor.shape[-1] % _ggml.block(dtype) else dtype


def _bytes(tensor: Stored, kind: str) -> int:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows * _ggml.row_bytes(kind, tensor.shape[-1])


def _offsets(start: int, sizes: list[int]) -> list[int]:
    """Where each tensor begins in the file, and last the length of the file."""
    found = [start]
    for size in sizes:
        found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return found


def _outline(
    checkpoint: Any, path: Path, file_type: int, plan: list[Stored], kinds: list[str], *, tokenizer: bool = True
) -> tuple[list[str], list[int]]:
    """Write metadata and tensor table, and make room for the data; returns notes and the tensors' offsets."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture(checkpoint))
    writer._pack_val = partial(_pack, writer._pack_val)
    notes = add_metadata(writer, checkpoint) + (add_tokenizer(writer, checkpoint) if tokenizer else [])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    sizes = list(map(_bytes, plan, kinds))
    for tensor, kind, size in zip(plan, kinds, sizes, strict=True):
        raw = gguf.GGMLQuantizationType(_ggml.TYPES[kind])
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        offsets = _offsets(-(-writer.fout[0].tell() // ALIGNMENT) * ALIGNMENT, sizes)
    finally:
        writer.close()
    with open(path, "r+b") as file:
        file.truncate(offsets[-1])
    return notes, offsets


def _pack(one_by_one: Callable[..., bytes], value: Any, kind: int, add_vtype: bool, sub_type: int | None = None) -> bytes:
    """A metadata value as bytes, as the gguf package packs it; a vocabulary's lists at once, where it takes a call an item."""
    from gguf import GGUFValueType as Kind

    same = set(map(type, value)) if kind == Kind.ARRAY and sub_type is None else set()
    if same == {str}:
        texts = [text.encode() for text in value]
        of, body = Kind.STRING, b"".join([part for text in texts for part in (len(text).to_bytes(8, "little"), text)])
    elif same == {int}:
        of, body = Kind.INT32, np.array(value, "<i4").tobytes()
    else:
        return one_by_one(value, kind, add_vtype, sub_type)
    return (struct.pack("<I", kind) if add_vtype else b"") + struct.pack("<IQ", of, len(value)) + body


def _write_data(
    file: Any, plan: list[Stored], kinds: list[str], offsets: list[int], imatrix: Mapping[str, np.ndarray], threads: int
) -> None:
    """Convert slabs in `threads` threads (the work is in C and numpy, outside the interpreter lock)."""
    lock = Lock()
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(_write_slab, file, lock, tensor, kind, offset, imatrix.get(tensor.name), first, last)
            for tensor, kind, offset in zip(plan, kinds, offsets[:-1], strict=True)
            for first, last in _slabs(tensor)
        ]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _slabs(tensor: Stored) -> Iterator[tuple[int, int]]:
    """Row ranges of about SLAB values, cut at the edges of heads where rows are reordered."""
    columns = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, SLAB // max(1, columns) // tensor.head_rows) * tensor.head_rows
    for first in range(0, tensor.shape[0], step):
        yield first, min(first + step, tensor.shape[0])


def _write_slab(
    file: Any, lock: Lock, tensor: Stored, kind: str, offset: int, importance: np.ndarray | None, first: int, last: int
) -> None:
    rows = tensor.rows(first, last)
    if not bits_are_finite(rows, "F32"):
        raise LabkitError(
            f"Tensor {tensor.name!r} holds NaN or infinite weights in rows {first} to {last - 1}; "
            "get the checkpoint again."
        )
    data = encode(rows, kind, importance)
    with lock:  # a plain write, not a mapped file: on a full disk it fails with an error instead of a signal
        file.seek(offset + first * (data.nbytes // (last - first)))
        file.write(data.data)


def encode(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 rows as the bytes of `kind`, uint8."""
    if kind == "f32":
        return np.ascontiguousarray(rows).view(np.uint8)
    if kind == "f16":
        half = _ggml.half(rows)
        if not bits_are_finite(half, "F16"):
            raise LabkitError("A weight is larger than float16 can hold (65504); write bf16 or f32 instead.")
        return half.view(np.uint8)
    return _ggml.quantize(rows, kind, importance)


def tensors(path: str | Path) -> list[dict[str, Any]]:
    """The tensor table of a GGUF file: name, shape (rows first), type as llama.cpp prints it, bytes."""
    return [
        {"name": one.name, "shape": one.shape, "type": one.kind.name.lower(), "bytes": one.size}
        for one in _gguf_table.entries(path)
    ]


def metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file as Python values; long arrays (the vocabulary) included."""
    return {key: field.contents() for key, field in _reader(path).fields.items() if not key.startswith("GGUF.")}


def tensor_data(path: str | Path, name: str) -> np.ndarray:
    """The stored bytes of one tensor, (rows, row bytes) uint8, or float32 values for float32 tensors; memory-mapped."""
    for one in _gguf_table.entries(path):
        if one.name == name:
            return _gguf_table.data(path, one)
    raise LabkitError(f"{path} has no tensor {name!r}; see tensors(path) for the names.")


def _reader(path: str | Path) -> Any:
    import gguf

    if not Path(path).exists():
        raise LabkitError(f"{path} does not exist; expected a GGUF file.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise LabkitError(f"{path} is not a readable GGUF file ({error}); write it again.") from None
