"""Many sequences in one context of llama.cpp: what a server's batching, prefix sharing and draft checking are made of.

    with Sequences(path, slots=4, cells=256) as cache:
        rows = cache.step([(0, ids, 0)])        # sequence 0 reads `ids` from position 0; a row of logits a token
        cache.share(0, 1)                       # sequence 1 has the same past now, and no cell was copied

The cells of the cache are shared by all sequences (llama.cpp calls that unified), so `Full` is raised when the last is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit import host
from labkit.engines import _ggml
from labkit.types import LabkitError

GRAIN = 256  # llama.cpp rounds the cells of a context up to a multiple of this


class Full(LabkitError):
    """The cache has no free cell for the tokens of this step; nothing of it was stored."""


class Sequences:
    """A GGUF with a float cache of `cells` tokens that `slots` sequences share. `cells` must be a multiple of 256.

    `kv_type`: "f32" or "f16". `threads`: default all. Close it, or use it as a context manager.
    """

    def __init__(self, path: str | Path, slots: int, cells: int = 512, *, kv_type: str = "f16", threads: int | None = None):
        if cells < GRAIN or cells % GRAIN or slots < 1:
            raise LabkitError(f"{slots} slots and {cells} cells were given; expected 1 or more slots and a multiple of {GRAIN} cells.")
        self._llama, self._context = _ggml.library(), None
        self.slots, self.cells = slots, cells
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        with _ggml.logged() as log:
            self._model = self._llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LabkitError(f"llama.cpp cannot load {path}: {_ggml.reason(log)}")
        self.vocab_size = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self._open(kv_type, threads or host.cpus())

    def _open(self, kv_type: str, threads: int) -> None:
        llama, params = self._llama, self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.cells
        params.n_seq_max, params.kv_unified, params.no_perf = self.slots, True, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = _ggml.TYPES[kv_type]
        with _ggml.logged() as log:
            self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise LabkitError(f"llama.cpp cannot make a context of {self.cells} cells: {_ggml.reason(log)}")
        self._memory = llama.llama_get_memory(self._context)

    def step(self, parts: Iterable[tuple[int, Sequence[int], int]]) -> np.ndarray:
        """One pass over (sequence, ids, first position) of several sequences: logits (tokens, V) float32, in their order.

        The array is a copy. Raises Full when the cells do not suffice, LabkitError for other refusals.
        """
        flat = [(slot, int(token), first + i) for slot, ids, first in parts for i, token in enumerate(ids)]
        if not flat:
            raise LabkitError("A step of no tokens was asked for; give at least one.")
        batch = self._llama.llama_batch_init(len(flat), 0, 1)
        try:
            batch.n_tokens = len(flat)
            for i, (slot, token, position) in enumerate(flat):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = slot, 1
            code = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if code == 1:
            raise Full(f"{len(flat)} tokens did not fit: the {self.cells} cells of the cache are taken.")
        if code:
            raise LabkitError(f"llama.cpp failed to process {len(flat)} tokens (code {code}); check ids and positions.")
        rows = np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (len(flat), self.vocab_size))
        return rows.copy()

    def share(self, source: int, target: int) -> None:
        """Give `target` the past of `source`. The cells are marked as belonging to both; nothing is copied."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget(self, slot: int, first: int = 0) -> None:
        """Take positions `first` and later of a sequence out of the cache."""
        self._llama.llama_memory_seq_rm(self._memory, slot, first, -1)

    def clear(self) -> None:
        """Forget every sequence."""
        self._llama.llama_memory_clear(self._memory, True)

    def length(self, slot: int) -> int:
        """Tokens a sequence has in the cache."""
        return self._llama.llama_memory_seq_pos_max(self._memory, slot) + 1

    def state_bytes(self, slot: int) -> int:
        """Bytes llama.cpp would write to save a sequence: its keys and values, and some bytes of bookkeeping a cell."""
        return int(self._llama.llama_state_seq_get_size(self._context, slot))

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class Greedy:
    """A `labkit.simulate.Follower` over llama.cpp: reads ids into the cache and tells the likeliest id after each."""

    def __init__(self, path: str | Path, cells: int = 512, **options: Any):
        self._cache, self._length = Sequences(path, 1, cells, **options), 0
        self.passes = 0

    def follow(self, ids: Sequence[int]) -> list[int]:
        rows = self._cache.step([(0, ids, self._length)])
        self._length, self.passes = self._length + len(ids), self.passes + 1
        return rows.argmax(axis=1).tolist()

    def keep(self, length: int) -> None:
        self._cache.forget(0, length)
        self._length = min(self._length, length)

    def close(self) -> None:
        self._cache.close()
