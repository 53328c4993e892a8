"""Runs in a child process: what needs torch, transformers or a whole graph in memory. One JSON job on the command line.

Started as a script with `python -P` (this folder must not be on the module path: `onnxruntime.py` lies in it).
Steps: build (onnxruntime-genai's model builder), nbits (weights of a float32 graph to MatMulNBits), dynamic (int8
weights, activations quantized while running), half (float16 storage), olive (its command line).
"""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens"


def adapt_builder() -> Any:
    """The model builder's module, made to read configurations as transformers 5 gives them."""
    import onnxruntime_genai.models  # noqa: F401  (puts the builder's folder on the module path)
    from builders import base, gemma
    from onnxruntime_genai.models import builder

    real = base.AutoConfig

    class AutoConfig:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return adapt_config(real.from_pretrained(*args, **kwargs))

    base.AutoConfig = builder.AutoConfig = AutoConfig
    scale_exactly(gemma.GemmaModel)
    keep_tokenizer(base.Model)
    return builder


def adapt_config(config: Any) -> Any:
    """Rope settings under the names the builder looks for; they moved into `rope_parameters` in transformers 5."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "short_factor" in rope:
        rope.setdefault("type", rope["rope_type"])
    if "sliding_attention" in rope:  # Gemma 3: one base for the local layers, one for the others
        local, everywhere = rope["sliding_attention"], rope["full_attention"]
        kinds = ("full_attention", "sliding_attention")
        if list(config.layer_types) != [kinds[(i + 1) % 6 > 0] for i in range(len(config.layer_types))]:
            raise NotImplementedError("the model builder expects global attention in every sixth layer only")
        scaling = {k: v for k, v in everywhere.items() if k != "rope_theta"}
        config.rope_scaling = scaling if "factor" in everywhere else None
        config.rope_theta, config.rope_local_base_freq = everywhere["rope_theta"], local["rope_theta"]
    return config


def scale_exactly(gemma: Any) -> None:
    """The builder rounds Gemma's embedding scale to two decimals, which moves the logits; keep all of it."""
    made = gemma.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.embed_attrs["scale"] = math.sqrt(self.hidden_size)

    gemma.__init__ = init


def keep_tokenizer(model: Any) -> None:
    """When transformers cannot rewrite the tokenizer, copy the checkpoint's own files."""
    rewrite = model.save_processing

    def save(self: Any, source: str, extra: Any, out: str) -> None:
        try:
            rewrite(self, source, extra, out)
        except Exception as error:  # many kinds, none of them touches the graph
            print(f"The tokenizer files are copied unchanged: {error}")
            for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "*.model"):
                for file in Path(source).glob(pattern):
                    shutil.copy(file, out)

    model.save_processing = save


def build(source: str, out: str, precision: str, cache: str, options: dict[str, Any]) -> None:
    """Checkpoint folder -> GenAI folder. `options` are the builder's extra options."""
    safe = {"hf_token": "false", "hf_remote": False}  # nothing from the repository is executed
    adapt_builder().create_model(None, source, out, precision, "cpu", cache, **safe, **options)


def nbits(
    source: str, out: str, bits: int, block_size: int, symmetric: bool, accuracy_level: int, algorithm: str, share: bool
) -> None:
    """float32 graph -> the same graph with constant MatMuls as MatMulNBits; `share`: the embedding reads the head's."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

    hqq = HQQWeightOnlyQuantConfig(block_size=block_size, bits=bits) if algorithm == "hqq" else None
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=block_size, is_symmetric=symmetric, accuracy_level=accuracy_level,
        algo_config=hqq,
    )  # fmt: skip
    quantizer.process()
    model = quantizer.model.model
    if share:
        share_embedding(model)
    save(model, out)


def share_embedding(model: Any) -> None:
    """Let the embedding look up rows of the quantized head instead of keeping a float copy of the same matrix."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    head = next(n for n in graph.node if n.name.startswith(HEAD) and n.op_type == "MatMulNBits")
    gather = next(n for n in graph.node if n.name == f"{EMBEDDING}/Gather")
    turned = next(n for n in graph.node if n.name == f"{EMBEDDING}/Transpose")
    facts = {a.name: a.i for a in head.attribute}
    weight, scales, *zeros = head.input[1:]
    shape = numpy_helper.from_array(np.array([facts["N"], facts["K"] * facts["bits"] // 8]), f"{EMBEDDING}/shape")
    reshape = helper.make_node("Reshape", [weight, shape.name], [f"{EMBEDDING}/rows"], name=f"{EMBEDDING}/Reshape")
    lookup = helper.make_node(
        "GatherBlockQuantized", [f"{EMBEDDING}/rows", gather.input[1], scales, *zeros], list(gather.output),
        name=f"{EMBEDDING}/GatherBlockQuantized", domain="com.microsoft", bits=facts["bits"],
        block_size=facts["block_size"], gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    kept = [n for n in graph.node if n.name not in (gather.name, turned.name)]
    del graph.node[:]
    graph.node.extend([reshape, lookup, *kept])
    unused = next(i for i in graph.initializer if i.name == turned.input[0])
    graph.initializer.remove(unused)
    graph.initializer.append(shape)


def dynamic(source: str, out: str, per_channel: bool, reduce_range: bool) -> None:
    """float32 graph -> int8 weights; activations are quantized while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, out, weight_type=QuantType.QInt8, per_channel=per_channel, reduce_range=reduce_range,
        use_external_data_format=True,
    )  # fmt: skip


def half(source: str, out: str) -> None:
    """float32 graph -> the same graph with its matrices stored as float16 and widened by a Cast when they are read."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        matrix = len(tensor.dims) > 1 and "_cache" not in tensor.name  # rotary tables stay exact
        if tensor.data_type != onnx.TensorProto.FLOAT or not matrix:
            continue
        name = tensor.name
        values = numpy_helper.to_array(tensor)
        limit = np.finfo(np.float16).max
        if np.abs(values).max(initial=0) > limit:
            raise ValueError(f"{name} holds weights beyond {limit:.0f}, which float16 cannot store")
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        widen = {"name": f"{name}/widen", "to": onnx.TensorProto.FLOAT}
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], **widen))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save(model, out)


def save(model: Any, out: str) -> None:
    """Graph and weights in two files; short constants stay in the graph, where shapes must be read from."""
    import onnx

    onnx.save_model(model, out, save_as_external_data=True, location=f"{Path(out).name}.data", size_threshold=256)


def olive(arguments: list[str]) -> None:
    """Olive's command line, with the model builder it calls adapted as above."""
    adapt_builder()
    sys.argv = ["olive", *arguments]
    runpy.run_module("olive", run_name="__main__")


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    {"build": build, "nbits": nbits, "dynamic": dynamic, "half": half, "olive": olive}[job.pop("step")](**job)
