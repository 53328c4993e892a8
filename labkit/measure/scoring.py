"""The arithmetic under perplexity and divergence: windows over token ids, and log-softmax.

Nothing here knows a model. Logits come in as (n, V) float32, one chunk at a time, and are reduced slab by slab, so
that the working memory stays near `SLAB` numbers however large the vocabulary is. Sums run in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.types import LabkitError

SLAB = 1 << 22  # logits reduced at once: 16 MB of float32


class Window(NamedTuple):
    """One forward pass and what is scored in it.

    Logits row i, for first <= i < len(ids) - 1, predicts targets[i - first].
    """

    ids: np.ndarray  # (T,) int64, what the model reads
    first: int  # first scored row
    targets: np.ndarray  # (T - 1 - first,) int64


def chunks(tokens: Sequence[int], window: int, bos: int | None = None) -> Iterator[Window]:
    """Chunks that do not overlap; the first half of each only gives context.

    Rows window // 2 ... window - 2 are scored: window - 1 - window // 2 predictions a chunk, 255 of 512. Where the
    tokenizer begins texts with `bos`, it replaces the first token of every chunk. Tokens after the last full chunk
    are left out. This is the reference perplexity tool's definition.
    """
    ids = _long_enough(tokens, window)
    for start in range(0, ids.size - window + 1, window):
        chunk = ids[start : start + window]
        yield _window(chunk, window // 2, bos)


def strides(tokens: Sequence[int], window: int, stride: int, bos: int | None = None) -> Iterator[Window]:
    """Overlapping windows `stride` apart: every token but the first is scored once, after as much context as fits.

    Smaller strides give every token more context, hence a lower perplexity, for more work.
    """
    if not 1 <= stride <= window - 1:
        raise LabkitError(f"stride is {stride}; expected 1 to {window - 1}, one less than the window.")
    ids = _long_enough(tokens, window)
    scored = 1  # tokens before this index have been scored (token 0 has no context)
    while scored < ids.size:
        end = min(ids.size, window if scored == 1 else scored + stride)
        start = max(0, end - window)
        yield _window(ids[start:end], scored - 1 - start, bos)
        scored = end


def _window(ids: np.ndarray, first: int, bos: int | None) -> Window:
    targets, ids = ids[first + 1 :].copy(), ids.copy()
    if bos is not None:
        ids[0] = bos
    return Window(ids, first, targets)


def _long_enough(tokens: Sequence[int], window: int) -> np.ndarray:
    ids = np.asarray(tokens, dtype=np.int64)
    if window < 4:
        raise LabkitError(f"window is {window} tokens; expected at least 4.")
    if ids.size < window:
        raise LabkitError(
            f"The text has {ids.size} tokens, shorter than one window of {window}; "
            "give a longer text or a smaller window."
        )
    return ids


def run(runner: Any, window: Window) -> np.ndarray:
    """The scored rows of logits, (n, V) float32."""
    logits = np.asarray(runner.logits(window.ids.tolist()))
    if logits.ndim != 2 or logits.shape[0] != window.ids.size:
        raise LabkitError(f"The runner gave logits of shape {logits.shape}; expected ({window.ids.size}, vocabulary).")
    return logits[window.first : window.ids.size - 1]


def slabs(rows: int, width: int) -> Iterator[slice]:
    """Row slices of at most about `SLAB` numbers."""
    step = max(1, SLAB // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """ln Σ exp(logits) by row, (n,) float64: exponentials in float32, summed in float64."""
    top = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]


def nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) in nats, (n,) float64, from logits (n, V)."""
    out = np.empty(len(targets), dtype=np.float64)
    for part in slabs(*logits.shape):
        rows = logits[part]
        out[part] = log_sum_exp(rows) - np.take_along_axis(rows, targets[part, None], axis=1)[:, 0]
    finite(out)
    return out


def log_probs(logits: np.ndarray) -> np.ndarray:
    """Log-softmax by row, (n, V) float32. For a whole chunk: use only where the chunk must be kept."""
    out = np.empty(logits.shape, dtype=np.float32)
    for part in slabs(*logits.shape):
        out[part] = logits[part] - log_sum_exp(logits[part])[:, None]
    return out


def finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise LabkitError("The model gave logits that are not finite; its weights or its precision are broken.")


def token_bytes(checkpoint: Any) -> np.ndarray:
    """How many bytes of UTF-8 text each token id stands for, (V,) int64.

    A character may be split between tokens, so bytes are counted on the tokenizer's own pieces, not on decoded text.
    In a byte-level vocabulary every character of a piece is one byte; in a SentencePiece one `▁` is a space and
    `<0x0A>` a byte. Special tokens count as the text they are written with.
    """
    spec = json.loads((Path(checkpoint.path) / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]  # a list of (piece, score) in Unigram models
    pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    measure = len if '"ByteLevel"' in json.dumps(spec.get("decoder")) else _sentencepiece_bytes
    lengths = np.zeros(max([*pieces.values(), *special.values()], default=-1) + 1, dtype=np.int64)
    for piece, index in pieces.items():
        lengths[index] = measure(piece)
    for piece, index in special.items():
        lengths[index] = len(piece.encode())
    return lengths


def _sentencepiece_bytes(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("▁", " ").encode())


class Remembered:
    """A runner that keeps the logits of every text it has seen, so that a reference runs once for a whole ladder.

    Chunks are kept as `.npy` files in `folder` and memory-mapped when asked for again.
    """

    def __init__(self, runner: Any, folder: Path, name: str = "runner"):
        self.runner, self.folder, self.name = runner, Path(folder), name  # the name goes into records
        self.settings, self.seen = runner.settings, {}

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        key = np.asarray(tokens, dtype=np.int64).tobytes()
        if key not in self.seen:
            self.seen[key] = self.folder / f"logits-{len(self.seen)}.npy"
            np.save(self.seen[key], np.asarray(self.runner.logits(tokens), dtype=np.float32))
        return np.load(self.seen[key], mmap_mode="r")

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        return self.runner.generate(tokens, max_new)

    def close(self) -> None:
        self.runner.close()
