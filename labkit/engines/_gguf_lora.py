"""LoRA adapters in llama.cpp's words: the GGUF file of one, and a runner that switches between several."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit import _shapes
from labkit.engines import _ggml
from labkit.engines._gguf_model import architecture, interleave
from labkit.engines._llamacpp_runner import LlamaRunner
from labkit.types import LabkitError


def write(adapter: Any, checkpoint: Any, path: Path) -> Path:
    """`adapter` (labkit.adapters.Adapter) as a GGUF of float32 tensors NAME.lora_a (rank, in) and NAME.lora_b (out, rank)."""
    import gguf

    config, known = checkpoint.config, checkpoint.tensors()
    kind = getattr(gguf.MODEL_ARCH, architecture(checkpoint).upper())
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    queries, pairs, _ = _shapes.heads(config)
    turned = {"q_proj": queries, "k_proj": pairs} if _shapes.family(config) in ("llama", "mistral") else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        writer = gguf.GGUFWriter(new, architecture(checkpoint))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)  # llama.cpp divides by the rank
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for layer, (a, b) in adapter.layers.items():
            stored, weight = names.get_name(f"{layer}.weight", try_suffixes=(".weight",)), known.get(f"{layer}.weight")
            if stored is None or weight is None or weight.shape != (b.shape[0], a.shape[1]):
                shape = (b.shape[0], a.shape[1])
                raise LabkitError(f"The adapter is for a {layer} of {shape}; {checkpoint.name} has no such matrix.")
            heads = turned.get(layer.rpartition(".")[2], 0)  # the rows of B are rows of W: reordered as those are
            b = interleave(b, b.shape[0] // heads) if heads else b
            writer.add_tensor(f"{stored}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{stored}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


class AdaptedLlama(LlamaRunner):
    """A LlamaRunner with adapters loaded beside the weights; all of a context's sequences share one."""

    def __init__(self, path: Path, checkpoint: Any, adapters: Mapping[str, Any], **settings: Any):
        super().__init__(path, **settings)
        self._adapters: dict[str, Any] = {}
        self._used: str | None = None
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, adapter) in enumerate(adapters.items()):
                self._adapters[name] = self._read(write(adapter, checkpoint, Path(folder) / f"{number}.gguf"), name)

    def _read(self, file: Path, name: str) -> Any:
        with _ggml.logged() as log:
            found = self._llama.llama_adapter_lora_init(self._model, str(file).encode())
        if not found:
            raise LabkitError(f"llama.cpp cannot load the adapter {name!r}: {_ggml.reason(log)}")
        return found

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone."""
        from labkit.adapters import chosen

        self._used = chosen(name, self._adapters)
        for context, _ in self._contexts.values():
            self._set(context)

    def _new_context(self, purpose: str, room: int) -> Any:
        context = super()._new_context(purpose, room)
        self._set(context)
        return context

    def _set(self, context: Any) -> None:
        used = [] if self._used is None else [self._adapters[self._used]]
        kept = (self._llama.llama_adapter_lora_p_ctypes * 1)(*used)
        if self._llama.llama_set_adapters_lora(context, kept, len(used), (ctypes.c_float * 1)(1.0)):
            raise LabkitError(f"llama.cpp did not take the adapter {self._used!r}; it was trained on another base.")
