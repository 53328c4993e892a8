"""Small tools around an IR for experiments: logits under chosen hints, calibration inputs, NNCF without its chatter."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from labkit import _capture
from labkit._signals import signal_stack_kept
from labkit.engines import _nncf
from labkit.engines._openvino_runner import EXACT, core


def ir_logits(model: Any, tokens: Any, hints: Mapping[str, Any] | None = None, *, chunk: int | None = None) -> np.ndarray:
    """Logits (T, V) float32 of an IR (a path or an `openvino.Model`) for T token ids, compiled for the CPU under `hints`.

    Tokens (N, T) are N sequences, each from the start: logits (N, T, V). Hints default to exact arithmetic; {} leaves all to
    the plugin. `chunk`: tokens a call, so that later ones read what the KV cache kept of earlier ones; by default all at once.
    """
    compiled = core().compile_model(model, "CPU", EXACT if hints is None else dict(hints))
    request, ids = compiled.create_infer_request(), np.asarray(tokens, dtype=np.int64)
    found = [_sequence(request, row, chunk or ids.shape[-1]) for row in np.atleast_2d(ids)]
    request.reset_state()
    compiled.release_memory()  # the plugin keeps what the longest input needed even after the model has gone
    return found[0] if ids.ndim == 1 else np.stack(found)


def _sequence(request: Any, ids: np.ndarray, chunk: int) -> np.ndarray:
    request.reset_state()
    parts = []
    for start in range(0, len(ids), chunk):
        new = ids[start : start + chunk]
        feed = _nncf.inputs(new)
        feed["attention_mask"] = np.ones((1, start + len(new)), np.int64)
        feed["position_ids"] += start
        parts.append(np.array(request.infer(feed)["logits"][0], dtype=np.float32))
    return np.concatenate(parts)


def calibration_inputs(
    checkpoint: Any, samples: int = 32, window: int = 128, text: str | Path | None = None
) -> list[dict[str, np.ndarray]]:
    """`samples` windows of `window` tokens, spread over a text file (None: the house's calibration text), as an IR's inputs."""
    return _nncf._samples(checkpoint, _nncf._text(text)[0], samples, window)


@contextmanager
def quiet_nncf() -> Iterator[Any]:
    """The module `nncf`, its progress bars and messages left out, this thread's signal stack kept."""
    nncf = _nncf._nncf()
    level = nncf.nncf_logger.level
    nncf.set_log_level(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, _capture.captured(Path(folder) / "nncf.log"), signal_stack_kept():
            yield nncf
    finally:
        nncf.set_log_level(level)
