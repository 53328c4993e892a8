"""The `_logits_` file: a reference model's log-probabilities, 16 bits each, byte-compatible with the reference tool.

    8 bytes  "_logits_"
    3 int32  window, vocabulary, chunks
    int32    tokens, chunks x window
    then by chunk, window - 1 - window // 2 rows of uint16: 2 float32 (scale, lowest log-probability kept) stored in
    the first four, then one step number a vocabulary entry, padded to an even count.

An entry's log-probability is scale · step + lowest; entries more than 16 below the row's best share step 0. Both put
a small floor under any divergence from such a file: a model differs from its own file, and exact logits read lower.
Layout and rounding follow the reference tool's source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit.measure import scoring
from labkit.types import LabkitError

MAGIC = b"_logits_"
DEPTH = np.float32(16)  # how far below the best logit entries are told apart


@dataclass(frozen=True)
class Base:
    """An opened file; rows stay on disk until asked for."""

    path: Path
    window: int
    vocabulary: int
    tokens: np.ndarray  # (chunks, window) int32
    rows: np.ndarray  # (chunks, scored rows, row width) uint16, memory-mapped

    def windows(self, bos: int | None = None) -> list[scoring.Window]:
        """The windows of the text this file was made from."""
        return list(scoring.chunks(self.tokens.ravel(), self.window, bos))

    def log_probs(self, chunk: int) -> np.ndarray:
        """Log-probabilities of one chunk's scored positions, (rows, vocabulary) float32."""
        rows = np.array(self.rows[chunk])
        scale, lowest = rows[:, :4].copy().view(np.float32).T[..., None]
        return scale * rows[:, 4 : 4 + self.vocabulary].astype(np.float32) + lowest


def row_width(vocabulary: int) -> int:
    """uint16 numbers in a row."""
    return 2 * ((vocabulary + 1) // 2) + 4


def write_base(path: Path, runner: Any, tokens: Sequence[int], window: int = 512, bos: int | None = None) -> Path:
    """Run every chunk of `tokens` through `runner` and write the file; nothing is left behind if that fails."""
    parts = list(scoring.chunks(tokens, window, bos))
    kept = np.asarray(tokens[: len(parts) * window], dtype=np.int32)
    beside = Path(path).with_suffix(f".{os.getpid()}.part")
    try:
        with beside.open("wb") as out:
            _write(out, (scoring.run(runner, part) for part in parts), kept, window, len(parts))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return Path(path)


def _write(out: Any, logits: Iterable[np.ndarray], tokens: np.ndarray, window: int, count: int) -> None:
    for i, rows in enumerate(logits):
        if i == 0:  # the vocabulary is known once the first chunk has been run
            out.write(MAGIC + np.array([window, rows.shape[1], count], dtype=np.int32).tobytes() + tokens.tobytes())
        for part in scoring.slabs(*rows.shape):
            out.write(pack(rows[part]).tobytes())


def pack(logits: np.ndarray) -> np.ndarray:
    """Logits (n, V) float32 -> rows of the file (n, row_width(V)) uint16; arithmetic in float32 as the tool does."""
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - DEPTH)
    log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    scale = (top - low) / np.float32(65535)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.where(logits > low, np.rint(inverse * (logits - low)), 0)
    out = np.zeros((len(logits), row_width(logits.shape[1])), dtype=np.uint16)
    out[:, :4] = np.concatenate([scale, low - top - log_sum], axis=1).astype(np.float32).view(np.uint16)
    out[:, 4 : 4 + logits.shape[1]] = steps.astype(np.int64)  # 65535 may round up by one step: wrap as C does
    return out


def read_base(path: Path) -> Base:
    """Open a file and check that its size is what its header promises."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic, header = file.read(8), np.frombuffer(file.read(12), dtype=np.int32)
            if magic != MAGIC or header.size != 3 or (header < 1).any():
                raise LabkitError(f"{path} does not begin as a logits file does; write one with write_base.")
            window, vocabulary, count = (int(n) for n in header)
            tokens = np.fromfile(file, dtype=np.int32, count=count * window)
    except OSError as error:
        raise LabkitError(f"Cannot read {path} ({error.strerror}); give the path of a logits file.") from None
    shape = (count, window - 1 - window // 2, row_width(vocabulary))
    start, expected = 20 + 4 * count * window, 20 + 4 * count * window + 2 * int(np.prod(shape))
    if path.stat().st_size != expected:
        raise LabkitError(f"{path} has {path.stat().st_size} bytes, its header promises {expected}; make it again.")
    rows = np.memmap(path, dtype=np.uint16, mode="r", offset=start, shape=shape)
    return Base(path, window, vocabulary, tokens.reshape(count, window), rows)
