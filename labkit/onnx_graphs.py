"""ONNX graphs opened by ONNX Runtime itself, below GenAI: sessions, levels of optimization, providers.

The graphs are those of the onnxruntime engine: inputs `input_ids` and `attention_mask` (1, T) int64 and the empty or filled
cache of every layer; outputs `logits` (1, T, V) and the cache, longer by T.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.measure.scoring import log_sum_exp, nll
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
# Provider -> (device, what brings it). Names are ONNX Runtime's.
PROVIDERS = {
    "CPUExecutionProvider": ("any CPU", "onnxruntime"),
    "CUDAExecutionProvider": ("NVIDIA GPU", "onnxruntime-gpu"),
    "NvTensorRTRTXExecutionProvider": ("NVIDIA RTX GPU", "a plug-in for Windows ML and Linux"),
    "DmlExecutionProvider": ("any GPU on Windows (DirectX 12)", "onnxruntime-directml"),
    "WebGpuExecutionProvider": ("any GPU with Vulkan, Metal or DirectX 12", "onnxruntime-webgpu, or a browser"),
    "QNNExecutionProvider": ("Qualcomm NPU", "onnxruntime-qnn"),
    "OpenVINOExecutionProvider": ("Intel CPU, GPU, NPU", "onnxruntime-openvino"),
    "CoreMLExecutionProvider": ("Apple GPU and neural engine", "onnxruntime on a Mac"),
    "VitisAIExecutionProvider": ("AMD NPU", "the vendor's installer"),
    "AzureExecutionProvider": ("a model behind a URL, not a device", "onnxruntime"),
}


def read(graph: str | Path, *, weights: bool = False) -> Any:
    """The ModelProto of a file; with `weights`, the data beside it are loaded too."""
    import onnx

    try:
        return onnx.load(str(graph), load_external_data=weights)
    except OSError as error:
        raise LabkitError(f"{graph} cannot be read as ONNX ({error}); expected an .onnx file.") from None


def session(graph: str | Path | Any, level: str = "all", *, threads: int = 0, save: str | Path | None = None) -> Any:
    """An InferenceSession on the CPU of a file or a ModelProto. `save`: where the optimized graph is written."""
    import onnxruntime

    if level not in LEVELS:
        raise LabkitError(f"level={level!r} was given; expected one of {', '.join(LEVELS)}.")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if save:
        options.optimized_model_filepath = str(save)
    source = str(graph) if isinstance(graph, (str, Path)) else graph.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feed(opened: Any, tokens: Sequence[int], cache: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """All inputs for `tokens` after the positions in `cache` (past name -> (1, KV heads, P, D)); without one, from the start."""
    past = dict(cache or {})
    for item in opened.get_inputs():
        if item.name.startswith("past") and item.name not in past:
            past[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    before = next(iter(past.values())).shape[2] if past else 0
    mask = np.ones((1, before + len(tokens)), np.int64)
    return {"input_ids": np.array([tokens], np.int64), "attention_mask": mask, **past}


def logits(opened: Any, tokens: Sequence[int]) -> np.ndarray:
    """(T, V) float32 from an empty cache."""
    return opened.run(None, feed(opened, tokens))[0][0]  # by place: some tools rename the logits


def stepper(opened: Any) -> Callable[[Sequence[int]], np.ndarray]:
    """A function that reads some more tokens and gives the last position's logits (V,); it keeps the cache between calls."""
    names = [item.name for item in opened.get_outputs()]
    state: dict[str, np.ndarray] = {}

    def step(tokens: Sequence[int]) -> np.ndarray:
        made = dict(zip(names, opened.run(None, feed(opened, tokens, state)), strict=True))
        state.update({n.replace("present", "past_key_values"): v for n, v in made.items() if n.startswith("present")})
        return made[names[0]][0, -1]

    return step


def perplexity(opened: Any, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log likelihood of every token of the windows but their first."""
    losses = [nll(logits(opened, window)[:-1], np.asarray(window[1:])) for window in windows]
    return float(np.exp(np.concatenate(losses).mean()))


def divergence(opened: Any, reference: Any, windows: Sequence[Sequence[int]]) -> float:
    """Mean KL in nats a token of one session's distributions from the reference's, over all positions of the windows."""
    total = []
    for window in windows:
        rows = [logits(one, window).astype(np.float64) for one in (reference, opened)]
        p, q = (one - log_sum_exp(one)[:, None] for one in rows)
        total.append((np.exp(p) * (p - q)).sum(axis=1))
    return float(np.concatenate(total).mean())


def operators(graph: str | Path | Any, level: str | None = None) -> Counter[str]:
    """How often each operator stands in a graph: as stored, or as ONNX Runtime rewrites it at a level for this machine."""
    if level is None:
        model = read(graph) if isinstance(graph, (str, Path)) else graph
        return Counter(node.op_type for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(graph, level, save=path)
        return operators(path)


def providers() -> pd.DataFrame:
    """Provider, device, what brings it, whether this ONNX Runtime has it, and whether this GenAI was made for it."""
    import onnxruntime
    import onnxruntime_genai as genai
    import pandas as pd

    asked = {"CUDA": "is_cuda_available", "Dml": "is_dml_available", "OpenVINO": "is_openvino_available",
             "QNN": "is_qnn_available", "WebGpu": "is_webgpu_available"}  # fmt: skip
    usable = {f"{name}ExecutionProvider": getattr(genai, test)() for name, test in asked.items()}
    usable["CPUExecutionProvider"] = True
    found = onnxruntime.get_available_providers()
    rows = [
        {"provider": name.removesuffix("ExecutionProvider"), "device": device, "comes with": package,
         "ONNX Runtime here": name in found, "GenAI knows it": usable.get(name, False)}
        for name, (device, package) in PROVIDERS.items()
    ]  # fmt: skip
    rows += [{"provider": n.removesuffix("ExecutionProvider"), "device": "not in this table", "comes with": "this build",
              "ONNX Runtime here": True, "GenAI knows it": False} for n in found if n not in PROVIDERS]  # fmt: skip
    return pd.DataFrame(rows)


def matmul(weights: np.ndarray) -> Any:
    """The smallest graph worth timing: x (rows, in) times a constant matrix, for weights (out, in). The node is called matmul."""
    from onnx import TensorProto, helper, numpy_helper

    out, inner = weights.shape
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width]) for n, width in (("x", inner), ("y", out))]
    stored = numpy_helper.from_array(np.ascontiguousarray(weights.T, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")], "one", ends[:1], ends[1:], [stored])
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=sets, producer_name="labkit")


def seconds(opened: Sequence[Any], inputs: Mapping[str, np.ndarray], rounds: int = 7, least: float = 0.02) -> np.ndarray:
    """Seconds a run of each session, (sessions, rounds), taken in turns, each value a mean over at least `least` seconds."""
    found = np.empty((len(opened), rounds))
    for one in opened:
        one.run(None, dict(inputs))  # warm-up
    for number in range(rounds):
        for i in range(len(opened)) if number % 2 else reversed(range(len(opened))):
            count, began = 0, time.perf_counter()
            while (gone := time.perf_counter() - began) < least or not count:
                opened[i].run(None, dict(inputs))
                count += 1
            found[i, number] = gone / count
    return found


def plain_feed_forward(weights: Mapping[str, np.ndarray], eps: float) -> Any:
    """A Llama feed-forward in ONNX's own operators only, as an exporter writes it: a ModelProto, x (1, T, hidden) -> y.

    `weights`: norm (hidden,), gate and up (inner, hidden), down (hidden, inner), after (hidden,): the norm that follows.
    Everything is small steps: a norm is six nodes, an activation two, and constants are computed from constants.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    stored = {f"{n}.weight": np.ascontiguousarray(w.T if w.ndim == 2 else w, dtype=np.float32) for n, w in weights.items()}
    stored |= {"two": np.float32([2.0]), "eps.half": np.float32([eps / 2]), "one": np.float32([1.0])}

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def norm(x: str, name: str) -> str:
        square = node("Pow", [x, "two"], f"{name}.square")
        mean = node("ReduceMean", [square], f"{name}.mean", axes=[-1], keepdims=1)
        root = node("Sqrt", [node("Add", [mean, "eps"], f"{name}.sum")], f"{name}.root")
        scaled = node("Mul", [x, node("Div", ["one", root], f"{name}.inverse")], f"{name}.scaled")
        return node("Mul", [f"{name}.weight", scaled], f"{name}.out")

    node("Mul", ["eps.half", "two"], "eps")  # a constant that waits to be folded
    x = norm("x", "norm")
    gate, up = node("MatMul", [x, "gate.weight"], "gate"), node("MatMul", [x, "up.weight"], "up")
    activated = node("Mul", [gate, node("Sigmoid", [gate], "gate.sigmoid")], "gate.silu")
    down = node("MatMul", [node("Mul", [activated, up], "product"), "down.weight"], "down")
    node("Identity", [norm(node("Add", ["x", down], "flow"), "after")], "y")
    hidden = len(weights["norm"])
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "T", hidden]) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(v, n) for n, v in stored.items()]
    graph = helper.make_graph(nodes, "feed_forward", io[:1], io[1:], tensors)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="labkit")
