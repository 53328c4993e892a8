"""The tensor table of a GGUF file without its vocabulary: keys are stepped over, so a long one costs little.

The `gguf` package's reader makes an object of every key and every word of the vocabulary, which takes longer than writing a
small model. What it says of tensors and what is said here are compared in the tests.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit.types import LabkitError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type's number
ALIGNMENT_KEY = b"general.alignment"


@dataclass(frozen=True)
class Entry:
    """One tensor: shape rows first, type as the package numbers it, and where its bytes lie in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    first: int
    size: int


def entries(path: str | Path) -> list[Entry]:
    """The tensor table. LabkitError when the file is missing, is no GGUF, or ends too early."""
    path = Path(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).entries()
    except FileNotFoundError:
        raise LabkitError(f"{path} does not exist; expected a GGUF file.") from None
    except (ValueError, struct.error, IndexError, KeyError, OSError) as error:
        raise LabkitError(f"{path} is not a readable GGUF file ({error}); write it again.") from None


def data(path: str | Path, entry: Entry) -> np.ndarray:
    """The stored values of a tensor, memory-mapped: float32 or float16 as such, all other types (..., bytes of a row) uint8."""
    dtype = {"F32": np.float32, "F16": np.float16}.get(entry.kind.name, np.uint8)
    shape = entry.shape if dtype is not np.uint8 else (*entry.shape[:-1], entry.size // int(np.prod(entry.shape[:-1], dtype=np.int64)))
    return np.memmap(path, dtype, "r", entry.first, shape)


class _Walk:
    """Reads on from one place to the next."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def entries(self) -> list[Entry]:
        import gguf

        if self.data[:4] != MAGIC:
            raise ValueError(f"it begins with {self.data[:4]!r}")
        self.at = 4
        version, count, keys = self.take("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; {VERSIONS[0]} and {VERSIONS[1]} are known")
        alignment = 32
        for _ in range(keys):
            key, (kind,) = self.string(), self.take("<I")
            if key == ALIGNMENT_KEY:
                alignment = struct.unpack_from("<I", self.data, self.at)[0]
            self.skip(kind)
        table = []
        for _ in range(count):
            name, (rank,) = self.string().decode(), self.take("<I")
            *shape, kind, offset = self.take(f"<{rank}QIQ")
            table.append((name, tuple(reversed(shape)), gguf.GGMLQuantizationType(kind), offset))
        start = -(-self.at // alignment) * alignment
        made = [_entry(name, shape, kind, start + offset) for name, shape, kind, offset in table]
        if short := [e.name for e in made if e.first + e.size > len(self.data)]:
            raise ValueError(f"it ends before tensor {short[0]!r} does")
        return made

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self) -> bytes:
        (length,) = self.take("<Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length} bytes at byte {self.at}")
        self.at += length
        return self.data[self.at - length : self.at]

    def skip(self, kind: int) -> None:
        """Step over one value."""
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            of, count = self.take("<IQ")
            if of in SIZES:
                self.at += SIZES[of] * count
            elif of == STRING:
                self._strings(count)
            else:
                for _ in range(count):
                    self.skip(of)
        else:
            self.at += SIZES[kind]

    def _strings(self, count: int) -> None:
        at, length, end = self.at, struct.Struct("<Q").unpack_from, len(self.data)
        for _ in range(count):
            at += 8 + length(self.data, at)[0]
            if at > end:
                raise ValueError(f"a text that ends at byte {at}")
        self.at = at


def _entry(name: str, shape: tuple[int, ...], kind: Any, first: int) -> Entry:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return Entry(name, shape, kind, first, int(np.prod(shape, dtype=np.int64)) // block * size)
