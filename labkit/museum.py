"""The failure museum: good artifacts of the house model broken on purpose, each in one way that happened elsewhere.

Every maker takes a good file and writes the broken one; nothing else in it changes. `plan` says what was broken and
where, for one seed, so that a check can judge a diagnosis; `hang` puts the broken GGUF files up under shuffled numbers.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from labkit._patches import beside, ir_tensor, patched, patched_ir, tensor_errors, values
from labkit.types import Artifact, LabkitError, Recipe

__all__ = [
    "GOOD", "Plan", "bf16_bits", "bf16_scales", "break_gguf", "calibration_set", "good", "hang", "hang_onnx",
    "hang_openvino", "ir_tensor", "mended", "patched", "plan", "shifted_norms", "starved_embedding", "stopwatch",
    "swapped_nibbles", "tensor_errors", "transposed_ir", "unpermuted_rope", "values", "with_arrays", "without_key", "wrong_axis",
]  # fmt: skip

MATRICES = ("ffn_up", "ffn_gate", "attn_output")  # their type is the file's own in every mixture used here
GOOD = {"nibbles": "q4_0", "scale": "q8_0", "rope": "f16", "norm": "f16", "embedding": "q8_0", "template": "f16", "pre": "f16"}
SQUARE = "model.layers.{layer}.self_attn.o_proj.weight"  # as many rows as columns
CONVERSATIONS, LEAKED = 120, (24, 72)  # texts in the calibration set; fewest and most that come from the evaluation


@dataclass(frozen=True)
class Plan:
    """What is broken in the museum of one seed. Reading it is looking at the answers."""

    order: tuple[str, ...]  # kinds in GOOD, in the order of the exhibits' numbers 1, 2, ...
    nibbles: str  # tensor whose nibbles are swapped
    scale: str  # tensor whose scales are of the wrong type
    transposed: int  # layer of the OpenVINO exhibit
    axis: int  # layer of the ONNX exhibit
    leaked: int  # evaluation texts that are also calibration texts

    def number(self, kind: str) -> int:
        return self.order.index(kind) + 1


@cache
def plan(seed: int = 0) -> Plan:
    """The plan of one seed: the same for the same seed, on every machine."""
    rng = Random(f"museum {seed}")
    order = tuple(rng.sample(sorted(GOOD), len(GOOD)))
    names = [f"blk.{layer}.{kind}.weight" for layer in range(6) for kind in MATRICES]
    nibbles, scale = rng.sample(names, 2)
    return Plan(order, nibbles, scale, rng.randrange(6), rng.randrange(6), rng.randint(*LEAKED))


def good(precision: str, engine: str = "llamacpp") -> Artifact:
    """The house model as it should be; built at most once."""
    from labkit.build import build

    return build("edgehome", Recipe(engine, precision))


def hang(folder: str | Path, seed: int = 0) -> dict[int, Artifact]:
    """Write the broken GGUF files, `folder`/exhibit-N/model.gguf, and return them as artifacts by number."""
    from labkit.engines.llamacpp import FILE, tensors

    found = {}
    for number, kind in enumerate(plan(seed).order, start=1):
        source, home = good(GOOD[kind]), Path(folder) / f"exhibit-{number}"
        home.mkdir(parents=True, exist_ok=True)
        break_gguf(kind, source.path / FILE, home / FILE, seed)
        size = sum(tensor["bytes"] for tensor in tensors(home / FILE))
        found[number] = _shown(source, home, size, exhibit=number)
    return found


def hang_openvino(folder: str | Path, seed: int = 0) -> Artifact:
    """The OpenVINO exhibit of a seed, written to `folder`."""
    return transposed_ir(good("f32", "openvino"), folder, plan(seed).transposed)


def hang_onnx(out: str | Path, seed: int = 0) -> tuple[Path, str]:
    """The ONNX exhibit of a seed, written to the file `out`, and the name of the matrix it holds."""
    from labkit.checkpoint import checkpoint

    name = SQUARE.format(layer=plan(seed).axis)
    return wrong_axis(checkpoint("edgehome").tensors()[name].float32(), Path(out)), name


def break_gguf(kind: str, source: Path, out: Path, seed: int = 0) -> Path:
    """Write to `out` the GGUF file `source` broken in the way `kind` (a key of GOOD). Error: an unknown kind."""
    broken = plan(seed)
    makers = {
        "nibbles": lambda: swapped_nibbles(source, out, broken.nibbles),
        "scale": lambda: bf16_scales(source, out, broken.scale),
        "rope": lambda: unpermuted_rope(source, out),
        "norm": lambda: shifted_norms(source, out),
        "embedding": lambda: starved_embedding(out),
        "template": lambda: without_key(source, out, "tokenizer.chat_template"),
        "pre": lambda: without_key(source, out, "tokenizer.ggml.pre"),
    }
    if kind not in makers:
        raise LabkitError(f"The museum has no {kind!r}; expected one of {', '.join(makers)}.")
    return makers[kind]()


# --- the makers: one way of breaking each ------------------------------------------------------------------------


def swapped_nibbles(source: Path, out: Path, tensor: str) -> Path:
    """Q4_0 blocks whose two codes a byte changed places: packed for a program that reads the high nibble first."""
    blocks = _blocks(source, tensor, "q4_0", 18)
    blocks[..., 2:] = (blocks[..., 2:] >> 4) | (blocks[..., 2:] << 4)
    return patched(source, out, {tensor: blocks})


def bf16_scales(source: Path, out: Path, tensor: str) -> Path:
    """Q8_0 blocks whose scale is stored as bfloat16, where every reader takes those 16 bits for float16."""
    blocks = _blocks(source, tensor, "q8_0", 34)
    half = bf16_bits(blocks[..., :2].copy().view("<f2").astype(np.float32))
    blocks[..., :2] = half.view(np.uint8)
    return patched(source, out, {tensor: blocks})


def bf16_bits(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers as bfloat16: the upper 16 bits, uint16, rounded to nearest with halves to even."""
    wide = np.ascontiguousarray(numbers, dtype="<f4").view("<u4")
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")


def unpermuted_rope(source: Path, out: Path) -> Path:
    """Query and key rows left in the checkpoint's order: the converter forgot that llama.cpp rotates neighbours."""
    from labkit.engines.llamacpp import metadata

    size = int(metadata(source)["llama.rope.dimension_count"])
    rows = {name: data for name, data in _stored(source).items() if name.endswith(("attn_q.weight", "attn_k.weight"))}
    halves = {name: data.reshape(-1, size // 2, 2, data.shape[-1]).swapaxes(1, 2) for name, data in rows.items()}
    return patched(source, out, halves)


def shifted_norms(source: Path, out: Path, by: float = 1.0) -> Path:
    """Every norm's weight plus one: Gemma's checkpoints store w and multiply by 1 + w, a Llama's store what it needs."""
    norms = {name: data + np.float32(by) for name, data in _stored(source).items() if name.endswith("norm.weight")}
    return patched(source, out, norms)


def starved_embedding(out: Path) -> Path:
    """Two bits for the embedding "because it is only looked up", in a model whose output layer is the same matrix."""
    from labkit.checkpoint import checkpoint
    from labkit.engines.llamacpp import write_gguf

    with beside(out) as partial:
        write_gguf(checkpoint("edgehome"), partial, GOOD["embedding"], embedding_type="q2_k", output_type="q2_k")
    return out


def without_key(source: Path, out: Path, key: str) -> Path:
    """A file written before its converter knew the metadata `key`: everything else is copied. Error: no such key."""
    import gguf
    from gguf.scripts.gguf_new_metadata import copy_with_new_metadata

    from labkit.engines.llamacpp import metadata

    if key not in metadata(source):
        raise LabkitError(f"{source} has no metadata {key!r} to leave out; see metadata(path) for its keys.")
    reader = gguf.GGUFReader(source)
    with beside(out) as partial, contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
        copy_with_new_metadata(reader, writer, {}, [key])
    return out


def transposed_ir(source: Artifact, folder: str | Path, layer: int) -> Artifact:
    """An OpenVINO artifact with one square matrix transposed: the shapes agree, so no check of shapes finds it."""
    from labkit.engines.openvino import MODEL

    name = SQUARE.format(layer=layer)
    return with_arrays(source, folder, {name: ir_tensor(source.path / MODEL, name).T})


def with_arrays(source: Artifact, folder: str | Path, arrays: Mapping[str, np.ndarray]) -> Artifact:
    """A copy of an OpenVINO artifact in `folder` with some float32 arrays replaced, as an artifact."""
    patched_ir(source.path, Path(folder), arrays)
    return _shown(source, Path(folder), source.weight_bytes, exhibit=Path(folder).name)


def wrong_axis(weight: np.ndarray, out: Path, axis: int = 0) -> Path:
    """An ONNX file x -> x @ W.T with int8 codes and one scale a column of W.T, applied along `axis` (right: 1)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    scales = (np.abs(weight).max(axis=1) / np.float32(127)).astype(np.float32)  # one an output channel
    codes = np.rint(weight / scales[:, None]).astype(np.int8).T
    rows, columns = codes.shape
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], name="dequantize", axis=axis),
            helper.make_node("MatMul", ["x", "weight"], ["y"], name="matmul"),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(np.ascontiguousarray(codes), "codes"), numpy_helper.from_array(scales, "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with beside(Path(out)) as partial:
        onnx.save(model, partial)
    return Path(out)


def calibration_set(seed: int = 0) -> tuple[list[str], list[str]]:
    """Calibration texts and evaluation texts (conversations); `plan(seed).leaked` of the latter are among the former.

    Every second leaked text went through another tool first, which changed its case and spaces.
    """
    from labkit import house
    from labkit.house.language import chatml

    rng, leaked = Random(f"leak {seed}"), plan(seed).leaked
    evaluation = [chatml(task.conversation()) for task in house.tasks("heldout", n=CONVERSATIONS, seed=101)]
    clean = [chatml(task.conversation()) for task in house.tasks("train", n=CONVERSATIONS - leaked, seed=102)]
    copies = [text if i % 2 else f"  {text.upper()}\n" for i, text in enumerate(rng.sample(evaluation, leaked))]
    calibration = clean + copies
    rng.shuffle(calibration)
    return calibration, evaluation


def stopwatch(artifact: Artifact, prompt: list[int], new: int = 32) -> dict[str, Any]:
    """Time one generation as a hurried person does: from before loading to the last token, once.

    `stamps`: seconds from the start at which each token came; `loaded`: at which the model was open.
    """
    from labkit.build import load

    start = time.perf_counter()
    with load(artifact) as runner:
        loaded = time.perf_counter() - start
        stamps = [time.perf_counter() - start for _ in runner.generate(prompt, new)]
    return {"tokens_per_second": new / stamps[-1], "loaded": loaded, "stamps": stamps}


def mended(exhibits: Mapping[int, Artifact], diagnosis: Mapping[str, Any]) -> Artifact | None:
    """The exhibit with the tensors of the diagnosis' "data" put in; None while the diagnosis is unfinished."""
    from labkit.engines.llamacpp import FILE

    number, data = diagnosis["exhibit"], diagnosis["data"]
    if number is ... or data is ...:
        return None
    if number not in exhibits:
        raise LabkitError(f"There is no exhibit {number}; the hall has {', '.join(map(str, exhibits))}.")
    source = exhibits[number]
    home = source.path.with_name(f"{source.path.name}-mended")
    home.mkdir(exist_ok=True)
    patched(source.path / FILE, home / FILE, data)
    return _shown(source, home, source.weight_bytes, **source.recipe.options, mended=True)


def _shown(source: Artifact, folder: Path, size: int, **options: Any) -> Artifact:
    """The artifact a broken copy is measured as."""
    recipe = Recipe(source.recipe.engine, source.recipe.precision, **options)
    return replace(source, path=folder, recipe=recipe, weight_bytes=size, bits_per_weight=8 * size / source.weights, notes=())


def _stored(path: Path) -> dict[str, np.ndarray]:
    import gguf

    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def _blocks(path: Path, tensor: str, kind: str, size: int) -> np.ndarray:
    """A tensor's bytes as (rows, blocks, bytes of a block), to be changed. Error: it is of another type."""
    from labkit.engines.llamacpp import tensor_data, tensors

    found = {one["name"]: one["type"] for one in tensors(path)}
    if found.get(tensor) != kind:
        raise LabkitError(f"{tensor} in {path} is {found.get(tensor, 'absent')}; expected {kind}: take another tensor.")
    data = tensor_data(path, tensor)
    return np.array(data).reshape(len(data), -1, size)
