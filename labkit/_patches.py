"""Tensors of finished files: read them as a loader would, compare two files, write a copy with some replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit._files import written_beside
from labkit.blocks import error
from labkit.types import LabkitError


def values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file as the float32 weights a reader sees, by name."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32, copy=False) for t in reader.tensors}


def tensor_errors(reference: Path, path: Path) -> dict[str, float]:
    """Signal to noise in dB of every tensor of a GGUF file against a reference file; infinite where they are equal."""
    want, got = values(reference), values(path)
    with np.errstate(over="ignore"):
        return {name: error(want[name], got[name]).sqnr_db for name in want if name in got}


def patched(source: Path, out: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Copy a GGUF file with the bytes of some tensors replaced. Error: no such tensor, another number of bytes."""
    import gguf

    table = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    with beside(Path(out)) as partial:
        shutil.copyfile(source, partial)
        with open(partial, "r+b") as file:
            for name, data in tensors.items():
                if name not in table or np.asarray(data).nbytes != table[name].n_bytes:
                    room = f"{table[name].n_bytes} bytes" if name in table else "no such tensor"
                    raise LabkitError(f"{np.asarray(data).nbytes} bytes were given for {name}; {source} has {room}.")
                file.seek(int(table[name].data_offset))
                file.write(np.ascontiguousarray(data).tobytes())
    return Path(out)


def ir_tensor(path: Path, name: str) -> np.ndarray:
    """One float32 array of an OpenVINO IR, by the name `ir_constants` gives it."""
    found = _ir_constant(path, name)
    data = np.fromfile(path.with_suffix(".bin"), np.uint8, found.bytes, offset=found.offset)
    return data.view(np.float32).reshape(found.shape)


def patched_ir(source: Path, folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy an OpenVINO artifact's folder with some float32 arrays replaced. Error: no such array, another shape."""
    from labkit.engines.openvino import MODEL

    with written_beside(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        with open((partial / MODEL).with_suffix(".bin"), "r+b") as file:
            for name, data in tensors.items():
                found = _ir_constant(partial / MODEL, name)
                if np.shape(data) != found.shape:
                    raise LabkitError(f"{name} has shape {found.shape}; an array of shape {np.shape(data)} was given.")
                file.seek(found.offset)
                file.write(np.ascontiguousarray(data, dtype=np.float32).tobytes())


def _ir_constant(path: Path, name: str) -> Any:
    from labkit.engines.openvino import ir_constants

    found = [constant for constant in ir_constants(path) if constant.name == name and constant.dtype == "f32"]
    if not found:
        raise LabkitError(f"{path} has no float32 array {name!r}; see ir_constants(path) for the names.")
    return found[0]


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A name next to `out` to write to; it takes `out`'s place when all went well, else it is gone."""
    partial = out.with_name(f".partial-{out.name}")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
