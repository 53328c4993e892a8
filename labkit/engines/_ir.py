"""A decoder-only transformer as a stateful OpenVINO graph, straight from safetensors.

The graph has the interface OpenVINO GenAI expects: inputs `input_ids`, `attention_mask`, `position_ids` (B, T) and
`beam_idx` (B,); output `logits` (B, T, V); the KV cache lives inside, one pair of state variables a layer. Weights stay
in the type they are stored in and are widened by a Convert beside them, which the CPU plugin folds into the product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from labkit._shapes import family, heads, slides, tied
from labkit.engines._rope import turns
from labkit.types import LabkitError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")  # labkit.checkpoint's names
NEVER = -65504.0  # what a masked position adds to its attention logit: finite, so a fully masked row stays a number


class Spec:
    """The facts of `config.json` that shape the graph, under one spelling whatever the family."""

    def __init__(self, config: Mapping[str, Any]):
        c = self.config = config
        self.family = family(c)
        if self.family not in FAMILIES:
            raise LabkitError(
                f"labkit writes OpenVINO graphs for {', '.join(FAMILIES)}; this checkpoint is "
                f"{(c.get('architectures') or ['of no known architecture'])[0]}. Take one of those families."
            )
        if c.get("attn_logit_softcapping") or c.get("final_logit_softcapping"):
            raise LabkitError("Logit soft-capping is not written as an OpenVINO graph; use another engine.")
        self.gemma, self.tied = self.family == "gemma3", tied(c)
        self.layers, self.hidden, self.eps = c["num_hidden_layers"], c["hidden_size"], c.get("rms_norm_eps", 1e-6)
        self.heads, self.kv_heads, self.head_dim = heads(c)
        self.scale = (c.get("query_pre_attn_scalar") or 256 if self.gemma else self.head_dim) ** -0.5
        self.activation = c.get("hidden_activation") or c.get("hidden_act") or "silu"
        if self.activation not in ("silu", "gelu_pytorch_tanh"):
            raise LabkitError(f"Activation {self.activation!r} is unknown here; expected silu or gelu_pytorch_tanh.")

    def window(self, layer: int) -> int | None:
        """How many positions back a layer sees, itself included; None for all of them."""
        return self.config.get("sliding_window") if slides(self.config, layer) else None


class Weights:
    """Tensors of a checkpoint as graph constants, in `dtype` ("f32", "f16", "bf16") or as stored (None)."""

    def __init__(self, tensors: Mapping[str, Any], dtype: str | None = None):
        self.tensors, self.dtype = tensors, dtype
        self.memory: list[np.ndarray] = []  # what the constants point into: must outlive the graph

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def node(self, name: str, rows: slice | None = None, plus: float = 0.0) -> Any:
        """The tensor (or some of its rows) as a float32 node. Types that agree are shared with the file, not copied."""
        import openvino as ov
        from openvino import opset15 as op

        view = self.tensors[name]
        first, last, _ = (rows or slice(None)).indices(view.shape[0])
        stored = (self.dtype or view.dtype).lower()
        shape = [last - first, *view.shape[1:]]
        if plus:
            stored, data = "f32", view.rows(first, last) + np.float32(plus)
        elif stored == view.dtype.lower():
            width = view.raw().size // view.shape[0]
            data = np.asarray(view.raw()[first * width : last * width])
        else:
            data = narrow(view.rows(first, last), stored, name)
        kind = getattr(ov.Type, stored)
        self.memory.append(data)
        tensor = ov.Tensor(data.view(kind.to_dtype()).reshape(-1), ov.Shape(shape), kind)
        constant = ov.op.Constant(tensor, shared_memory=True)
        constant.set_friendly_name(name if rows is None else f"{name}.{first}")
        return constant if stored == "f32" else op.convert(constant, "f32")


def narrow(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Float32 `values` in `dtype`, rounded to nearest even; bfloat16 comes back as its bits, uint16."""
    if dtype == "f32":
        return values
    if dtype == "f16":
        if np.abs(values).max(initial=0) > 65504:
            raise LabkitError(f"Tensor {name!r} has values beyond 65504, the largest f16; choose bf16 or f32.")
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def graph(config: Mapping[str, Any], tensors: Mapping[str, Any], dtype: str | None = None) -> Any:
    """The `openvino.Model` of a checkpoint. Its constants point into the mapped file where the types agree."""
    import openvino as ov
    from openvino import opset15 as op

    weights = Weights(tensors, dtype)
    model = _Decoder(ov, op, Spec(config), weights).model()
    model.memory = weights.memory
    return model


class _Decoder:
    """Builds one graph, node by node. Shapes in comments: batch B, new tokens T, all tokens S, head size D."""

    def __init__(self, ov: Any, op: Any, spec: Spec, weights: Weights):
        self.ov, self.op, self.spec, self.weights = ov, op, spec, weights
        self.sinks: list[Any] = []
        self.masks: dict[int | None, Any] = {}
        self.angles: dict[bool, Any] = {}
        self.ids, self.mask, self.positions = (
            self.parameter(n, [-1, -1], ov.Type.i64) for n in ("input_ids", "attention_mask", "position_ids")
        )
        self.beam = self.parameter("beam_idx", [-1], ov.Type.i32)

    def parameter(self, name: str, shape: list[int], kind: Any) -> Any:
        node = self.op.parameter(shape, kind, name=name)
        node.output(0).get_tensor().set_names({name})
        return node

    def model(self) -> Any:
        op, spec, w = self.op, self.spec, self.weights
        table = w.node("model.embed_tokens.weight")
        x = op.gather(table, op.convert(self.ids, "i32"), i64(0))  # (B, T, hidden)
        if spec.gemma:
            x = op.multiply(x, f32(math.sqrt(spec.hidden)))
        for layer in range(spec.layers):
            x = self.block(x, layer)
        x = self.norm(x, "model.norm.weight")
        head = table if spec.tied else w.node("lm_head.weight")
        logits = op.matmul(x, head, False, True)
        logits.output(0).get_tensor().set_names({"logits"})
        result = op.result(logits, name="logits")
        inputs = [self.ids, self.mask, self.positions, self.beam]
        return self.ov.Model([result], self.sinks, inputs, spec.family)

    def block(self, x: Any, layer: int) -> Any:
        at = f"model.layers.{layer}."
        before_mlp = "pre_feedforward_layernorm" if self.spec.gemma else "post_attention_layernorm"
        y = self.attention(self.norm(x, f"{at}input_layernorm.weight"), layer)
        if self.spec.gemma:
            y = self.norm(y, f"{at}post_attention_layernorm.weight")
        x = self.op.add(x, y)
        y = self.mlp(self.norm(x, f"{at}{before_mlp}.weight"), f"{at}mlp.")
        if self.spec.gemma:
            y = self.norm(y, f"{at}post_feedforward_layernorm.weight")
        return self.op.add(x, y)

    def norm(self, x: Any, name: str) -> Any:
        """x / sqrt(mean(x^2) + eps) * gain; Gemma stores gain - 1."""
        op = self.op
        mean = op.reduce_mean(op.power(x, f32(2.0)), i64([-1]), True)
        y = op.multiply(x, op.divide(f32(1.0), op.sqrt(op.add(mean, f32(self.spec.eps)))))
        return op.multiply(y, self.weights.node(name, plus=1.0 if self.spec.gemma else 0.0))

    def linear(self, x: Any, name: str, rows: slice | None = None) -> Any:
        y = self.op.matmul(x, self.weights.node(f"{name}.weight", rows), False, True)
        y.set_friendly_name(name if rows is None else f"{name}.{rows.start}")
        return self.op.add(y, self.weights.node(f"{name}.bias", rows)) if f"{name}.bias" in self.weights else y

    def mlp(self, x: Any, at: str) -> Any:
        op = self.op
        if f"{at}gate_up_proj.weight" in self.weights:  # Phi-3 stores the two as one tensor
            half = self.weights.tensors[f"{at}gate_up_proj.weight"].shape[0] // 2
            gate, up = (self.linear(x, f"{at}gate_up_proj", rows) for rows in (slice(0, half), slice(half, 2 * half)))
        else:
            gate, up = self.linear(x, f"{at}gate_proj"), self.linear(x, f"{at}up_proj")
        gate = op.swish(gate) if self.spec.activation == "silu" else op.gelu(gate, "TANH")
        return self.linear(op.multiply(gate, up), f"{at}down_proj")

    def attention(self, x: Any, layer: int) -> Any:
        op, spec, at = self.op, self.spec, f"model.layers.{layer}.self_attn."
        wide, narrow_ = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if f"{at}qkv_proj.weight" in self.weights:  # Phi-3 stores the three as one tensor
            edges = (0, wide, wide + narrow_, wide + 2 * narrow_)
            q, k, v = (self.linear(x, f"{at}qkv_proj", slice(a, b)) for a, b in pairwise(edges))
        else:
            q, k, v = (self.linear(x, f"{at}{n}_proj") for n in "qkv")
        q, k, v = self.split(q, spec.heads), self.split(k, spec.kv_heads), self.split(v, spec.kv_heads)
        if f"{at}q_norm.weight" in self.weights:
            q, k = self.norm(q, f"{at}q_norm.weight"), self.norm(k, f"{at}k_norm.weight")
        q, k, v = (op.transpose(n, i64([0, 2, 1, 3])) for n in (q, k, v))  # (B, heads, T, D)
        q, k = self.rotate(q, layer), self.rotate(k, layer)
        k, v = self.remember(k, f"{layer}.key"), self.remember(v, f"{layer}.value")  # (B, kv heads, S, D)
        k, v = self.repeat(k), self.repeat(v)
        y = op.scaled_dot_product_attention(q, k, v, self.causal(spec.window(layer)), f32(spec.scale), causal=False)
        y = op.reshape(op.transpose(y, i64([0, 2, 1, 3])), i64([0, 0, wide]), True)
        return self.linear(y, f"{at}o_proj")

    def split(self, x: Any, heads: int) -> Any:
        return self.op.reshape(x, i64([0, 0, heads, self.spec.head_dim]), True)

    def repeat(self, x: Any) -> Any:
        """Each KV head once for every query head it serves: (B, kv, S, D) -> (B, heads, S, D)."""
        op, spec = self.op, self.spec
        times = spec.heads // spec.kv_heads
        if times == 1:
            return x
        wide = op.broadcast(op.unsqueeze(x, i64([2])), i64([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, i64([0, spec.heads, -1, spec.head_dim]), True)

    def remember(self, x: Any, name: str) -> Any:
        """Append to a state variable along the positions and give the whole of it, beams in `beam_idx` order."""
        op, spec = self.op, self.spec
        shape = self.ov.PartialShape([-1, spec.kv_heads, -1, spec.head_dim])
        info = self.ov.op.util.VariableInfo()
        info.data_shape, info.data_type = shape, self.ov.Type.f32
        info.variable_id = f"past_key_values.{name}present.{name}"
        variable = self.ov.op.util.Variable(info)
        batch = op.gather(op.shape_of(self.ids), i64([0]), i64(0))
        empty = op.broadcast(f32(0.0), op.concat([batch, i64([spec.kv_heads, 0, spec.head_dim])], 0))
        past = op.gather(op.read_value(empty, variable), self.beam, i64(0))
        both = op.concat([past, x], 2)
        self.sinks.append(op.assign(both, variable))
        return both

    def rotate(self, x: Any, layer: int) -> Any:
        """Rotary position: halves (a, b) become (a cos - b sin, b cos + a sin); the rest of D passes."""
        op, (cos, sin, half) = self.op, self.angle(layer)
        rest = self.spec.head_dim - 2 * half
        tail = []
        if rest:
            x, *tail = op.variadic_split(x, i64(3), i64([2 * half, rest])).outputs()
        a, b = op.variadic_split(x, i64(3), i64([half, half])).outputs()
        turned = op.concat([op.multiply(b, f32(-1.0)), a], -1)
        y = op.add(op.multiply(x, cos), op.multiply(turned, sin))
        return op.concat([y, *tail], -1) if tail else y

    def angle(self, layer: int) -> tuple[Any, Any, int]:
        """cos and sin (B, 1, T, 2 half) for a layer's rotary settings, made once for all layers that agree."""
        op, kind = self.op, slides(self.spec.config, layer)
        if kind not in self.angles:
            rope = turns(self.spec.config, layer)
            speed = column(rope.near)
            if rope.far is not None:
                last = op.add(op.reduce_max(self.positions, i64([0, 1]), False), i64(1))
                speed = op.select(op.greater(last, i64(rope.original)), column(rope.far), speed)
            place = op.unsqueeze(op.convert(self.positions, "f32"), i64([1]))  # (B, 1, T)
            turn = op.transpose(op.matmul(speed, place, False, False), i64([0, 2, 1]))  # (B, T, half)
            turn = op.concat([turn, turn], -1)
            cos, sin = (op.unsqueeze(f(turn), i64([1])) for f in (op.cos, op.sin))
            if rope.boost != 1.0:
                cos, sin = op.multiply(cos, f32(rope.boost)), op.multiply(sin, f32(rope.boost))
            self.angles[kind] = (cos, sin, len(rope.near))
        return self.angles[kind]

    def causal(self, window: int | None) -> Any:
        """What each pair adds to its attention logit, (B, 1, T, S): 0 where query may see key, NEVER elsewhere."""
        if window not in self.masks:
            op = self.op
            new = op.gather(op.shape_of(self.ids), i64(1), i64(0))
            every = op.gather(op.shape_of(self.mask), i64(1), i64(0))
            query = op.unsqueeze(op.range(op.subtract(every, new), every, i64(1), "i64"), i64([1]))  # (T, 1)
            key = op.unsqueeze(op.range(i64(0), every, i64(1), "i64"), i64([0]))  # (1, S)
            seen = op.less_equal(key, query)
            real = op.not_equal(op.unsqueeze(self.mask, i64([1, 2])), i64(0))  # (B, 1, 1, S)
            if window is None:
                self.masks[window] = op.select(op.logical_and(seen, real), f32(0.0), f32(NEVER))
            else:
                self.masks[window] = self.windowed(query, key, seen, real, window)
        return self.masks[window]

    def windowed(self, query: Any, key: Any, seen: Any, real: Any, window: int) -> Any:
        """The mask of a sliding window, spelled as paged attention expects it.

        GenAI's paged attention drops the mask and needs the window's length; OpenVINO finds it by this very chain
        of operations (SDPAToPagedAttention), which is why some of them change nothing.
        """
        op = self.op
        near = op.bitwise_and(seen, op.greater(key, op.add(query, i64(-window))))
        keep = op.bitwise_and(op.bitwise_and(real, op.bitwise_and(near, seen)), real)
        keep = op.select(op.broadcast(keep, op.shape_of(keep)), f32(0.0), f32(NEVER))
        return op.slice(keep, i64([0]), i64([2**31 - 1]), i64([1]), i64([3]))


def i64(value: Any) -> Any:
    from openvino import opset15 as op

    return op.constant(np.asarray(value, dtype=np.int64))


def f32(value: float) -> Any:
    from openvino import opset15 as op

    return op.constant(np.float32(value))


def column(values: np.ndarray) -> Any:
    from openvino import opset15 as op

    return op.constant(values.astype(np.float32).reshape(1, -1, 1))
