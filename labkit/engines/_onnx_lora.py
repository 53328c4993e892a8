"""LoRA adapters in ONNX Runtime's words: a graph that takes them as optional inputs, their files, a runner that switches.

Beside each adapted matrix the graph gets two more, A (in, lora_r) and B (lora_r, out), whose product is added to its output.
They are inputs that may be left out: their defaults have lora_r = 0, an empty sum. Names are those of Olive's `generate-adapter`
and `convert-adapters`, so that its files fit this graph and ours fit its.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from labkit._files import need_space, written_beside
from labkit.engines._genai import EXACT, LOG, MODEL, GenaiRunner, read_graph, write_exact
from labkit.types import LabkitError

FUSED = ("q_proj", "k_proj", "v_proj")  # stored as one matrix in the graph; each takes an adapter of its own
RANK = "lora_r"


def write(adapter: Any, path: Path) -> Path:
    """`adapter` (labkit.adapters.Adapter) as an .onnx_adapter file: A turned, B turned and scaled."""
    import onnxruntime

    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in parameters(adapter).items()}
    made = onnxruntime.AdapterFormat()
    made.set_parameters(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        made.export_adapter(str(new))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def parameters(adapter: Any) -> dict[str, np.ndarray]:
    """Input name -> float32 array, (in, rank) and (rank, out); the scale is in B."""
    found = {}
    for layer, (a, b) in adapter.layers.items():
        found[f"{layer}.lora_A.weight"] = np.ascontiguousarray(a.T)
        found[f"{layer}.lora_B.weight"] = np.ascontiguousarray(b.T * np.float32(adapter.scale))
    return found


def adaptable(source: Path, folder: Path, adapter: Any, *, stored: bool = False) -> Path:
    """Copy a GenAI folder to `folder` with a graph that takes adapters of any rank on the layers of `adapter`, or stores it."""
    import onnx

    model = read_graph(source / MODEL)
    _extend(model, {layer: (a, b * np.float32(adapter.scale)) for layer, (a, b) in adapter.layers.items()}, inputs=not stored)
    need_space(folder.parent, sum(f.stat().st_size for f in source.rglob("*") if f.is_file()), f"Copying {source.name}")
    with written_beside(folder) as new:  # copied, not linked: the onnx package refuses weights that have a second name
        shutil.copytree(source, new, ignore=shutil.ignore_patterns(MODEL, EXACT, LOG), dirs_exist_ok=True)
        onnx.save_model(model, str(new / MODEL))
        write_exact(new)
    return folder


def _extend(model: Any, layers: Mapping[str, tuple[np.ndarray, np.ndarray]], *, inputs: bool) -> None:
    """Add A and scaled B of `layers` to a graph read without its weights, in place: as optional inputs or as stored weights."""
    nodes, order = {node.name: node for node in model.graph.node}, list(model.graph.node)
    for at, members in _places(nodes, layers):
        node = nodes[at]
        after = order.index(node) + 1
        order[after:after] = list(_branches(model.graph, node, members, layers, inputs))
    del model.graph.node[:]
    model.graph.node.extend(order)


def _places(nodes: Mapping[str, Any], layers: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Name of the node that multiplies by a matrix -> the layers whose outputs it gives, in order."""
    done: set[str] = set()
    for layer in layers:
        stem, _, last = _path(layer).replace("self_attn", "attn").rpartition("/")
        fused = last in FUSED
        name = f"{stem}/{'qkv_proj' if fused else last}/MatMul"
        found = [n for n in nodes if n == name or n.startswith(f"{name}_Q")]
        if not found:
            raise LabkitError(f"The graph has no matrix for {layer} (looked for {name}); the adapter is for another base.")
        if found[0] not in done:
            done.add(found[0])
            first = layer.rpartition(".")[0]
            yield found[0], [f"{first}.{one}" for one in FUSED] if fused else [layer]


def _path(layer: str) -> str:
    """model.layers.0.mlp.up_proj as nodes are named: /model/layers.0/mlp/up_proj."""
    return "/" + layer.replace(".", "/").replace("/layers/", "/layers.")


def _branches(graph: Any, node: Any, members: list[str], layers: Mapping[str, Any], inputs: bool) -> Iterator[Any]:
    from onnx import helper

    output, base = node.output[0], f"{node.output[0]}/base"
    node.output[0] = base
    made = []
    for layer in members:
        at = _path(layer)
        a, b = (_matrix(graph, layer, kind, layers, node, inputs) for kind in "AB")
        yield helper.make_node("MatMul", [node.input[0], a], [f"{at}/lora_A/output_0"], name=f"{at}/lora_A/MatMul")
        yield helper.make_node("MatMul", [f"{at}/lora_A/output_0", b], [f"{at}/lora_B/output_0"], name=f"{at}/lora_B/MatMul")
        made.append(f"{at}/lora_B/output_0")
    if len(made) > 1:
        yield helper.make_node("Concat", made, [f"{output}/lora"], name=f"{node.name}/lora/Concat", axis=-1)
        made = [f"{output}/lora"]
    yield helper.make_node("Add", [base, made[0]], [output], name=f"{node.name}/lora/Add")


def _matrix(graph: Any, layer: str, kind: str, layers: Mapping[str, Any], node: Any, inputs: bool) -> str:
    """Declare A (in, lora_r) or B (lora_r, out) of a layer; the name."""
    from onnx import helper, numpy_helper

    name = f"{layer}.lora_{kind}.weight"
    pair = layers.get(layer)
    if pair is None:  # a neighbour in the fused matrix: known by the others' input and the graph's own shape
        pair = np.zeros((0, _inner(layers, layer)), np.float32), np.zeros((_outer(graph, node, layers, layer), 0), np.float32)
    value = pair[0].T if kind == "A" else pair[1].T
    shape = [value.shape[0], RANK] if kind == "A" else [RANK, value.shape[1]]
    if inputs:
        graph.input.append(helper.make_tensor_value_info(name, 1, shape))
        value = np.zeros([0 if n == RANK else n for n in shape], np.float32)
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def _inner(layers: Mapping[str, Any], layer: str) -> int:
    first = layer.rpartition(".")[0]
    return next(layers[f"{first}.{one}"][0].shape[1] for one in FUSED if f"{first}.{one}" in layers)


def _outer(graph: Any, node: Any, layers: Mapping[str, Any], layer: str) -> int:
    """Rows of a projection that has no adapter: keys and values are as wide as the cache, queries take the rest."""
    cache = next(item.type.tensor_type.shape.dim for item in graph.input if item.name.startswith("past_key_values"))
    narrow = cache[1].dim_value * cache[3].dim_value
    if not layer.endswith("q_proj"):
        return narrow
    total = next(v.type.tensor_type.shape.dim[2].dim_value for v in graph.value_info if v.name == node.output[0].removesuffix("/base"))
    return total - 2 * narrow


class AdaptedGenai(GenaiRunner):
    """A GenaiRunner whose generators start with an adapter."""

    def __init__(self, folder: Path, adapters: Mapping[str, Any], **settings: Any):
        self._scratch = tempfile.TemporaryDirectory(prefix="labkit-adapters-")
        self._used: str | None = None
        place = Path(self._scratch.name)
        layers: dict[str, Any] = {}
        for adapter in adapters.values():  # a graph for the layers of all of them; ranks may differ
            layers |= adapter.layers
        try:
            every = replace(next(iter(adapters.values())), layers=layers)
            super().__init__(adaptable(folder, place / "model", every), **settings)
            self._adapters, self._names = self._genai.Adapters(self._model), tuple(adapters)
            for number, (name, adapter) in enumerate(adapters.items()):
                self._adapters.load(str(write(adapter, place / f"{number}.onnx_adapter")), name)
        except BaseException:
            self._scratch.cleanup()
            raise

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone."""
        from labkit.adapters import chosen

        self._used = chosen(name, self._names)

    def _begin(self, generator: Any) -> None:
        if self._used is not None:
            generator.set_active_adapter(self._adapters, self._used)

    def close(self) -> None:
        """Free the memory and the scratch folder. Safe to call twice."""
        self._adapters = None
        super().close()
        self._scratch.cleanup()
