"""A GGUF file as a Runner, through llama.cpp's C interface: token ids in, logits out, nothing in between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit import host
from labkit.engines import _ggml, _llamacpp_repack
from labkit.types import LabkitError

BATCH = 512  # tokens a forward pass takes at once
OUTPUT_BYTES = 64_000_000  # room for the logits of one pass: fewer tokens at once with a large vocabulary
FLOAT_KV = ("f32", "f16", "bf16")
KV_TYPES = (*FLOAT_KV, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


class LlamaRunner:
    """See labkit.types.Runner. `exact`: float32 KV cache, no flash attention, no repacked weights.

    The other settings override single choices: `kv_type` one of the types of a KV cache ("f16", "q8_0" …), `batch`
    the tokens a forward pass takes, `context` the tokens a context holds at least (0: as few as a call needs).
    Float16 and bfloat16 weights are still multiplied in their own type, as llama.cpp does everywhere.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        exact: bool = False,
        threads: int | None = None,
        repack: bool | None = None,
        kv_type: str | None = None,
        flash_attention: bool | None = None,
        mmap: bool | None = None,
        batch: int = BATCH,
        context: int = 0,
        callback: Callable[[int, bool, Any], bool] | None = None,
    ):
        self._llama = _ggml.library()
        self._model: Any = None
        self._contexts: dict[str, tuple[Any, int]] = {}
        self._turn = 0
        if threads is not None and threads < 1:
            raise LabkitError(f"threads={threads} was given; expected 1 or more.")
        if (kv_type or "f16") not in KV_TYPES:
            raise LabkitError(f"kv_type={kv_type!r} was given; expected one of {', '.join(KV_TYPES)}.")
        self._exact, self._threads = exact, threads or host.cpus()
        self._kv_type = kv_type or ("f32" if exact else "f16")
        self._flash = not exact if flash_attention is None else flash_attention
        if self._kv_type not in FLOAT_KV and not self._flash:
            raise LabkitError(f"A KV cache in {self._kv_type} needs flash attention; switch it on or take f16.")
        self._mmap, self._batch, self._least = mmap, batch, context
        self._callback = self._llama.ggml_backend_sched_eval_callback(callback) if callback else None
        self._open(Path(path), not exact if repack is None else repack)

    def _open(self, path: Path, repack: bool) -> None:
        from labkit.engines._gguf import tensors

        llama = self._llama
        # repacked weights are a copy: mapping the file as well would hold them twice
        how, chosen = _llamacpp_repack.way(path, tensors(path)) if repack else (False, None)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = how is True
        params.tensor_buft_overrides = ctypes.cast(chosen, ctypes.c_void_p) if chosen else None
        mmap = not (how is True or chosen) if self._mmap is None else self._mmap
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mmap else llama.LLAMA_LOAD_MODE_NONE
        with _ggml.logged() as log:
            self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LabkitError(f"llama.cpp cannot load {path}: {_ggml.reason(log)}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.context = llama.llama_model_n_ctx_train(self._model)
        self._rows = max(16, min(BATCH, OUTPUT_BYTES // (4 * self.vocab_size)))
        self.settings = {
            "threads": self._threads,
            "batch_threads": self._threads,
            "flash_attention": self._flash,
            "kv_type": self._kv_type,
            "repack": how,
            "mmap": mmap,
            "batch": self._batch,
            "exact": self._exact,
            "device": "CPU",
        }

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits for every position, (T, V) float32; row i predicts token i + 1. State starts empty."""
        ids = self._check(tokens)
        context = self._start("every", len(ids))
        out = np.empty((len(ids), self.vocab_size), dtype=np.float32)
        for first in range(0, len(ids), self._rows):
            part = ids[first : first + self._rows]
            self._decode(context, part, every=True)
            out[first : first + len(part)] = self._output(context, len(part))
        return out

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Process tokens from an empty state and give the last position's logits, (V,) float32."""
        ids = self._check(tokens)
        return self._prefill(self._start("last", len(ids)), ids).copy()

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy continuation: exactly `max_new` ids (end-of-text does not stop it), from an empty state."""
        ids = self._check(tokens, max_new)
        return self._generate(ids, max_new)

    def _generate(self, ids: np.ndarray, max_new: int) -> Iterator[int]:
        if max_new < 1:
            return
        context = self._start("last", len(ids) + max_new)
        turn = self._turn
        row = self._prefill(context, ids)
        # One batch and one view for all steps: between two passes the library's threads wait, and soon sleep.
        one = np.empty(1, dtype=np.int32)
        batch, decode = self._batch_of(one), self._llama.llama_decode
        for left in range(max_new, 0, -1):
            token = int(row.argmax())
            yield token
            if left == 1:
                return
            if turn != self._turn:
                raise LabkitError("Another call used this runner meanwhile; finish one generation before the next.")
            one[0] = token
            if code := decode(context, batch):
                raise self._stuck(1, code)
            row = self._view(context, row)

    def _prefill(self, context: Any, ids: np.ndarray) -> np.ndarray:
        for first in range(0, len(ids), self._batch):
            self._decode(context, ids[first : first + self._batch], every=False)
        return self._output(context, 1)[0]

    def _check(self, tokens: Sequence[int], more: int = 0) -> np.ndarray:
        if self._model is None:
            raise LabkitError("This runner is closed; load the artifact again.")
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise LabkitError(f"Tokens of shape {ids.shape} were given; expected a flat list with at least one id.")
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise LabkitError(f"Token id {wrong[0]} is out of range; this model has ids 0 to {self.vocab_size - 1}.")
        if more < 0 or len(ids) + more > self.context:
            wanted = f"{len(ids)} tokens and {more} new ones" if more else f"{len(ids)} tokens"
            raise LabkitError(f"{wanted} were asked for, but the model's context is {self.context} tokens.")
        return ids.astype(np.int32)

    def _start(self, purpose: str, needed: int) -> Any:
        """An empty context with room for `needed` tokens; a larger one replaces the smaller when needed."""
        if self._model is None:
            raise LabkitError("This runner is closed; load the artifact again.")
        self._turn += 1
        context, room = self._contexts.get(purpose, (None, 0))
        needed = max(needed, min(self._least, self.context))
        if context is None or needed > room:
            if context is not None:
                self._llama.llama_free(self._contexts.pop(purpose)[0])
            room = min(-(-max(needed, min(2 * room, self.context)) // 256) * 256, max(self.context, needed))
            context = self._new_context(purpose, room)
            self._contexts[purpose] = context, room
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        return context

    def _new_context(self, purpose: str, room: int) -> Any:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room, 1
        every = purpose == "every"
        params.n_batch = params.n_ubatch = min(self._rows if every else self._batch, room)
        params.n_outputs_max = 0 if every else 1  # logits of one position only: no room for the others
        params.n_threads = params.n_threads_batch = self._threads
        enabled, disabled = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = enabled if self._flash else disabled
        params.type_k = params.type_v = _ggml.TYPES[self._kv_type]
        params.swa_full = False
        params.no_perf = True
        if self._callback:
            params.cb_eval = self._callback
        with _ggml.logged() as log:
            context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise LabkitError(f"llama.cpp cannot make a context of {room} tokens: {_ggml.reason(log)}")
        return context

    def _decode(self, context: Any, ids: np.ndarray, *, every: bool) -> None:
        batch = self._batch_of(ids := np.ascontiguousarray(ids))
        if every:
            marks = np.ones(len(ids), dtype=np.int8)
            batch.logits = marks.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if code := self._llama.llama_decode(context, batch):
            raise self._stuck(len(ids), code)

    def _batch_of(self, ids: np.ndarray) -> Any:
        """A batch that reads `ids` (contiguous int32, to be kept alive); positions and sequence are filled in by the library."""
        batch = self._llama.llama_batch()
        batch.n_tokens = len(ids)
        batch.token = ids.ctypes.data_as(ctypes.POINTER(self._llama.llama_token))
        return batch

    @staticmethod
    def _stuck(tokens: int, code: int) -> LabkitError:
        return LabkitError(f"llama.cpp failed to process {tokens} tokens (code {code}); load the artifact again.")

    def _output(self, context: Any, rows: int) -> np.ndarray:
        """Logits of the last pass, (rows, V), a view that the next pass overwrites."""
        pointer = self._llama.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size))

    def _view(self, context: Any, known: np.ndarray) -> np.ndarray:
        """The one row of logits of the last pass: `known`, the view of the pass before, while they stay where they were."""
        pointer = self._llama.llama_get_logits(context)
        if ctypes.addressof(pointer.contents) == known.ctypes.data:
            return known
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def cache_bytes(self) -> int:
        """Bytes the KV cache of the largest open context takes: 2 x layers x context x KV width x bytes a value."""
        llama = self._llama
        room = max((room for _, room in self._contexts.values()), default=0)
        head = llama.llama_model_n_embd(self._model) // llama.llama_model_n_head(self._model)
        width = head * llama.llama_model_n_head_kv(self._model)
        row = _ggml.symbol("ggml_row_size")(_ggml.TYPES[self._kv_type], width)
        return 2 * llama.llama_model_n_layer(self._model) * room * row

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        for context, _ in self._contexts.values():
            self._llama.llama_free(context)
        self._contexts = {}
        if self._model is not None:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()
