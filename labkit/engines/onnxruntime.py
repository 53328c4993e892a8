"""ONNX Runtime: a GenAI folder (graph, weights, configuration, tokenizer) written straight from safetensors.

The steps: write_genai (checkpoint -> folder, by labkit itself: no torch, and little memory), quantize_matmul and
quantize_dynamic (float32 graph -> smaller graph); weight_bytes and graph_summary look into a graph. build_genai calls
onnxruntime-genai's model builder, which knows more algorithms, imports torch and needs about ten bytes of memory a
weight; it runs in a child process, and the two are compared in the tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit import _shapes
from labkit.engines import _genai, _onnx_graph
from labkit.engines._genai import LOG, MODEL, GenaiRunner, describe, graph_summary, weight_bytes, write_exact
from labkit.engines._genai_writer import ALGORITHMS as BY_LABKIT
from labkit.engines._genai_writer import BITS, write_genai
from labkit.engines._onnx_lora import AdaptedGenai
from labkit.types import Artifact, Built, LabkitError, Recipe

__all__ = [
    "ALGORITHMS", "FAMILIES", "PRECISIONS", "build", "build_genai", "graph_summary", "load", "quantize_dynamic",
    "quantize_matmul", "store_half", "weight_bytes", "write_exact", "write_genai",
]  # fmt: skip

TITLE, PACKAGE, EXTRA = "ONNX Runtime", "onnxruntime-genai", "onnx"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
# Lowest and highest bits a weight. A float32 scale for each block adds 32 / block_size; rotary tables are stored as
# weights; a float32 embedding beside quantized matrices makes the upper bound that of a model which is half embedding.
PRECISIONS: Mapping[str, tuple[float, float]] = {
    "fp32": (32.0, 34.0),
    "fp16": (16.0, 17.0),
    "int8": (8.0, 21.0),
    "int8_dynamic": (8.0, 21.0),
    "int4": (4.0, 19.0),
    "int2": (2.0, 18.0),
}
BY_BUILDER = ("default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed")  # the builder's own names
ALGORITHMS = (*BY_BUILDER, "hqq")
WRITERS = ("labkit", "builder")
WRITER = {"writer": None}  # labkit where it can, else the model builder; "builder" asks for the latter
BLOCKS = (16, 32, 64, 128, 256)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": WRITER,
    "fp16": WRITER,
    "int8_dynamic": {"per_channel": True, "reduce_range": False, **WRITER},
    **{
        name: {
            "algorithm": "rtn",
            "block_size": 32,  # weights that share a scale
            "symmetric": None,  # no zero points; by default as the algorithm has it
            "accuracy_level": 4,  # 4: activations become int8; 1: float32
            "embedding": None,  # shared with a tied head, float, or int4; by default shared when it can be
            **WRITER,
        }
        for name in BITS
    },
}


def build(checkpoint: Any, recipe: Recipe, out: Path) -> Built:
    """Write a GenAI folder into `out`. Options are those of OPTIONS for the recipe's precision."""
    options, precision = _options(recipe), recipe.precision
    notes: list[str] = []
    if checkpoint.family not in FAMILIES:
        raise LabkitError(
            f"ONNX Runtime graphs are not written for {checkpoint.architecture} here; expected a model of one of the "
            f"families {', '.join(FAMILIES)}."
        )
    if precision in BITS:
        options |= _resolve(checkpoint, precision, options, notes)
    options["writer"] = writer = _writer(checkpoint, options, notes)
    if precision in BITS:
        _build_blocks(checkpoint, out, precision, options)
    elif precision == "int8_dynamic":
        with _scratch(out) as base:
            _float_folder(checkpoint, base, writer, shared=False)
            _move_rest(base, out)
            quantize_dynamic(base / MODEL, out / MODEL, **{k: v for k, v in options.items() if k != "writer"})
    elif precision == "fp16" and writer == "builder":
        with _scratch(out) as base:
            build_genai(checkpoint, base, "fp32")
            _move_rest(base, out)
            store_half(base / MODEL, out / MODEL)
    elif precision == "fp16":
        write_genai(checkpoint, out, "fp16")
    else:
        _float_folder(checkpoint, out, writer, shared=checkpoint.tied)
    if precision == "fp16":
        notes.append("Weights are stored as float16; the CPU widens them on opening and computes in float32.")
    return describe(out, options, notes)


def build_needs(recipe: Recipe) -> tuple[float, float]:
    """Bytes of memory and bits of scratch disk, each a weight, that building a recipe takes."""
    by_builder = recipe.options.get("writer") == "builder" or _builder_alone(_options(recipe))
    passes = recipe.precision == "int8_dynamic" or recipe.options.get("algorithm") == "hqq"  # through a float32 folder
    return 10.0 if by_builder or passes else 0.0, 32.0 if by_builder or passes else 0.0


def build_genai(checkpoint: Any, out: str | Path, precision: str, **extra: Any) -> Path:
    """Run the model builder: checkpoint -> GenAI folder `out`. `extra` goes to the builder as its extra options.

    `precision` is the builder's: fp32, fp16 or int4. What it prints is appended to out/build.log.
    """
    _require_torch("ONNX Runtime GenAI's model builder")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cache = out / "cache"
    _genai.run_child(
        "build", out / LOG, source=checkpoint.path, out=out, precision=precision, cache=cache, options=extra
    )  # fmt: skip
    shutil.rmtree(cache, ignore_errors=True)
    return out


def quantize_matmul(
    src: str | Path, dst: str | Path, bits: int, *, block_size: int = 32, symmetric: bool = True,
    accuracy_level: int = 4, algorithm: str = "rtn", share: bool = False,
) -> Path:  # fmt: skip
    """float32 graph `src` -> `dst` with its constant matrices as MatMulNBits of 2, 4 or 8 bits, by RTN or HQQ.

    `share=True`: the embedding of a model with a tied head reads the quantized head; otherwise it stays float32.
    """
    if algorithm == "hqq":
        _require_torch("ONNX Runtime's HQQ")
    dst = Path(dst)
    _genai.run_child(
        "nbits", dst.parent / LOG, source=src, out=dst, bits=bits, block_size=block_size, symmetric=symmetric,
        accuracy_level=accuracy_level, algorithm=algorithm, share=share,
    )  # fmt: skip
    return dst


def quantize_dynamic(src: str | Path, dst: str | Path, *, per_channel: bool = True, reduce_range: bool = False) -> Path:
    """float32 graph `src` -> `dst` with int8 weights, whose activations are quantized while running.

    `reduce_range=True` keeps weights to 7 bits, for processors whose 8-bit products saturate (x86 before VNNI).
    """
    dst = Path(dst)
    choices = {"per_channel": per_channel, "reduce_range": reduce_range}
    _genai.run_child("dynamic", dst.parent / LOG, source=src, out=dst, **choices)
    return dst


def store_half(src: str | Path, dst: str | Path) -> Path:
    """float32 graph `src` -> `dst` with its matrices stored as float16: half the file, the same arithmetic.

    The model builder's own float16 graph is made for GPUs; on the CPU of this version it fails at the first new token.
    """
    dst = Path(dst)
    _genai.run_child("half", dst.parent / LOG, source=src, out=dst)
    return dst


def load(artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> GenaiRunner:
    """Open an artifact. `exact=True`: float32 arithmetic; only int8_dynamic keeps its int8 activations."""
    return GenaiRunner(artifact.path, exact=exact, threads=threads)


def load_adapted(
    artifact: Artifact, adapters: Mapping[str, Any], *, exact: bool = False, threads: int | None = None
) -> AdaptedGenai:
    """As `load`, with adapters (name -> labkit.adapters.Adapter) beside the weights; see labkit.adapters.load."""
    return AdaptedGenai(Path(artifact.path), adapters, exact=exact, threads=threads)


def _options(recipe: Recipe) -> dict[str, Any]:
    known = OPTIONS[recipe.precision]
    unknown = sorted(set(recipe.options) - set(known))
    if unknown:
        raise LabkitError(f"ONNX Runtime {recipe.precision} has no option {unknown[0]!r}; expected one of {', '.join(known)}.")
    options = {**known, **recipe.options}
    for name, allowed in (
        ("algorithm", ALGORITHMS if recipe.precision == "int4" else ("rtn",)),
        ("block_size", BLOCKS),
        ("accuracy_level", (1, 4)),
        ("symmetric", (None, True, False)),
        ("writer", (None, *WRITERS)),
        ("embedding", (None, "shared", "float", "int4") if recipe.precision == "int4" else (None, "shared", "float")),
    ):
        if name in options and options[name] not in allowed:
            words = ", ".join(str(a) for a in allowed if a is not None)
            raise LabkitError(f"{name}={options[name]!r} was given for {recipe.precision}; expected one of {words}.")
    return options


def _writer(checkpoint: Any, options: Mapping[str, Any], notes: list[str]) -> str:
    """Who writes the graph: labkit, unless the builder is asked for or needed, which goes into `notes`."""
    reason = _builder_alone(options) or _onnx_graph.unsupported(checkpoint.config)
    if options["writer"] == "labkit" and reason:
        raise LabkitError(f"labkit cannot write this graph itself: {reason}; leave writer out.")
    if not reason and options["writer"] != "builder":
        return "labkit"
    _check_rows(checkpoint)
    if reason:
        notes.append(f"The graph was made by onnxruntime-genai's model builder: {reason}.")
    return "builder"


def _builder_alone(options: Mapping[str, Any]) -> str | None:
    """What among the options only the model builder can do."""
    if options.get("algorithm", "").startswith("k_quant"):
        return f"{options['algorithm']} is its own algorithm"
    return "only it makes an int4 embedding" if options.get("embedding") == "int4" else None


def _check_rows(checkpoint: Any) -> None:
    for name, tensor in checkpoint.tensors().items():
        # The builder knows the head by its number of rows alone and would attach the logits to this matrix too.
        if name.endswith("_proj.weight") and tensor.shape[0] == checkpoint.vocab_size:
            raise LabkitError(
                f"{name} has as many rows ({tensor.shape[0]}) as the vocabulary has tokens, so ONNX Runtime's model builder takes "
                "it for the head; expected a checkpoint whose layers have other sizes, or a recipe labkit writes itself."
            )


def _resolve(checkpoint: Any, precision: str, options: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The choices left open, made; those that cannot be had, refused. Every substitution goes into `notes`."""
    algorithm = options["algorithm"]
    zeros = algorithm == "hqq" or algorithm.startswith("k_quant")  # these always store zero points
    if zeros and options["symmetric"]:
        raise LabkitError(f"{algorithm} always stores zero points; leave symmetric out, or take rtn.")
    symmetric = not zeros if options["symmetric"] is None else options["symmetric"]
    embedding = options["embedding"] or ("float" if _why_not_shared(checkpoint, precision, options) else "shared")
    if embedding == "shared" and (reason := _why_not_shared(checkpoint, precision, options)):
        raise LabkitError(f"The embedding cannot share the head's weights: {reason}; take embedding='float'.")
    if embedding == "int4" and algorithm not in ("default", "rtn"):
        raise LabkitError(f"embedding='int4' needs algorithm 'default' or 'rtn'; {algorithm!r} was given.")
    if embedding == "int4" and algorithm == "rtn":
        algorithm = "default"
        notes.append("An int4 embedding is only made by the builder's algorithm 'default', its other round-to-nearest.")
    if algorithm == "k_quant":
        algorithm = "k_quant_last"
        notes.append("This model builder stores the head of k_quant with 8 bits, which is what it calls k_quant_last.")
    level = options["accuracy_level"]
    if algorithm == "hqq" and level != 1:
        level = 1
        notes.append("hqq has float zero points, which ONNX Runtime multiplies in float32 (accuracy level 1).")
    return {"algorithm": algorithm, "symmetric": symmetric, "embedding": embedding, "accuracy_level": level}


def _why_not_shared(checkpoint: Any, precision: str, options: Mapping[str, Any]) -> str | None:
    """Why one quantized matrix cannot serve as embedding and head; None when it can."""
    hidden, block, algorithm = checkpoint.config["hidden_size"], options["block_size"], options["algorithm"]
    if not checkpoint.tied:
        return f"{checkpoint.name} has a head of its own"
    if hidden % block:
        return f"rows of {hidden} weights do not divide into blocks of {block}"
    if algorithm in ("default", "hqq"):
        return f"{algorithm!r} makes a head that the embedding lookup cannot read"
    if precision == "int2":
        return "the embedding lookup reads 4 and 8 bits, not 2"
    return None


def _even_blocks(config: Mapping[str, Any], block: int, algorithm: str) -> None:
    queries, _, size = _shapes.heads(config)
    heads = queries * size
    for length in (config["hidden_size"], config["intermediate_size"], heads):
        if -(-length // block) % 2:
            raise LabkitError(
                f"The model builder's {algorithm} packs 4-bit zero points in pairs, but rows of {length} weights make an odd number of "
                f"blocks of {block}; take another block_size, symmetric=True, or algorithm='default'."
            )


def _build_blocks(checkpoint: Any, out: Path, precision: str, options: Mapping[str, Any]) -> None:
    algorithm, symmetric, writer = (options[k] for k in ("algorithm", "symmetric", "writer"))
    share = options["embedding"] == "shared"
    common = {k: options[k] for k in ("block_size", "accuracy_level")}
    if writer == "labkit" and algorithm in BY_LABKIT:
        write_genai(checkpoint, out, precision, shared=share, symmetric=symmetric, algorithm=algorithm, **common)
    elif precision == "int4" and algorithm in BY_BUILDER:
        if not symmetric and algorithm != "default":
            _even_blocks(checkpoint.config, options["block_size"], algorithm)
        extra = {f"int4_{k}": v for k, v in common.items()}
        if options["embedding"] == "int4":
            extra["int4_op_types_to_quantize"] = ["MatMul", "Gather"]
        build_genai(
            checkpoint, out, "int4", int4_algo_config=algorithm, int4_is_symmetric=symmetric, shared_embeddings=share,
            **extra,
        )  # fmt: skip
    else:
        with _scratch(out) as base:
            _float_folder(checkpoint, base, writer, shared=share)
            _move_rest(base, out)
            choices = {"symmetric": symmetric, "algorithm": algorithm, "share": share, **common}
            quantize_matmul(base / MODEL, out / MODEL, BITS[precision], **choices)


def _float_folder(checkpoint: Any, out: Path, writer: str, *, shared: bool) -> None:
    """The float32 folder, by either writer."""
    if writer == "labkit":
        write_genai(checkpoint, out, "fp32", shared=shared)
    else:
        build_genai(checkpoint, out, "fp32", shared_embeddings=shared)


def _require_torch(what: str) -> None:
    from importlib import metadata

    for package in ("torch", "transformers"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise LabkitError(f'{what} needs {package}. Try:  pip install "labkit[train]"') from None


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for the float32 graph, gone afterwards."""
    base = Path(out) / "float32"
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _move_rest(base: Path, out: Path) -> None:
    """Everything of a GenAI folder but graph and weights goes where the smaller graph will be."""
    if (base / LOG).exists():
        with open(out / LOG, "a", encoding="utf-8") as log:
            log.write((base / LOG).read_text(encoding="utf-8", errors="replace"))
    for file in base.iterdir():
        if file.name not in (MODEL, f"{MODEL}.data", LOG):
            file.rename(out / file.name)
