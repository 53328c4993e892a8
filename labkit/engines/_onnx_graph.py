"""A decoder-only transformer as an ONNX Runtime GenAI folder, straight from safetensors and without torch.

The graph is the one that onnxruntime-genai's model builder makes for the CPU: the same operators, names and stored
bytes, except that cosines and sines are correctly rounded. Its attention operator turns queries and keys itself, so the
inputs are only `input_ids`, `attention_mask` (B, T) and the cache of every layer, (B, KV heads, positions, head size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit._shapes import family, heads, slides, tied
from labkit.engines._onnx_nodes import CONTRIB, Nodes, value
from labkit.engines._onnx_weights import Blocks, Data, Rows
from labkit.engines._rope import turns
from labkit.types import LabkitError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
EMBEDDING, HEAD = "/model/embed_tokens", "/lm_head/MatMul"
CHUNK = 4096  # positions whose cosines are computed at once


@dataclass(frozen=True)
class Storage:
    """How the matrices of a graph are stored: floats, or blocks with the head in `head` blocks."""

    shared: bool  # the embedding reads the head's matrix
    dtype: str = "f4"  # of float matrices; "f2" is widened where it is read
    blocks: Blocks | None = None
    head: Blocks | None = None


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why labkit cannot write the graph of this config.json; None when it can."""
    if family(config) not in FAMILIES:
        return f"its family is none of {', '.join(FAMILIES)}"
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        return "its logits are soft-capped"
    if _activation(config) not in ACTIVATIONS:
        return f"its activation is {_activation(config)}"
    try:
        turns(config, 0)
    except LabkitError as error:
        return str(error)
    return None


def write_graph(config: Mapping[str, Any], tensors: Mapping[str, Any], path: Path, storage: Storage) -> None:
    """Write the graph at `path` and its weights at `path`.data; memory does not grow with the model."""
    import onnx

    data = Data(f"{path.name}.data")
    model = _Decoder(config, tensors, storage, data).model()
    data.write(path.with_name(data.location))
    onnx.save_model(model, str(path))


def _activation(config: Mapping[str, Any]) -> str:
    return config.get("hidden_activation") or config.get("hidden_act") or "silu"


class _Decoder(Nodes):
    """Builds one graph, node by node. Names are the model builder's, so that both graphs can be compared."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Any], storage: Storage, data: Data):
        self.config, self.tensors, self.storage, self.data = config, tensors, storage, data
        self.layers, self.hidden, self.vocab = (
            config["num_hidden_layers"], config["hidden_size"], config["vocab_size"],
        )  # fmt: skip
        self.heads, self.kv_heads, self.head_dim = heads(config)
        self.wide, self.narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.gemma = family(config) == "gemma3"
        self.eps = config.get("rms_norm_eps", 1e-5 if family(config) == "phi3" else 1e-6)
        super().__init__()

    def model(self) -> Any:
        self.mask()
        flow = self.embedding()  # what the layers add to
        added = None  # output of the last attention or MLP, not yet added
        for layer in range(self.layers):
            flow, added = self.layer(layer, flow, added)
        out, _ = self.skip_norm(f"layers.{self.layers}/final_norm_layernorm", flow, added, "model.norm.weight", True)
        self.matmul(HEAD, out, self.head(), self.storage.head, output="logits")
        caches = [f"past_key_values.{i}.{kind}" for kind in ("key", "value") for i in range(self.layers)]
        inputs = [value(n, 7, ["batch_size", length]) for n, length in (
            ("input_ids", "sequence_length"), ("attention_mask", "total_sequence_length"))]  # fmt: skip
        outputs = [value("logits", 1, ["batch_size", "sequence_length", self.vocab])]
        for name in caches:
            shape = ["batch_size", self.kv_heads, "past_sequence_length", self.head_dim]
            inputs.append(value(name, 1, shape))
            shape[2] = "total_sequence_length"
            outputs.append(value(name.replace("past_key_values", "present"), 1, shape))
        return self.finish(inputs, outputs, self.data.tensors)

    def mask(self) -> None:
        """Positions before the last token of each sequence, and of the longest, both as int32."""
        total = self.node("ReduceSum", f"{MASK}/ReduceSum", ["attention_mask", self.constant([1])], keepdims=0)
        last = self.node("Sub", f"{MASK}/Sub", [total, self.constant([1])])
        self.seen = self.node("Cast", f"{MASK}/Sub/Cast", [last], to=6)
        shape = self.node("Shape", f"{MASK}/Shape", ["attention_mask"])
        self.length = self.node("Gather", f"{MASK}/Gather", [shape, self.constant(1)], axis=0)
        self.longest = self.node("Cast", f"{MASK}/Gather/Cast", [self.length], to=6)

    def head(self) -> Rows:
        own = "lm_head.weight" in self.tensors and not tied(self.config)
        return Rows.of(self.tensors["lm_head.weight" if own else "model.embed_tokens.weight"])

    def embedding(self) -> str:
        how = self.storage.head
        if self.storage.shared and how:
            x = self.quantized_lookup(how)
        elif self.storage.shared:
            turned = self.float_matrix("lm_head.MatMul.weight", self.head(), turned=True)
            table = self.node("Transpose", f"{EMBEDDING}/Transpose", [turned], perm=[1, 0])
            x = self.node("Gather", f"{EMBEDDING}/Gather", [table, "input_ids"], width=self.hidden)
        else:
            rows = Rows.of(self.tensors["model.embed_tokens.weight"])
            table = self.float_matrix("model.embed_tokens.weight", rows, turned=False)
            x = self.node("Gather", f"{EMBEDDING}/Gather", [table, "input_ids"], width=self.hidden)
        if self.gemma:
            scale = self.constant(math.sqrt(self.hidden), "FLOAT")
            x = self.node("Mul", f"{EMBEDDING}/Mul", [x, scale], width=self.hidden)
        return x

    def quantized_lookup(self, how: Blocks) -> str:
        """Rows of the quantized head as embeddings; codes are (V, bytes of a row) here."""
        codes, scales, *zeros = how.names("lm_head.MatMul.weight")
        shape, rows = [self.vocab, self.hidden * how.bits // 8], None
        if how.algorithm == "rtn":
            shape = self.constant(shape)
        else:  # named as in `share_embedding`, which does this to graphs of the C++ kernel
            shape = self.data.inline(f"{EMBEDDING}/shape", np.array(shape, dtype=np.int64))
            rows = [f"{EMBEDDING}/rows"]
        table = self.node("Reshape", f"{EMBEDDING}/Reshape", [codes, shape], rows)
        return self.node(
            "GatherBlockQuantized", f"{EMBEDDING}/GatherBlockQuantized", [table, "input_ids", scales, *zeros],
            [f"{EMBEDDING}/{'GatherBlockQuantized' if how.algorithm == 'rtn' else 'Gather'}/output_0"], CONTRIB,
            self.hidden, bits=how.bits, block_size=how.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def layer(self, layer: int, flow: str, added: str | None) -> tuple[str, str]:
        at, stored = f"layers.{layer}", f"model.layers.{layer}."
        if added is None:
            x = self.norm(f"{at}/input_layernorm", flow, f"{stored}input_layernorm.weight")
        else:
            x, flow = self.skip_norm(f"{at}/input_layernorm", flow, added, f"{stored}input_layernorm.weight")
        added = self.attention(layer, x)
        if self.gemma:
            name = "post_attention_layernorm"
            added = self.norm(f"{at}/{name}", added, f"{stored}{name}.weight")
        before = "pre_feedforward_layernorm" if self.gemma else "post_attention_layernorm"
        x, flow = self.skip_norm(f"{at}/{before}", flow, added, f"{stored}{before}.weight")
        added = self.mlp(layer, x)
        if self.gemma:
            name = "post_feedforward_layernorm"
            added = self.norm(f"{at}/{name}", added, f"{stored}{name}.weight")
        return flow, added

    def gain(self, name: str, stored: str) -> str:
        """The weights of a norm; Gemma stores them less one."""
        values = self.tensors[stored].float32()
        return self.data.array(name, values + np.float32(1) if self.gemma else values)

    def norm(self, name: str, x: str, stored: str) -> str:
        gain = self.gain(f"model.{name.replace('/', '.')}.weight", stored)
        return self.node(
            "SimplifiedLayerNormalization", f"/model/{name}/LayerNorm", [x, gain], [f"/model/{name}/output_0"],
            width=self.hidden, epsilon=self.eps, axis=-1, stash_type=1,
        )  # fmt: skip

    def skip_norm(self, name: str, flow: str, added: str, stored: str, last: bool = False) -> tuple[str, str]:
        """The norm of `flow + added`, and that sum."""
        gain = self.gain(f"model.{name.replace('/', '.')}.weight", stored)
        outputs = [f"/model/{name}/output_0"] + ([] if last else ["", "", f"/model/{name}/output_3"])
        self.node(
            "SkipSimplifiedLayerNormalization", f"/model/{name}/SkipLayerNorm", [flow, added, gain], outputs, CONTRIB,
            self.hidden, epsilon=self.eps,
        )  # fmt: skip
        if not last:
            self.declare(outputs[-1], self.hidden)
        return outputs[0], outputs[-1]

    def attention(self, layer: int, x: str) -> str:
        at, stored = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn."
        fused = f"{stored}qkv_proj.weight" in self.tensors  # as Phi-3 stores them
        names = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
        rows = Rows.of(*(self.tensors[f"{stored}{n}.weight"] for n in names))
        q = self.bias(f"{at}/qkv_proj", self.linear(f"{at}/qkv_proj", x, rows), [f"{stored}{n}" for n in names])
        k = v = ""
        if f"{stored}q_norm.weight" in self.tensors:
            sizes = self.constant([self.wide, self.narrow, self.narrow])
            parts = [f"{at}/qkv_proj/Split/output_{i}" for i in range(3)]
            self.node("Split", f"{at}/qkv_proj/Split", [q, sizes], parts, axis=-1)
            for part, width in zip(parts, (self.wide, self.narrow, self.narrow), strict=True):
                self.declare(part, width)
            q = self.head_norm(layer, "q_norm", parts[0], self.wide)
            k, v = self.head_norm(layer, "k_norm", parts[1], self.narrow), parts[2]
        size = (self.config.get("query_pre_attn_scalar") or 256) if self.gemma else self.head_dim
        window = self.window(layer)
        facts = {} if window is None else {"local_window_size": window}
        past, present = ([f"{n}.{layer}.{kind}" for kind in ("key", "value")] for n in ("past_key_values", "present"))
        y = self.node(
            "GroupQueryAttention", f"{at}/GroupQueryAttention",
            [q, k, v, *past, self.seen, self.longest, *self.tables(layer), "", "", ""],
            [f"{at}/GroupQueryAttention/output_0", *present], CONTRIB, self.wide, num_heads=self.heads, kv_num_heads=self.kv_heads,
            scale=size**-0.5 if self.gemma else float(1 / np.sqrt(size)), softcap=0.0, do_rotary=1, rotary_interleaved=0,
            **facts,
        )  # fmt: skip
        y = self.linear(f"{at}/o_proj", y, Rows.of(self.tensors[f"{stored}o_proj.weight"]))
        return self.bias(f"{at}/o_proj", y, [f"{stored}o_proj"], even_zero=True)

    def window(self, layer: int) -> int | None:
        """Positions a layer sees, -1 for all; None leaves it out, as the builder does where no window is set."""
        if family(self.config) == "llama":
            return -1
        if slides(self.config, layer):
            return self.config.get("sliding_window")
        return -1 if self.gemma else None

    def head_norm(self, layer: int, which: str, x: str, width: int) -> str:
        """The norm of each head: (B, T, heads x D) -> (B, T x heads, D) and back."""
        at, stored = f"/model/layers.{layer}/attn/{which}", f"model.layers.{layer}.self_attn.{which}.weight"
        gain = self.gain(f"model.layers.{layer}.attn.{which}.layernorm.weight", stored)
        x = self.node("Reshape", f"{at}/Reshape_1", [x, self.constant([0, -1, self.head_dim])])
        facts = {"epsilon": self.eps, "axis": -1, "stash_type": 1}
        x = self.node("SimplifiedLayerNormalization", f"{at}/SimplifiedLayerNormalization", [x, gain], **facts)
        return self.node("Reshape", f"{at}/Reshape_2", [x, self.constant([0, -1, width])], width=width)

    def mlp(self, layer: int, x: str) -> str:
        at, stored = f"/model/layers.{layer}/mlp", f"model.layers.{layer}.mlp."
        if f"{stored}gate_up_proj.weight" in self.tensors:  # as Phi-3 stores them
            both = self.tensors[f"{stored}gate_up_proj.weight"]
            half = both.shape[0] // 2
            pieces = {"gate_proj": Rows(((both, 0, half),)), "up_proj": Rows(((both, half, 2 * half),))}
        else:
            pieces = {n: Rows.of(self.tensors[f"{stored}{n}.weight"]) for n in ("gate_proj", "up_proj")}
        gate, up = (self.bias(f"{at}/{n}", self.linear(f"{at}/{n}", x, rows), [f"{stored}{n}"]) for n, rows in pieces.items())
        inner = self.config["intermediate_size"]
        if _activation(self.config) == "silu":
            act = self.node("Sigmoid", f"{at}/act_fn/Sigmoid", [gate], width=inner)
            act = self.node("Mul", f"{at}/act_fn/Mul", [gate, act], width=inner)
        else:
            act = self.node("Gelu", f"{at}/act_fn/FastGelu", [gate], width=inner, approximate="tanh")
        x = self.node("Mul", f"{at}/Mul", [act, up], width=inner)
        x = self.linear(f"{at}/down_proj", x, Rows.of(self.tensors[f"{stored}down_proj.weight"]))
        return self.bias(f"{at}/down_proj", x, [f"{stored}down_proj"])

    def linear(self, name: str, x: str, rows: Rows) -> str:
        return self.matmul(f"{name}/MatMul", x, rows, self.storage.blocks, f"{name}/MatMul/output_0")

    def matmul(self, name: str, x: str, rows: Rows, how: Blocks | None, output: str) -> str:
        weight, (n, k) = f"{name[1:].replace('/', '.')}.weight", rows.shape
        if how is None:
            return self.node("MatMul", name, [x, self.float_matrix(weight, rows, turned=True)], [output], width=n)
        facts = {"bits": how.bits, "block_size": how.block, "accuracy_level": how.level}
        parts = self.data.blocks(weight, rows, how)
        return self.node("MatMulNBits", f"{name}_Q{how.bits}", [x, *parts], [output], CONTRIB, n, K=k, N=n, **facts)

    def float_matrix(self, name: str, rows: Rows, *, turned: bool) -> str:
        """A float matrix, stored once; float16 is widened by a Cast."""
        if name in self.made:
            return name
        self.made.add(name)
        if self.storage.dtype == "f4":
            return self.data.rows(name, rows, "f4", turned=turned)
        half = self.data.rows(f"{name}.half", rows, "f2", turned=turned)
        return self.node("Cast", f"{name}/widen", [half], [name], to=1)

    def bias(self, name: str, x: str, stored: list[str], even_zero: bool = False) -> str:
        """`x` plus the biases, one after the other; like the builder, without an Add where all of them are zero."""
        if f"{stored[0]}.bias" not in self.tensors:
            return x
        values = np.concatenate([self.tensors[f"{n}.bias"].float32() for n in stored])
        if not (values.any() or even_zero):
            return x
        made = self.data.array(f"{name[1:].replace('/', '.')}.Add.bias", values)
        return self.node("Add", f"{name}/Add", [x, made], width=len(values))

    def tables(self, layer: int) -> list[str]:
        """Names of the cosine and sine tables (positions, turned half of D) of a layer, made at first use."""
        kind = "" if not self.gemma else "_local" if slides(self.config, layer) else "_global"
        names = [f"cos_cache{kind}", f"sin_cache{kind}"]
        if names[0] not in self.made:
            self.made.add(names[0])
            rope, context = turns(self.config, layer), self.config["max_position_embeddings"]
            if rope.far is not None and context > rope.original:
                self.two_tables(names, rope, context)
            else:
                for name, values in zip(names, table(rope.near, context, rope.boost), strict=True):
                    self.data.array(name, values)
        return names

    def two_tables(self, names: list[str], rope: Any, context: int) -> None:
        """Long RoPE: one pair of tables up to the original context, another for all of a longer sequence."""
        from onnx import helper, numpy_helper

        branches = {}
        for size, speed, length in (("large", rope.far, context), ("small", rope.near, rope.original)):
            nodes, outputs = [], []
            for name, values in zip(names, table(speed, length, rope.boost), strict=True):
                tensor = numpy_helper.from_array(values)
                made = {"name": f"/{size}/{name}/Constant", "value": tensor}
                nodes.append(helper.make_node("Constant", [], [f"{name}_{size}"], **made))
                outputs.append(value(f"{name}_{size}", 1, list(values.shape)))
            branches[size] = helper.make_graph(nodes, f"{size}_rotemb_caches_graph", [], outputs)
        at = "/model/rotemb_caches_subgraph"
        longer = self.node("Greater", f"{at}/Greater", [self.length, self.constant(rope.original)])
        self.node("If", f"{at}/If", [longer], names, then_branch=branches["large"], else_branch=branches["small"])


def table(speed: np.ndarray, length: int, boost: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (length, len(speed)) float32: angles as float32 products, their functions correctly rounded."""
    cos, sin = (np.empty((length, len(speed)), np.float32) for _ in range(2))
    for first in range(0, length, CHUNK):
        place = np.arange(first, min(first + CHUNK, length), dtype=np.float32)
        angles = np.outer(place, speed.astype(np.float32)).astype(np.float64)
        for values, function in ((cos, np.cos), (sin, np.sin)):
            values[first : first + CHUNK] = function(angles).astype(np.float32) * np.float32(boost)
    return cos, sin
