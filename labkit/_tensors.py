"""Read-only access to safetensors files: nothing is loaded until it is asked for.

`raw` is a view of the mapped file. `rows` and `float32` read instead of mapping, because pages touched through a map
count as this process's memory until the system takes them back, and a conversion should show a slab, not the model.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from labkit._files import read_json
from labkit.types import LabkitError

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorView:
    """One stored tensor. Nothing is read before `raw`, `rows` or `float32` is called."""

    name: str
    dtype: str  # "BF16", "F16" or "F32"
    shape: tuple[int, ...]
    file: Path
    begin: int  # first byte in the file
    end: int

    @property
    def weights(self) -> int:
        return prod(self.shape)

    def raw(self) -> np.ndarray:
        """The stored bytes, (n,) uint8, a read-only view of the mapped file."""
        return _mapped(self.file)[self.begin : self.end]

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows first..last-1 (along axis 0) as float32, shape (last - first, *shape[1:]); a fresh array."""
        if not self.shape:
            return self.float32()
        if not 0 <= first <= last <= self.shape[0]:
            raise LabkitError(f"Rows {first}:{last} of {self.name} were asked for, but it has {self.shape[0]} rows.")
        stride = prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        begin = self.begin + first * stride
        flat = _widen(_read(self, begin, begin + (last - first) * stride))
        return flat.reshape(last - first, *self.shape[1:])

    def float32(self) -> np.ndarray:
        """The whole tensor as a fresh float32 array of `shape`."""
        return _widen(_read(self, self.begin, self.end)).reshape(self.shape)


@cache
def _map_once(file: Path, identity: tuple[int, int]) -> np.ndarray:
    return np.memmap(file, dtype=np.uint8, mode="r")


def _mapped(file: Path) -> np.ndarray:
    """The file as uint8; a file replaced since is mapped anew (a map is address space, not memory)."""
    info = file.stat()
    return _map_once(file, (info.st_mtime_ns, info.st_size))


INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # the stored bits of it; NaN lies above


def is_finite(view: TensorView, slab: int = 4_000_000) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Looks at the stored bits."""
    step = slab * ITEM_BYTES[view.dtype]
    return all(bits_are_finite(_read(view, begin, min(begin + step, view.end)), view.dtype) for begin in range(view.begin, view.end, step))


def bits_are_finite(values: np.ndarray, dtype: str) -> bool:
    """The same of contiguous values of that type: the largest positive and the largest negative lie below infinity.

    Two looks and no array between: np.isfinite makes one, which costs more than looking where threads share the memory.
    """
    width, top = 8 * values.itemsize, INFINITY[dtype]
    positive, negative = values.view(f"i{values.itemsize}").max(initial=0), values.view(f"u{values.itemsize}").max(initial=0)
    return int(positive) < top and int(negative) < top | 1 << (width - 1)


STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # numpy's type for the stored bits


def _read(view: TensorView, begin: int, end: int) -> np.ndarray:
    """Bytes begin..end of the view's file as its stored type, a fresh array."""
    count = (end - begin) // ITEM_BYTES[view.dtype]
    found = np.fromfile(view.file, dtype=STORED[view.dtype], count=count, offset=begin)
    if len(found) != count:
        raise LabkitError(f"{view.file} became shorter while it was read; get it again.")
    return found


def _widen(stored: np.ndarray) -> np.ndarray:
    if stored.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        wide = stored.astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    return stored.astype(np.float32, copy=False)


class Tensors(Mapping[str, TensorView]):
    """Tensors by name, over one file or over the shards named in model.safetensors.index.json."""

    def __init__(self, views: dict[str, TensorView], files: tuple[Path, ...]):
        self._views, self.files = views, files

    def __getitem__(self, name: str) -> TensorView:
        try:
            return self._views[name]
        except KeyError:
            raise LabkitError(f"Tensor {name!r} is not in {self.files[0].parent}.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def get(self, name: str, default: TensorView | None = None) -> TensorView | None:
        return self._views.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def open_tensors(path: Path) -> Tensors:
    """Check the headers of a checkpoint folder (or of one .safetensors file) and give its tensors by name."""
    path = Path(path)
    files, index = _files(path)
    views: dict[str, TensorView] = {}
    for file in files:
        views.update(read_header(file))
    for name, file in index.items():
        if name not in views or views[name].file.name != file:
            raise LabkitError(f"The index of {path} places tensor {name!r} in {file}; it is not there. Get it again.")
    return Tensors(views, tuple(files))


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    if path.is_file():
        return [path], {}
    single, listed = path / "model.safetensors", path / "model.safetensors.index.json"
    if listed.exists() and not single.exists():
        index = read_json(listed, "Checkpoint index").get("weight_map", {})
        files = [path / name for name in sorted(set(index.values()))]
    else:
        index, files = {}, [single]
    for file in files:
        if file.parent != path:  # an index must not reach outside its folder
            raise LabkitError(f"The index of {path} names {file}; expected files of that folder only.")
        if not file.exists():
            raise LabkitError(_absent(path, file))
    return files, index


def _absent(path: Path, file: Path) -> str:
    others = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"})
    also = f" (found {', '.join(others[:3])}; pickled weights are never opened)" if others else ""
    return f"{file} is missing{also}; expected a Hugging Face folder with config.json, tokenizer.json and safetensors."


def read_header(file: Path) -> dict[str, TensorView]:
    """Name -> view for one safetensors file, every offset checked against the file's size."""
    total = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > total - 8:
            raise LabkitError(f"{file} is truncated: {total} bytes, shorter than its own header; get it again.")
        if length > LONGEST_HEADER:
            raise LabkitError(f"{file} is not a safetensors file: its header would be {length} bytes long.")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        views = {name: _view(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LabkitError(f"{file} has a corrupt header; expected safetensors. Get the file again.") from None
    _check_bounds(file, views, 8 + length, total)
    return views


def _view(file: Path, name: str, entry: dict, data: int) -> TensorView:
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if entry["dtype"] not in ITEM_BYTES:
        raise LabkitError(
            f"Tensor {name!r} in {file} is stored as {entry['dtype']}; expected BF16, F16 or F32. "
            "Use the unquantized checkpoint of this model."
        )
    if begin < 0 or end - begin != prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise LabkitError(f"{file} has a corrupt header: {name!r} spans {end - begin} bytes, not those of {shape}.")
    return TensorView(name, entry["dtype"], shape, file, data + begin, data + end)


def _check_bounds(file: Path, views: dict[str, TensorView], data: int, total: int) -> None:
    expected = max((view.end for view in views.values()), default=data)
    if expected > total:
        raise LabkitError(f"{file} is truncated: {total} bytes where its header promises {expected}; get it again.")
    previous = data
    for view in sorted(views.values(), key=lambda v: v.begin):
        if view.begin < previous:
            raise LabkitError(f"{file} has a corrupt header: {view.name!r} overlaps the tensor before it.")
        previous = view.end
