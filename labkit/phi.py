"""The Phi family for its labs: tiny random checkpoints with each member's traits, slim stand-ins, variants, templates.

A *tiny* Phi has the architecture of its model (fused matrices, rotary part, tied or not, LongRoPE) at toy size, so that a
conversion can be proved logit for logit. A *slim* one keeps vocabulary, head size and proportions, at a fraction of the
width: few layers of it show what a layer adds. Neither was trained, so neither has a quality.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit import _shapes, host
from labkit._files import locked, write_json, written_beside
from labkit.checkpoint import Checkpoint, checkpoint, house_folder, open_checkpoint
from labkit.i18n import tr
from labkit.standin import TOKENIZER_FILES, _ids, _write, shapes, standin_config
from labkit.types import LabkitError

MEMBERS = ("phi-3.5-mini", "phi-4-mini", "phi-4")
ORIGINAL, LONGEST = 256, 1024  # a tiny Phi's context before and after stretching, in tokens
NARROW = {"phi-3.5-mini": 4, "phi-4-mini": 8, "phi-4": 10}  # how much narrower a slim Phi is: some 100 million weights at most
SPREAD = 0.1  # of a tiny Phi's weights: wide enough that attention prefers some positions to others
# What the two variants have beside or instead of a dense decoder. Sources: config.json of microsoft/Phi-3.5-MoE-instruct
# and of microsoft/Phi-3.5-vision-instruct; its image encoder is CLIP ViT-L/14 at 336 pixels (openai/clip-vit-large-patch14-336).
MOE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32064, "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def tiny(member: str = "phi-4-mini", seed: int = 0) -> Checkpoint:
    """A random float32 checkpoint of two layers with the traits of `member`; written once, found again later.

    Phi-3.5-mini: as many key heads as query heads, a head of its own, LongRoPE. Phi-4-mini: shared key heads, tied, three
    quarters of a head turned, LongRoPE. Phi-4: shared key heads, a head of its own, no stretching. The tokenizer is the house's.
    """
    config = tiny_config(member)
    target = host.home() / "checkpoints" / f"tiny-{member}-seed-{seed}"
    with locked(target.parent / f".lock-{target.name}"):
        if not (target / "standin.json").exists():
            with written_beside(target) as folder:
                _write_tiny(folder, config, seed)
    return open_checkpoint(target, name=f"tiny-{member}")


def tiny_config(member: str) -> dict[str, Any]:
    """config.json of a tiny Phi."""
    if member not in MEMBERS:
        raise LabkitError(f"There is no tiny {member!r}; expected one of {', '.join(MEMBERS)}.")
    real = shapes()[member]["config"]
    grouped, part = real["num_key_value_heads"] < real["num_attention_heads"], real.get("partial_rotary_factor", 1.0)
    config = {**real, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2 if grouped else 4, "vocab_size": 2048, "max_position_embeddings": LONGEST,
              "original_max_position_embeddings": LONGEST, "dtype": "float32"} | _ids()  # fmt: skip
    if shapes()[member]["context"] > 16384:  # the members that were stretched to a long context
        pairs = int(64 * part) // 2
        config |= {"original_max_position_embeddings": ORIGINAL, "rope_scaling": {
            "type": "longrope", "short_factor": [1 + i / 100 for i in range(pairs)], "long_factor": [1.5 + i / 10 for i in range(pairs)],
        }}  # fmt: skip
    return config


def _write_tiny(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    from safetensors.numpy import save_file

    rng, made = np.random.default_rng(seed), {}
    for name, shape in (_shapes.shapes(config) or {}).items():
        middle, spread = (1.0, 0.05) if len(shape) == 1 else (0.0, SPREAD)
        made[name] = rng.normal(middle, spread, shape).astype(np.float32)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    for name in TOKENIZER_FILES:
        if (house_folder() / name).exists():
            shutil.copyfile(house_folder() / name, folder / name)
    write_json(folder / "standin.json", {"seed": seed, "weights": "random, never trained"})


def slim(member: str, layers: int, width: int | None = None, seed: int = 0) -> Checkpoint:
    """A stand-in of `member` with 1 / `width` of its hidden size, heads and feed-forward; head size and vocabulary stay."""
    width = width or NARROW[member]
    config = slim_config(member, layers, width)
    target = host.home() / "checkpoints" / f"slim-{member}-width-{width}-layers-{layers}-seed-{seed}"
    with locked(target.parent / f".lock-{target.name}"):
        if not (target / "standin.json").exists():
            _write(target, config, seed, f"The slim {member}")
    return open_checkpoint(target, name=f"slim-{member}-{layers}-layers" + ("" if width == NARROW[member] else f"-width-{width}"))


def slim_config(member: str, layers: int, width: int) -> dict[str, Any]:
    """config.json of a slim Phi. Raises LabkitError where a size does not divide by `width`."""
    config = standin_config(member, layers)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if bad := [name for name in sizes if config[name] % width]:
        raise LabkitError(f"{member}'s {bad[0]} is {config[bad[0]]}, which does not divide by {width}; take another width.")
    return config | {name: config[name] // width for name in sizes}


def few_layers(model: str, profile: str, layers: int) -> Checkpoint:
    """The stand-in of `layers` layers that a profile can afford: slim in ci, of the published width otherwise."""
    member = model if model in MEMBERS else "phi-3.5-mini"
    return slim(member, layers) if profile == "ci" else checkpoint(f"standin:{member}:{layers}")


def real(model: str, profile: str) -> tuple[Checkpoint | None, str]:
    """The real weights where the profile asks for them or `model` names a folder or hub id: (checkpoint or None, why)."""
    if model in MEMBERS:
        hub = shapes()[model]["hub"]
        if profile != "full":
            return None, tr(
                "profile {profile} takes stand-ins; full fetches {hub}, -p model takes a folder", profile=profile, hub=hub
            )
        model = hub
    try:
        return checkpoint(model), tr("the real weights")
    except LabkitError as error:
        return None, tr("stand-ins only: {error}", error=error)


# --- forward pass ------------------------------------------------------------------------------------------------


def unfuse(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Phi's two fused matrices taken apart: q, k, v in this order, then gate and up; other tensors stay."""
    queries, pairs, size = _shapes.heads(config)
    found = dict(weights)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        edges = np.cumsum([queries * size, pairs * size])
        for name, part in zip("qkv", np.split(found.pop(f"{at}self_attn.qkv_proj.weight"), edges), strict=True):
            found[f"{at}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), np.split(found.pop(f"{at}mlp.gate_up_proj.weight"), 2), strict=True):
            found[f"{at}mlp.{name}_proj.weight"] = part
    return found


def forward(ck: Checkpoint) -> Any:
    """A Phi as `labkit.methods.forward.Llama`, whose `logits(tokens)` needs nothing but numpy."""
    from labkit.methods.forward import Llama

    if ck.family != "phi3":
        raise LabkitError(f"{ck.name} is a {ck.architecture}; expected a Phi3ForCausalLM.")
    return Llama(ck.config, unfuse(ck.config, {name: view.float32() for name, view in ck.tensors().items()}))


def stretch(longest: int, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by (arXiv 2402.13753, section 3)."""
    return math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0


# --- text and images ---------------------------------------------------------------------------------------------


def chat(messages: list[Mapping[str, str]], member: str = "phi-3.5-mini") -> str:
    """The family's chat format, ready for an answer. Source: the chat templates of the three instruct models.

    Phi-3.5 puts a line feed after each role and each <|end|>; Phi-4-mini none; Phi-4 has markers of another kind.
    """
    if member == "phi-4":
        body = "".join(f"<|im_start|>{m['role']}<|im_sep|>{m['content']}<|im_end|>" for m in messages)
        return body + "<|im_start|>assistant<|im_sep|>"
    feed = "\n" if member == "phi-3.5-mini" else ""
    return "".join(f"<|{m['role']}|>{feed}{m['content']}<|end|>{feed}" for m in messages) + f"<|assistant|>{feed}"


def image_tokens(rows: int, columns: int) -> int:
    """Positions an image takes in Phi-3.5-vision when it is cut into rows x columns crops of 336 pixels, plus one of the whole.

    Each crop gives 12 x 12; a separator stands after each of their lines, and one between the two views
    (processing_phi3_v.py of microsoft/Phi-3.5-vision-instruct).
    """
    return (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


# --- sizes without weights ---------------------------------------------------------------------------------------


def planned_gguf(member: str, precision: str) -> list[dict[str, Any]]:
    """Every tensor of `member` as llama.cpp would store it at `precision`: name, shape, type, bytes; no weights needed.

    llama.cpp plans the mixture itself, in a dry run on a GGUF whose table has the published shapes and whose data is a hole.
    """
    from labkit.engines import _gguf, _gguf_quantize

    source = tiny(member)  # its tokenizer; everything else is replaced
    config = standin_config(member)
    outline = Checkpoint(source.path, member, "", config, trained=False)
    outline.__dict__["_tensors"] = {n: _Outline(n, shape) for n, shape in (_shapes.shapes(config) or {}).items()}
    tensors = list(_gguf.stored_tensors(outline))
    base = ["f32" if len(t.shape) == 1 else "bf16" for t in tensors]
    with tempfile.TemporaryDirectory(dir=source.path.parent) as folder:
        file = Path(folder) / "outline.gguf"
        _gguf._outline(outline, file, 0, tensors, base)
        chosen, _ = _gguf_quantize.planned_types(file, precision)
    return [_planned(t.name, t.shape, chosen.get(t.name, kind)) for t, kind in zip(tensors, base, strict=True)]


def planned_moe(precision: str, config: Mapping[str, Any] = MOE) -> list[dict[str, Any]]:
    """The same for a mixture of experts with Phi-3.5-MoE's layout, whose architecture llama.cpp calls phimoe."""
    import gguf

    from labkit.engines import _gguf_quantize
    from labkit.engines._gguf_tokenizer import add_tokenizer

    source = tiny("phi-3.5-mini")
    tensors = moe_tensors(config)
    with tempfile.TemporaryDirectory(dir=source.path.parent) as folder:
        writer = gguf.GGUFWriter(Path(folder) / "outline.gguf", "phimoe")
        for key, name in (("context_length", None), ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
                          ("block_count", "num_hidden_layers"), ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
                          ("head_count", "num_attention_heads"), ("head_count_kv", "num_key_value_heads")):  # fmt: skip
            getattr(writer, f"add_{key}")(config[name] if name else 4096)
        writer.add_layer_norm_rms_eps(1e-5)
        add_tokenizer(writer, source)
        for name, shape in tensors.items():
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), 2 * math.prod(shape), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        end = writer.fout[0].tell() + sum(-(-2 * math.prod(shape) // 32) * 32 for shape in tensors.values()) + 32
        writer.close()
        with open(Path(folder) / "outline.gguf", "r+b") as file:
            file.truncate(end)
        chosen, _ = _gguf_quantize.planned_types(Path(folder) / "outline.gguf", precision)
    return [_planned(name, shape, chosen.get(name, "f32")) for name, shape in tensors.items()]


def moe_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of Phi-3.5-MoE's tensors: biases beside attention and norms, experts stacked, a head with a bias."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    pairs = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    count = config["num_local_experts"]
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, hidden),
        "output.weight": (vocab, hidden),
        "output.bias": (vocab,),
    }
    found |= {f"output_norm.{part}": (hidden,) for part in ("weight", "bias")}
    for at in (f"blk.{i}" for i in range(config["num_hidden_layers"])):
        for name, rows in (("attn_q", hidden), ("attn_k", pairs), ("attn_v", pairs), ("attn_output", hidden)):
            found |= {f"{at}.{name}.weight": (rows, hidden), f"{at}.{name}.bias": (rows,)}
        found |= {f"{at}.{name}.{part}": (hidden,) for name in ("attn_norm", "ffn_norm") for part in ("weight", "bias")}
        found |= {f"{at}.ffn_gate_inp.weight": (count, hidden), f"{at}.ffn_down_exps.weight": (count, hidden, inner)}
        found |= {f"{at}.{name}.weight": (count, inner, hidden) for name in ("ffn_gate_exps", "ffn_up_exps")}
    return found


def _planned(name: str, shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    from labkit.engines import _ggml

    return {"name": name, "shape": shape, "type": kind, "bytes": math.prod(shape[:-1]) * _ggml.row_bytes(kind, shape[-1])}


@dataclass(frozen=True)
class _Outline:
    """A tensor that is a name and a shape only."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    weights: int = 0
