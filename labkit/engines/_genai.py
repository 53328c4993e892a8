"""What the ONNX Runtime and Olive engines share: the child process, the facts of a graph, the runner of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit import host
from labkit._capture import tail
from labkit.types import Built, LabkitError

MODEL, EXACT, CONFIG, LOG = "model.onnx", "exact.onnx", "genai_config.json", "build.log"
CHILD = Path(__file__).with_name("_genai_child.py")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
BLOCK_OPS = ("MatMulNBits", "GatherBlockQuantized")


def run_child(
    step: str, log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None, **job: Any
) -> None:
    """One step of `_genai_child.py` in a process of its own, without network; what it prints is appended to `log`."""
    command = [sys.executable, "-P", str(CHILD), json.dumps({"step": step, **job}, default=str)]
    with open(log, "a", encoding="utf-8") as stream:
        where = {"env": {**os.environ, **OFFLINE, **(env or {})}, "cwd": cwd}
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, **where)
    if done.returncode:
        last = tail(log, 1) or "it printed nothing"
        killed = " (killed: it may have run out of memory)" if done.returncode < 0 else ""
        raise LabkitError(f"The {step} step failed{killed}: {last}")


def read_graph(path: Path) -> Any:
    """The graph of an ONNX file without the weights beside it."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError) as error:
        raise LabkitError(f"{path} cannot be read as ONNX ({error}); build it again.") from None
    except Exception as error:
        if type(error).__name__ != "DecodeError":
            raise
        raise LabkitError(f"{path} is not an ONNX file, or a damaged one; build it again.") from None


def tensor_bytes(tensor: Any) -> int:
    """Bytes of one stored tensor, from its shape and type (4-bit types hold two values a byte)."""
    from onnx import TensorProto, helper

    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8)


def weight_bytes(path: str | Path) -> int:
    """Bytes of all tensors an ONNX file stores, those in its external data file included, headers excluded."""
    return sum(tensor_bytes(tensor) for tensor in read_graph(Path(path)).graph.initializer)


def graph_summary(path: str | Path) -> dict[str, Any]:
    """What an ONNX file is made of: operator counts, stored bytes by type and part, bits, accuracy levels."""
    from onnx import TensorProto

    graph = read_graph(Path(path)).graph
    types: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    roles = _roles(graph)
    for tensor in graph.initializer:
        types[TensorProto.DataType.Name(tensor.data_type).lower()] += tensor_bytes(tensor)
        parts[roles.get(tensor.name, "other")] += tensor_bytes(tensor)
    blocks = [{a.name: a.i for a in n.attribute} for n in graph.node if n.op_type in BLOCK_OPS]
    kinds = _block_nodes(graph)
    levels = [b.get("accuracy_level", 0) for n, b in zip(kinds, blocks, strict=True) if n == "MatMulNBits"]
    return {
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "bytes_by_type": dict(types.most_common()),
        "bytes_by_part": dict(parts.most_common()),
        "bits": dict(sorted(Counter(str(b.get("bits", 4)) for b in blocks).items())),
        "block_sizes": sorted({b["block_size"] for b in blocks}),
        "accuracy_levels": sorted(set(levels)),
        "cache": _cache_type(graph),
    }


def describe(folder: Path, settings: Mapping[str, Any], notes: Sequence[str] = ()) -> Built:
    """The facts of a finished GenAI folder; where int8 activations are used, exact.onnx is written beside the graph."""
    summary, made = graph_summary(folder / MODEL), list(notes)
    total, parts = sum(summary["bytes_by_type"].values()), summary["bytes_by_part"]
    quantized = any(op in summary["operators"] for op in (*BLOCK_OPS, "MatMulInteger", "DequantizeLinear"))
    if quantized and (loose := _float_embedding(folder / MODEL)):
        made.append(f"The embedding stays float32: {loose:,} of {total:,} bytes.")
    if tables := parts.get("rotary tables"):
        made.append(f"Cosine and sine tables of the positions are stored like weights: {tables:,} of {total:,} bytes.")
    write_exact(folder)
    return Built(total, {**settings, **summary}, tuple(made))


def _float_embedding(path: Path) -> int:
    """Bytes of a float32 embedding matrix, 0 when it is quantized or shared with a quantized head."""
    graph = read_graph(path).graph
    looked_up = {n.input[0] for n in graph.node if n.op_type in ("Gather", "Transpose") and "embed_tokens" in n.name}
    return sum(tensor_bytes(t) for t in graph.initializer if t.name in looked_up and t.data_type == 1)


def _block_nodes(graph: Any) -> list[str]:
    return [node.op_type for node in graph.node if node.op_type in BLOCK_OPS]


def _cache_type(graph: Any) -> str:
    """Type of the stored keys and values, "none" for a graph without a cache."""
    kinds = {1: "f32", 10: "f16", 16: "bf16"}
    outputs = [o.type.tensor_type.elem_type for o in graph.output if "present" in o.name]
    return kinds.get(outputs[0], "other") if outputs else "none"


def _roles(graph: Any) -> dict[str, str]:
    """Tensor name -> embedding, head, matrices, rotary tables or norms, by the operators that read it."""
    roles: dict[str, str] = {}
    for tensor in graph.initializer:
        if "cos_cache" in tensor.name or "sin_cache" in tensor.name:
            roles[tensor.name] = "rotary tables"
        elif "norm" in tensor.name:
            roles[tensor.name] = "norms"
        elif "embed_tokens" in tensor.name:
            roles[tensor.name] = "embedding"
        elif "lm_head" in tensor.name:
            roles[tensor.name] = "head"
        elif len(tensor.dims) > 1:
            roles[tensor.name] = "matrices"
    return roles


def write_exact(folder: Path) -> bool:
    """Beside model.onnx write exact.onnx: the same stored weights, multiplied in float32 instead of int8.

    Only the graph is written; the weights stay in the one data file. Returns False when there is nothing to change.
    """
    import onnx

    model = read_graph(folder / MODEL)
    changed = False
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level" and attribute.i != 1:
                attribute.i, changed = 1, True
    if changed:
        onnx.save_model(model, str(folder / EXACT))
    return changed


class GenaiRunner:
    """A GenAI folder as a Runner (see labkit.types.Runner), on the CPU provider."""

    def __init__(self, folder: str | Path, *, exact: bool = False, threads: int | None = None):
        import onnxruntime_genai as genai

        if threads is not None and threads < 1:
            raise LabkitError(f"threads={threads} was given; expected 1 or more.")
        self._folder, self._genai, self._model = Path(folder), genai, None
        config = self._config()
        self.vocab_size, self.context = config["vocab_size"], config["context_length"]
        self._threads = threads or host.cpus()
        file = EXACT if exact and (self._folder / EXACT).exists() else MODEL
        self._model = self._open(file)
        self.settings = {"threads": self._threads, "exact": exact, "device": "CPU", **self._arithmetic(file)}

    def _config(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / CONFIG).read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError) as error:
            raise LabkitError(f"{self._folder} is not a GenAI folder ({error}); build the artifact again.") from None

    def _open(self, file: str) -> Any:
        settings = {"intra_op_num_threads": self._threads, "log_severity_level": 3}
        decoder = {"filename": file, "session_options": settings}
        # No id ends a generation. A minimum length would forbid the end-of-text id and so change the answer, and a
        # list here would be added to the ids of genai_config.json instead of taking their place.
        overlay = {"model": {"eos_token_id": -1, "decoder": decoder}}
        try:
            config = self._genai.Config(str(self._folder))
            config.overlay(json.dumps(overlay))
            return self._genai.Model(config)
        except RuntimeError as error:
            raise LabkitError(f"ONNX Runtime GenAI cannot open {self._folder / file}: {_first(error)}") from None

    def _arithmetic(self, file: str) -> dict[str, Any]:
        """Effective precision, read from the graph that was opened."""
        summary = graph_summary(self._folder / file)
        levels, cache = summary["accuracy_levels"], summary["cache"]
        int8 = bool({"DynamicQuantizeLinear", "QuantizeLinear"} & set(summary["operators"])) or 4 in levels
        return {"graph": file, "kv_type": cache, "activations": "int8" if int8 else cache, "accuracy_levels": levels}

    def _generator(self, ids: np.ndarray, more: int) -> Any:
        """A generator that has read `ids`, with room for `more` new ones."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, num_beams=1, max_length=len(ids) + more, min_length=0)
        generator = self._genai.Generator(self._model, params)
        self._begin(generator)
        generator.append_tokens(ids)
        return generator

    def _begin(self, generator: Any) -> None:
        """What is set before a generator reads its first token: here nothing."""

    def _check(self, tokens: Sequence[int], more: int = 0) -> np.ndarray:
        if self._model is None:
            raise LabkitError("This runner is closed; load the artifact again.")
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise LabkitError(f"Tokens of shape {ids.shape} were given; expected a flat list with at least one id.")
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise LabkitError(f"Token id {wrong[0]} is out of range; this model has ids 0 to {self.vocab_size - 1}.")
        if more < 0 or len(ids) + more > self.context:
            raise LabkitError(
                f"{len(ids)} tokens and {more} new ones were asked for; this model's context is {self.context} tokens."
            )
        return ids.astype(np.int32)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits for every position, (T, V) float32; row i predicts token i + 1. State starts empty."""
        ids = self._check(tokens)
        output = np.asarray(self._generator(ids, 0).get_output("logits"))
        return np.array(output[0, :, : self.vocab_size], dtype=np.float32)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Process tokens from an empty state and give the last position's logits, (V,) float32."""
        ids = self._check(tokens)
        return np.array(self._generator(ids, 0).get_logits(), dtype=np.float32).reshape(-1)[-self.vocab_size :]

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy continuation: exactly `max_new` ids (end-of-text does not stop it), from an empty state."""
        ids = self._check(tokens, max_new)
        return self._generate(ids, max_new)

    def _generate(self, ids: np.ndarray, max_new: int) -> Iterator[int]:
        if max_new < 1:
            return
        generator = self._generator(ids, max_new)
        for _ in range(max_new):
            if self._model is None:
                raise LabkitError("This runner was closed during a generation; load the artifact again.")
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        self._model = None

    def __enter__(self) -> GenaiRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
